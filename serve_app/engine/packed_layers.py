"""Recurrent layers on a CPU with their weights packed once: torch has them reordered at every call, at every timestep.

For a step of a few sessions that is much of its time (`packed_vs_module_*` in bench/results/engine_cpu.json, "packed"
in bench/results/fused_rnn_cpu.json). torch.compile packs them the same way, through the same operators of oneDNN; they
are no public interface, so what comes of them is compared with the layer itself before it is used.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.nn.functional import linear

from serve_app.engine import cell_math

logger = logging.getLogger(__name__)

LSTM = 2  # what torch calls it among its modes
REORDER = "_reorder_mkldnn_rnn_layer_weight", "_reorder_linear_weight"
MIN_GRU = 256, 4
"""Cells and sessions below which torch's own GRU is faster in fp32, where its products are not most of the time."""
MIN_PACKED = 512, 4
"""Cells and sessions below which to have a weight transposed is enough in fp32, and faster, since it adds in place."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""x [..., features] -> [..., columns]"""
Layer: TypeAlias = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor]
"""x [T, B, features], the state before, where to write the state after, each [B, hidden] -> y [T, B, hidden]"""


def pack_weights(model: torch.nn.Module) -> int:
    """Let the recurrent layers of a model on the CPU run with packed weights; returns how many modules do.

    Their weights may not change afterwards: what is packed is a copy. Layers that cannot be packed stay as they are.
    """
    packed = 0
    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase) and PackedLayers.supports(module):
            forward = PackedLayers(module)
            if forward.agrees():
                module.forward = forward
                packed += 1
            else:
                logger.warning("%s with packed weights gives other outputs here, so it runs without", module)
    return packed


