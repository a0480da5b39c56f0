"""One tensor of the models' states, with a slot for each row of its batch dimension: on a GPU, or in host memory."""

import importlib.util
from typing import Any

import numpy as np
import torch

from serve_app.engine.distinct import distinct

PAGES_PER_CHUNK = 256


class Column:
    """One tensor of the state, with a slot for each row of its batch dimension `dim`.

    Evicted rows lie in pages in host memory, which grows by chunks of PAGES_PER_CHUNK.
    """

    def __init__(self, initial: torch.Tensor, dim: int, num_slots: int) -> None:
        self._shape, self.dim, self._dtype = tuple(initial.shape), dim, initial.dtype
        self.tensor = initial.expand(with_size(initial.shape, dim, num_slots)).clone()
        self.chunks: list[torch.Tensor] = []

    def form(self, batch: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of the tensor for `batch` sessions."""
        return with_size(self._shape, self.dim, batch), self._dtype

    def select(self, index: Any) -> torch.Tensor:
        """A copy of these slots, in that order."""
        return self.tensor.index_select(self.dim, index)

    def put(self, index: Any, new: torch.Tensor) -> None:
        """Overwrite these slots."""
        self.tensor.index_copy_(self.dim, index, new)

    def grow(self) -> None:
        """Add a chunk of pages."""
        shape, dtype = self.form(PAGES_PER_CHUNK)
        self.chunks.append(torch.empty(shape, dtype=dtype, pin_memory=self.tensor.is_cuda))

    def evict(self, index: Any, pages: np.ndarray) -> None:
        """Copy these slots to `pages`."""
        rows = self.select(index).cpu()
        for chunk, which in _by_chunk(pages):
            at = torch.from_numpy(pages[which] % PAGES_PER_CHUNK)
            self.chunks[chunk].index_copy_(self.dim, at, rows.index_select(self.dim, torch.from_numpy(which)))

    def restore(self, index: Any, pages: np.ndarray) -> None:
        """Copy `pages` to these slots."""
        for chunk, which in _by_chunk(pages):
            at = torch.from_numpy(pages[which] % PAGES_PER_CHUNK)
            self.put(index[which], self.chunks[chunk].index_select(self.dim, at).to(self.tensor.device))


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


def _by_chunk(pages: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(chunk, positions in `pages` that lie in it), for each chunk."""
    chunks = pages // PAGES_PER_CHUNK
    return [(chunk, np.flatnonzero(chunks == chunk)) for chunk in distinct(chunks)]


def with_size(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
