"""The interface of a recurrent model: anything with these members can be served."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from serve_app.spec import TensorSpec

State: TypeAlias = Any
"""A pytree (tensor, tuple, list, dict) of tensors; one dimension of each is the batch, found by asking for 1 and 2."""


@runtime_checkable
class RecurrentModel(Protocol):
    """A model whose state is data, never an attribute: who else is in the batch does not change a session's output.

    A `torch.nn.Module` is moved to the device and put into eval mode by the engine; `forward` runs in inference mode.
    Optional: `sample_rate: int` where a timestep is a run of audio samples; `input_name: str`, what the Open Inference
    Protocol calls the input (x); `tf32 = True` where a GPU may multiply float32 as TF32 (unlike torch's own default for
    cuDNN, it may not else);
    `session_ended(session: str, reason: str)`, called when a session ends (closed, idle, aborted);
    `takes_views = True` where `forward` never writes x and does not need it in one piece, so that on a CPU it may be a
    view into what arrived: that spares a copy; `cpu_only = True` where it runs on no GPU; `identity: str`, which
    differs where another state could be meant, in place of its options; and
    `alternatives() -> Mapping[str, forward]`, other ways to compute `forward` on the device where the model lies, of
    which the engine takes the fastest that gives the same, up to `tolerance: float`, ‖a − b‖ / ‖b‖, by default that of
    the dtype. One that has `in_slots(x, states, slots, outputs, spare)`
    runs on the engine's own tensors of all states, batched over slots: it reads and writes those of `slots` [B], writes
    `outputs`, tensors [T, B, *shape] that lie in any order, and leaves `spare` multiprocessors to others.
    """

    @property
    def input(self) -> TensorSpec:
        """Shape and dtype of one timestep of input."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of one timestep of each output."""
        ...

    def initial_state(self, batch: int) -> State:
        """The state of `batch` sessions that have seen nothing."""
        ...

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor | Mapping[str, torch.Tensor], State]:
        """x [T, B, *input.shape], state of B sessions -> y [T, B, *shape] (or one for each output), state after T.

        What has no recurrence (convolutions, input products) may run over all T at once. `state` is not modified; what
        is returned is the engine's, which may give it back as it is for the next step.
        """
        ...
