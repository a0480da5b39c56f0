"""One tensor of the models' states, with a slot for each row of its batch dimension: on a GPU, or in host memory."""

import importlib.util
from typing import Any

import numpy as np
import torch

MOVERS = 4
"""Multiprocessors that move pages: enough for the bus. A step beside them leaves them free, where its forward can."""


class Column:
    """One tensor of the state, with a slot for each row of its batch dimension `dim`.

    Evicted rows lie in pages in host memory, which grows by chunks of equal size.
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

    def grow(self, num_pages: int) -> None:
        """Add a chunk of pages."""
        shape, dtype = self.form(num_pages)
        self.chunks.append(torch.empty(shape, dtype=dtype, pin_memory=self.tensor.is_cuda))

    def read(self, pages: np.ndarray) -> torch.Tensor:
        """A copy of these pages, in that order, in host memory."""
        rows = self.chunks[0].new_empty(self.form(len(pages))[0])
        for chunk, which, at in _by_chunk(pages, self.chunks[0].shape[self.dim]):
            rows.index_copy_(self.dim, which, self.chunks[chunk].index_select(self.dim, at))
        return rows

    def exchange(self, index: Any, out: Any, pages: Any) -> None:
        """Copy these slots to the pages `out`, then `pages` to them, where those are not -1; all as StatePool.index."""
        leaving, coming = out >= 0, pages >= 0
        if leaving.any():
            self.evict(index[leaving], out[leaving])
        if coming.any():
            self.restore(index[coming], pages[coming])

    def evict(self, index: Any, pages: Any) -> None:
        """Copy these slots to `pages`; both as StatePool.index has them."""
        rows, size = self.select(index).cpu(), self.chunks[0].shape[self.dim]
        for chunk, which, at in _by_chunk(pages, size):
            self.chunks[chunk].index_copy_(self.dim, at, rows.index_select(self.dim, which))

    def restore(self, index: Any, pages: Any) -> None:
        """Copy `pages` to these slots."""
        size = self.chunks[0].shape[self.dim]
        for chunk, which, at in _by_chunk(pages, size):
            into = index[which.numpy() if isinstance(index, np.ndarray) else which.to(index.device)]
            self.put(into, self.chunks[chunk].index_select(self.dim, at).to(self.tensor.device))


class HostColumn(Column):
    """The same in host memory, through numpy: for as little data as this, a torch operation is mostly overhead."""

    def __init__(self, initial: torch.Tensor, dim: int, num_slots: int) -> None:
        super().__init__(initial, dim, num_slots)
        #: numpy has no bfloat16: its bits travel as int16.
        self._bits = torch.int16 if initial.dtype == torch.bfloat16 else None
        self._array: np.ndarray = self._numbers(self.tensor)
        self._by_slot = self._array.swapaxes(0, dim)

    def select(self, index: Any) -> torch.Tensor:
        taken: np.ndarray = self._array.take(index, self.dim)
        return torch.from_numpy(taken) if self._bits is None else torch.from_numpy(taken).view(self._dtype)

    def put(self, index: Any, new: torch.Tensor) -> None:
        rows = self._numbers(new).swapaxes(0, self.dim)
        if len(index) == 1:  # a third of the time of an array of one
            self._by_slot[index.item()] = rows[0]
        else:
            self._by_slot[index] = rows

    def _numbers(self, tensor: torch.Tensor) -> np.ndarray:
        array: np.ndarray = (tensor if self._bits is None else tensor.view(self._bits)).numpy()
        return array


def device_column(initial: torch.Tensor, dim: int, num_slots: int) -> Column:
    """On a GPU: with a kernel of our own where there is Triton, which torch for GPUs brings along nearly everywhere."""
    if importlib.util.find_spec("triton") is None:
        return Column(initial, dim, num_slots)
    from serve_app.engine.state_moves import MovedColumn

    return MovedColumn(initial, dim, num_slots)


def _by_chunk(pages: Any, size: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(chunk, positions in `pages` that lie in it, where those lie in it), for each chunk."""
    numbers = pages if isinstance(pages, np.ndarray) else pages.cpu().numpy()
    chunks = numbers // size
    positions = [(chunk, np.flatnonzero(chunks == chunk)) for chunk in np.unique(chunks).tolist()]
    return [(chunk, torch.from_numpy(at), torch.from_numpy(numbers[at] % size)) for chunk, at in positions]


def with_size(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
