"""LSTM layers on a CPU with their weights packed once: torch has oneDNN reorder them at every call.

For a step of a few sessions that is most of its time (`packed_vs_module_*` in bench/results/engine_cpu.json).
torch.compile packs them the same way, through the same two operators; they are no public interface, so what comes of
them is compared with the layer itself before it is used.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

LSTM = 2  # what torch calls it among its modes
REORDER = "_reorder_mkldnn_rnn_layer_weight"
TOLERANCE = 1e-4


def pack_weights(model: torch.nn.Module) -> int:
    """Let the LSTM layers of a model on the CPU run with packed weights; returns how many do.

    Their weights may not change afterwards: what is packed is a copy. Layers that cannot be packed stay as they are.
    """
    packed = 0
    for module in model.modules():
        if isinstance(module, torch.nn.LSTM) and PackedLstm.supports(module):
            forward = PackedLstm(module)
            if forward.agrees():
                module.forward = forward  # type: ignore[method-assign, assignment]
                packed += 1
            else:
                logger.warning("an LSTM with packed weights gives other outputs here, so it runs without")
    return packed


class PackedLstm:
    """The forward of a `torch.nn.LSTM` with packed weights; for inputs of other kinds than [T, B, input], its own."""

    def __init__(self, lstm: torch.nn.LSTM) -> None:
        """`supports` has said yes."""
        self._plain: Callable[..., Any] = lstm.forward
        self._input, self._hidden = lstm.input_size, lstm.hidden_size
        self._layers = [self._pack(*(weight.detach() for weight in weights)) for weights in lstm.all_weights]

    @staticmethod
    def supports(lstm: torch.nn.LSTM) -> bool:
        """Whether these layers can be packed, and are not: in fp32, one direction, with biases, without projection."""
        return (
            "forward" not in vars(lstm)
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and hasattr(torch.ops.mkldnn, REORDER)
            and all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in lstm.parameters())
            and lstm.bias
            and not (lstm.bidirectional or lstm.proj_size or lstm.batch_first)
        )

    @torch.inference_mode()
    def agrees(self) -> bool:
        """Whether the outputs are those of the layer itself."""
        like = self._layers[0][2]
        x = torch.linspace(-1, 1, 3 * 2 * self._input, dtype=like.dtype).view(3, 2, -1)
        h, c = (torch.linspace(-1, 1, len(self._layers) * 2 * self._hidden).view(-1, 2, self._hidden) for _ in "hc")
        try:
            found, expected = self(x, (h, c)), self._plain(x, (h, c))
        except (RuntimeError, TypeError) as error:
            logger.warning("torch %s cannot run an LSTM with packed weights: %s", torch.__version__, error)
            return False
        pairs = zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
        return all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in pairs)

    def __call__(
        self, x: Any, state: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[Any, tuple[torch.Tensor, torch.Tensor]]:
        """x [T, B, input], (h, c) [layers, B, hidden] -> y [T, B, hidden], state after T; as torch.nn.LSTM."""
        if state is None or not isinstance(x, torch.Tensor) or x.dim() != 3 or torch.is_grad_enabled():
            return self._plain(x, state)  # type: ignore[no-any-return]
        x = x.contiguous()  # what lies in another order would be read as if it did not
        h, c = (leaf.contiguous() for leaf in state)
        h_n, c_n = torch.empty_like(h), torch.empty_like(c)
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(self._layers):
            x, h_n[layer], c_n[layer], _ = torch.ops.aten.mkldnn_rnn_layer(
                x, w_ih, w_hh, b_ih, b_hh, h[layer], c[layer], False, [], LSTM, self._hidden, 1, True,
                False, False, False,
            )  # fmt: skip
        return x, (h_n, c_n)

    def _pack(self, w_ih: torch.Tensor, w_hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor) -> Any:
        reorder = getattr(torch.ops.mkldnn, REORDER)
        return *reorder(w_ih, w_hh, self._hidden, False, True, False, None), b_ih, b_hh