class PackedLayers:
    """The forward of an LSTM, GRU or RNN of torch with packed weights; for inputs other than [T, B, input], its own."""

    def __init__(self, rnn: torch.nn.RNNBase) -> None:
        """`supports` has said yes."""
        self._plain: Callable[..., Any] = rnn.forward
        self._input, self._hidden = rnn.input_size, rnn.hidden_size
        self._has_cell = rnn.mode == "LSTM"
        self._dtype = next(rnn.parameters()).dtype
        self._min_batch = MIN_GRU[1] if rnn.mode == "GRU" and self._dtype == torch.float32 else 1
        self._layers: list[Layer] = [
            LAYERS[rnn.mode](*(weight.detach() for weight in weights)) for weights in rnn.all_weights
        ]

    @staticmethod
    def supports(rnn: torch.nn.RNNBase) -> bool:
        """Whether these layers can be packed, and are not: in one direction, with biases, without projection."""
        weights = [*rnn.parameters()]
        return (
            "forward" not in vars(rnn)
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and all(hasattr(torch.ops.mkldnn, name) for name in REORDER)
            and all(weight.device.type == "cpu" and weight.dtype == weights[0].dtype for weight in weights)
            and weights[0].dtype in TOLERANCE
            and (weights[0].dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
            and (rnn.mode != "GRU" or weights[0].dtype != torch.float32 or rnn.hidden_size >= MIN_GRU[0])
            and rnn.bias
            and not (rnn.bidirectional or rnn.proj_size or rnn.batch_first)
        )

    @torch.inference_mode()
    def agrees(self) -> bool:
        """Whether the outputs are those of the layers themselves."""
        x = torch.linspace(-1, 1, 3 * 4 * self._input).view(3, 4, -1).to(self._dtype)
        h = torch.linspace(-1, 1, len(self._layers) * 4 * self._hidden).view(-1, 4, self._hidden).to(self._dtype)
        state = (h, h) if self._has_cell else h
        try:
            found, expected = self(x, state), self._plain(x, state)
        except (RuntimeError, TypeError) as error:
            logger.warning("torch %s cannot run layers with packed weights: %s", torch.__version__, error)
            return False
        pairs = zip((found[0], *_leaves(found[1])), (expected[0], *_leaves(expected[1])), strict=True)
        limit = TOLERANCE[self._dtype]
        return all(torch.allclose(a, b, rtol=limit, atol=limit) for a, b in pairs)

    def __call__(self, x: Any, state: Any = None) -> tuple[Any, Any]:
        """x [T, B, input], h or (h, c) [layers, B, hidden] -> y [T, B, hidden], state after T; as the module."""
        if state is None or not isinstance(x, torch.Tensor) or x.dim() != 3 or torch.is_grad_enabled():
            return self._plain(x, state)  # type: ignore[no-any-return]
        if x.shape[1] < self._min_batch:
            return self._plain(x, state)  # type: ignore[no-any-return]
        x = x.contiguous()  # what lies in another order would be read as if it did not
        before = [leaf.contiguous() for leaf in _leaves(state)]
        after = [torch.empty_like(leaf) for leaf in before]
        of_layers = [zip(*(leaf.unbind() for leaf in leaves), strict=True) for leaves in (before, after)]
        for layer, of_before, of_after in zip(self._layers, *of_layers, strict=True):
            x = layer(x, of_before, of_after)
        return x, tuple(after) if self._has_cell else after[0]


def _leaves(state: Any) -> Sequence[torch.Tensor]:
    return state if isinstance(state, tuple) else (state,)


class _Lstm:
    def __init__(self, w_ih: torch.Tensor, w_hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor) -> None:
        reorder = getattr(torch.ops.mkldnn, REORDER[0])
        self._hidden = w_hh.shape[1]
        packed_ih, packed_hh = reorder(w_ih, w_hh, self._hidden, False, True, False, None)
        self._weights = packed_ih, packed_hh, b_ih, b_hh

    def __call__(self, x: torch.Tensor, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> torch.Tensor:
        h, c = before
        y, h, c, _ = torch.mkldnn_rnn_layer(
            x, *self._weights, h, c, False, [], LSTM, self._hidden, 1, True, False, False, False
        )
        after[0].copy_(h)
        after[1].copy_(c)
        return y


class _Gru:
    def __init__(self, w_ih: torch.Tensor, w_hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor) -> None:
        self._of_x, self._of_h = _packed(w_ih, b_ih), _packed(w_hh, b_hh)
        self._step = cell_math.gru_fp32 if w_hh.dtype == torch.float32 else cell_math.gru_bf16

    def __call__(self, x: torch.Tensor, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> torch.Tensor:
        (h,) = before
        y = x.new_empty(len(x), *h.shape)
        for of_x, y_t in zip(_numpy(self._of_x(x)), y.unbind(), strict=True):
            self._step(of_x, _numpy(self._of_h(h)), _numpy(h), _numpy(y_t))
            h = y_t
        after[0].copy_(h)
        return y


class _Rnn:
    def __init__(self, w_ih: torch.Tensor, w_hh: torch.Tensor, b_ih: torch.Tensor, b_hh: torch.Tensor) -> None:
        bias = b_ih + b_hh
        self._of_x: Product
        self._of_h: Product | None
        if w_hh.dtype == torch.float32:
            self._of_x, self._transposed = partial(linear, weight=w_ih, bias=bias), w_hh.t().contiguous()
            self._of_h = _packed(w_hh) if len(w_hh) >= MIN_PACKED[0] else None
            self._min_batch = MIN_PACKED[1]
        else:
            self._of_x, self._of_h, self._min_batch = _packed(w_ih, bias), _packed(w_hh), 1

    def __call__(self, x: torch.Tensor, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> torch.Tensor:
        y, (h,) = self._of_x(x), before
        of_h = self._of_h if len(h) >= self._min_batch else None
        for y_t in y.unbind():
            h = y_t.addmm_(h, self._transposed) if of_h is None else y_t.add_(of_h(h))
            self.activate(h)
        after[0].copy_(h)
        return y

    @staticmethod
    def activate(y: torch.Tensor) -> None:
        """In place."""
        tanh = cell_math.tanh_fp32 if y.dtype == torch.float32 else cell_math.tanh_bf16
        tanh(_numpy(y))


class _ReluRnn(_Rnn):
    @staticmethod
    def activate(y: torch.Tensor) -> None:
        y.clamp_min_(0)


def _numpy(values: torch.Tensor) -> np.ndarray:
    """The same memory; bf16, which numpy has not, as uint16."""
    return (values if values.dtype == torch.float32 else values.view(torch.uint16)).numpy()


def _packed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Product:
    """x -> x W^T + bias."""
    packed, run = getattr(torch.ops.mkldnn, REORDER[1])(weight), torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, "none", [], "")


LAYERS: dict[str, Callable[..., Layer]] = {"LSTM": _Lstm, "GRU": _Gru, "RNN_TANH": _Rnn, "RNN_RELU": _ReluRnn}
