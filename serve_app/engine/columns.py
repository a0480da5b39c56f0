"""One tensor of the models' states, with a slot for each row of its batch dimension: on a GPU, or in host memory."""

import importlib.util
from typing import Any

import numpy as np
import torch


class Column:
    """One tensor of the state, with a slot for each row of its batch dimension `dim`."""

    def __init__(self, initial: torch.Tensor, dim: int, num_slots: int) -> None:
        self._shape, self.dim, self._dtype = tuple(initial.shape), dim, initial.dtype
        self.tensor = initial.expand(with_size(initial.shape, dim, num_slots)).clone()

    def form(self, batch: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the tensor for `batch` sessions."""
        return with_size(self._shape, self.dim, batch), self._dtype

    def select(self, index: Any) -> torch.Tensor:
        """A copy of these slots, in that order."""
        return self.tensor.index_select(self.dim, index)

    def put(self, index: Any, new: torch.Tensor) -> None:
        """Overwrite these slots."""
        self.tensor.index_copy_(self.dim, index, new)


class HostColumn(Column):
    """The same in host memory, through numpy: for as little data as this, a torch operation is mostly overhead."""

    def __init__(self, initial: torch.Tensor, dim: int, num_slots: int) -> None:
        super().__init__(initial, dim, num_slots)
        #: numpy has no bfloat16: its bits travel as int16.
        self._bits = torch.int16 if initial.dtype == torch.bfloat16 else initial.dtype
        self._array: np.ndarray = self.tensor.view(self._bits).numpy()
        self._by_slot = self._array.swapaxes(0, dim)

    def select(self, index: Any) -> torch.Tensor:
        taken: np.ndarray = self._array.take(index, self.dim)
        return torch.from_numpy(taken).view(self._dtype)

    def put(self, index: Any, new: torch.Tensor) -> None:
        self._by_slot[index] = new.view(self._bits).numpy().swapaxes(0, self.dim)


def device_column(initial: torch.Tensor, dim: int, num_slots: int) -> Column:
    """On a GPU: with a kernel of our own where there is Triton, which torch for GPUs brings along nearly everywhere."""
    if importlib.util.find_spec("triton") is None:
        return Column(initial, dim, num_slots)
    from serve_app.engine.state_moves import MovedColumn

    return MovedColumn(initial, dim, num_slots)


def with_size(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
