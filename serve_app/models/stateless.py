"""The interface of a stateless model: anything with these members can be served in batches."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from serve_app.spec import TensorSpec


class Packed(NamedTuple):
    """Rows that lie one behind the other in [B, L]: of which row each token is, -1 for none, and where in it.

    num_rows: those that there may be; outputs that have no dimension of any length are [num_rows, *shape].
    """

    row: torch.Tensor
    position: torch.Tensor
    num_rows: int


@runtime_checkable
class StatelessModel(Protocol):
    """A model whose outputs for a row do not depend on the other rows of its batch.

    A `torch.nn.Module` is moved to the device, put into eval mode and into the configured dtype; `forward` runs in
    inference mode. Shapes are of one row. A dimension of -1 is of any length, which is the same for all inputs of a
    row, and for its outputs that have one; rows of a batch are padded with zeros to the longest, so the model has to
    know which are padding, by an attention mask for instance.

    Optional: `max_length: int`, of that dimension; `optional: tuple[str, ...]`, inputs that a client may leave out;
    `prepare(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]`, called for each row as it arrives, before
    its length counts: it makes of what clients send what `forward` takes (text into tokens), and raises InvalidInput
    for values that cannot be run; and then `prepared: Mapping[str, TensorSpec]`, what it makes, where that is not
    `inputs`; `packs: bool`: True where `forward(inputs, packed: Packed)` takes rows one behind the other, so that rows
    of several lengths need next to no padding. The dimension of any length is then the first of all that have one.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of a row of each input. Elements of dtype object are bytes, for `prepare` only."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Shape and dtype of a row of each output."""
        ...

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """Inputs [B, *shape] of rows padded to the same length -> each output [B, *shape], or the only one."""
        ...
