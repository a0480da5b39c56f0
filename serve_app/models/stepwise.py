"""Recurrent layers on a GPU with one product for the inputs of all timesteps, then a product and a kernel for each.

cuDNN's own GRU and LSTM in fp32 take longer where products are of a few tens of rows and large weights (`*_stepwise`
beside `*_graph` in bench/results/fused_rnn_cuda.json); with fewer rows, or small weights, they do not. It pays in a
CUDA graph, where a launch costs next to nothing. The kernels are those of torch's cells, without a public interface, so
what comes of them is compared with the layers before it is used (serve_app/engine/calibration.py).
"""

import torch
from torch.nn.functional import linear

from serve_app.models.interface import State

CELLS = {"GRU": "_thnn_fused_gru_cell", "LSTM": "_thnn_fused_lstm_cell"}


class StepwiseLayers:
    """The forward of a GRU or an LSTM. It uses the weights of the module itself, wherever they are put."""

    def __init__(self, rnn: torch.nn.RNNBase) -> None:
        """`supports` has said yes."""
        self._rnn = rnn
        self._cell = getattr(torch.ops.aten, CELLS[rnn.mode])

    @staticmethod
    def supports(rnn: torch.nn.RNNBase) -> bool:
        """Whether these layers can run so: in one direction, with biases, without projection, on a GPU."""
        return (
            rnn.mode in CELLS
            and hasattr(torch.ops.aten, CELLS[rnn.mode])
            and next(rnn.parameters()).is_cuda
            and rnn.bias
            and not (rnn.bidirectional or rnn.proj_size or rnn.batch_first)
        )

    def __call__(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        """x [T, B, input], h or (h, c) [layers, B, hidden] -> y [T, B, hidden], state after T; as the module."""
        leaves = state if isinstance(state, tuple) else (state,)
        last = []
        for i, (w_ih, w_hh, b_ih, b_hh) in enumerate(self._rnn.all_weights):
            now, ys = [leaf[i] for leaf in leaves], []  # (h,) or (h, c)
            for of_x in linear(x, w_ih).unbind():
                now = self._cell(of_x, linear(now[0], w_hh), now[-1], b_ih, b_hh)[: len(leaves)]
                ys.append(now[0])
            x = torch.stack(ys)
            last.append(now)
        after = tuple(torch.stack(leaf) for leaf in zip(*last, strict=True))
        return x, after if isinstance(state, tuple) else after[0]
