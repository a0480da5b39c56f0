"""Recurrent layers as torch has them: RNN (relu or tanh), LSTM (also with projections) and GRU."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch

from serve_app.models.fp8 import round_to_fp8
from serve_app.models.interface import State
from serve_app.models.options import RnnOptions
from serve_app.models.stepwise import StepwiseLayers
from serve_app.models.weights import load_weights
from serve_app.spec import TensorSpec

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Outputs: TypeAlias = torch.Tensor | Mapping[str, torch.Tensor]
Layers: TypeAlias = Callable[[torch.Tensor, State], tuple[torch.Tensor, State]]
"""x [T, B, input], state -> y [T, B, features], state after T"""

FP8_TOLERANCE = 5e-2
"""Of a forward that multiplies in fp8: it rounds not only weights, but h too."""


class Rnn(torch.nn.Module):
    """Fused recurrent layers, then a linear layer and a top-k where the options ask for them.

    Weights keep torch's names: `rnn.weight_ih_l0` and so on, `head.weight` and `head.bias` of the linear layer; a file
    of another dtype is cast. All runs in `options.dtype`; numpy has no bf16, so clients of bf16 send and get float32.
    """

    def __init__(self, options: RnnOptions) -> None:
        """Raises ConfigError if `options.weights` is not a file with exactly these weights."""
        super().__init__()
        self.options = options
        self.dtype, self.tf32 = _DTYPES[options.dtype], options.dtype == "tf32"
        wire, k = "float16" if options.dtype == "fp16" else "float32", options.top_k
        self.input = TensorSpec((options.input,), wire)
        self.outputs: Mapping[str, TensorSpec] = {"y": TensorSpec((options.num_outputs,), wire)}
        if k:
            self.outputs = {"values": TensorSpec((k,), wire), "indices": TensorSpec((k,), "int32")}

        with torch.random.fork_rng(devices=[]):  # random weights from `seed`; the global generator stays as it was
            torch.default_generator.manual_seed(options.seed)
            self.rnn = _layers(options)
            features = options.projection or options.hidden
            self.head = torch.nn.Linear(features, options.output) if options.output else torch.nn.Identity()
        if options.weights is not None:
            load_weights(self, Path(options.weights))
        self.to(self.dtype).requires_grad_(False)
        if options.quantization == "fp8":
            self.tolerance = FP8_TOLERANCE
            for name, weight in self.rnn.named_parameters():
                if name.startswith("weight_hh") or (name.startswith("weight_ih") and name != "weight_ih_l0"):
                    weight.copy_(round_to_fp8(weight))

    def initial_state(self, batch: int) -> State:
        """Zeros: h [layers, batch, projection or hidden]; for an LSTM (h, c [layers, batch, hidden])."""
        options, like = self.options, next(self.parameters())
        h = like.new_zeros(options.layers, batch, options.projection or options.hidden)
        return (h, like.new_zeros(options.layers, batch, options.hidden)) if options.cell == "lstm" else h

    def forward(self, x: torch.Tensor, state: State) -> tuple[Outputs, State]:
        """x [T, B, input] -> y [T, B, features], or the top_k `values` (largest first) and `indices` [T, B, k]."""
        return self._run(self.rnn, x, state)

    def alternatives(self) -> Mapping[str, Callable[[torch.Tensor, State], tuple[Outputs, State]]]:
        """Other ways to compute `forward` where the weights lie now, by name; some keep weights of their own."""
        found: dict[str, Callable[[torch.Tensor, State], tuple[Outputs, State]]] = {}
        if StepwiseLayers.supports(self.rnn):
            found["stepwise"] = partial(self._run, StepwiseLayers(self.rnn))
        device = next(self.parameters()).device
        if device.type == "cuda":
            try:
                from serve_app.models.fused_lstm import FusedLstm
            except ImportError:  # without Triton, or with one that is too old
                return found
            if FusedLstm.supports(self.options, device):
                found["fused_lstm"] = FusedLstm(self)
        return found

    def _run(self, layers: Layers, x: torch.Tensor, state: State) -> tuple[Outputs, State]:
        y, state = layers(x.to(self.dtype), state)
        y = self.head(y)
        if not self.options.top_k:
            return y.to(x.dtype), state
        values, indices = y.topk(self.options.top_k)
        return {"values": values.to(x.dtype), "indices": indices.to(torch.int32)}, state


def _layers(options: RnnOptions) -> torch.nn.RNNBase:
    sizes = options.input, options.hidden, options.layers
    if options.cell == "lstm":
        return torch.nn.LSTM(*sizes, proj_size=options.projection)
    if options.cell == "gru":
        return torch.nn.GRU(*sizes)
    return torch.nn.RNN(*sizes, nonlinearity=options.cell)
