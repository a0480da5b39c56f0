"""States on a GPU: whole rows by index in one kernel, where torch's go value by value.

The kernels reach pinned host memory as well, so that evicting and restoring is one launch, in the order of the stream:
the host waits for nothing and copies nothing.
"""

import torch
import triton
import triton.language as tl

from serve_app.engine.columns import MOVERS, Column

BLOCK = 1024  # words
MOVED = 4096  # words of pages that a program has on its way at once
MOVER_WARPS = 32


class MovedColumn(Column):
    """See Column."""

    def __init__(self, initial: torch.Tensor, dim: int, num_slots: int) -> None:
        super().__init__(initial, dim, num_slots)
        row = self.tensor.shape[dim + 1 :].numel() * self.tensor.element_size()
        word = next(kind for kind in (torch.int64, torch.int32, torch.int16, torch.int8) if row % kind.itemsize == 0)
        self._words = row // word.itemsize
        self._word = word
        self._pool = self.tensor.view(-1).view(word)
        self._outer = self.tensor.shape[:dim].numel()
        self._num_slots = num_slots
        self._block = min(BLOCK, triton.next_power_of_2(self._words))
        #: Where each chunk of pages lies.
        self._table = torch.empty(0, dtype=torch.int64, device=initial.device)

    def select(self, index: torch.Tensor) -> torch.Tensor:
        batch = self.tensor.new_empty(self.form(len(index))[0])
        self._move_rows(index, batch.view(-1).view(self._word), to_pool=False)
        return batch

    def put(self, index: torch.Tensor, new: torch.Tensor) -> None:
        new = new.contiguous()
        if new.data_ptr() % self._word.itemsize:
            new = new.clone()
        batch = new.view(-1).view(self._word)
        self._move_rows(index, batch, to_pool=True)

    def grow(self, num_pages: int) -> None:
        super().grow(num_pages)
        self._table = torch.tensor([chunk.data_ptr() for chunk in self.chunks], device=self.tensor.device)

    def evict(self, index: torch.Tensor, pages: torch.Tensor) -> None:
        self._move_pages(index, pages, to_pool=False)

    def restore(self, index: torch.Tensor, pages: torch.Tensor) -> None:
        self._move_pages(index, pages, to_pool=True)

    def _move_rows(self, index: torch.Tensor, batch: torch.Tensor, *, to_pool: bool) -> None:
        if len(index) and self._words:
            _move_rows[len(index), self._outer](
                self._pool, index, self._num_slots, self._words, batch, len(index), to_pool, self._block
            )

    def _move_pages(self, index: torch.Tensor, pages: torch.Tensor, *, to_pool: bool) -> None:
        if len(index) and self._words:
            _move_pages[(MOVERS,)](
                self._pool, index, self._num_slots, self._words, self._table, pages, self.chunks[0].shape[self.dim],
                len(index), self._outer, to_pool, MOVED // self._block, self._block, num_warps=MOVER_WARPS,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _move_rows(pool, index, num_slots, words, batch, num_rows, TO_POOL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row: pool [outer, num_slots, words], batch [outer, num_rows, words]."""
    row, outer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    in_pool = pool + (outer * num_slots + tl.load(index + row)) * words
    other = batch + (outer * num_rows + row) * words
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _move(in_pool + at, other + at, at < words, TO_POOL)


@triton.jit  # type: ignore[untyped-decorator]
def _move_pages(  # type: ignore[no-untyped-def]
    pool, index, num_slots, words, table, pages, num_pages, num_rows, num_outer, TO_POOL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same with pages, of chunks [outer, num_pages, words] whose addresses are in `table`.

    A program takes many rows, ROWS at once: what is on its way over the bus is as much as it holds.
    """
    for first in range(tl.program_id(0) * ROWS, num_rows * num_outer, tl.num_programs(0) * ROWS):
        i = first + tl.arange(0, ROWS)
        valid = i < num_rows * num_outer
        row, outer = i % num_rows, (i // num_rows).to(tl.int64)
        in_pool = pool + (outer * num_slots + tl.load(index + row, valid, other=0)) * words
        page = tl.load(pages + row, valid, other=0)
        chunk = tl.load(table + page // num_pages, valid, other=0).to(pool.dtype)
        in_page = chunk + (outer * num_pages + page % num_pages) * words
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)[None, :]
            _move(in_pool[:, None] + at, in_page[:, None] + at, valid[:, None] & (at < words), TO_POOL)


@triton.jit  # type: ignore[untyped-decorator]
def _move(in_pool, other, valid, TO_POOL: tl.constexpr):  # type: ignore[no-untyped-def]
    if TO_POOL:
        tl.store(in_pool, tl.load(other, mask=valid), mask=valid)
    else:
        tl.store(other, tl.load(in_pool, mask=valid), mask=valid)
