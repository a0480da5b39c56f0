"""States on a GPU: whole rows by index in one kernel, where torch's go value by value.

The kernels reach pinned host memory as well, so that evicting and restoring together are one launch, in the order of
the stream: the host waits for nothing and copies nothing.
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

    def exchange(self, index: torch.Tensor, out: torch.Tensor, pages: torch.Tensor) -> None:
        if len(index) and self._words:
            _exchange_pages[(MOVERS,)](
                self._pool, index, self._num_slots, self._words, self._table, out, pages,
                self.chunks[0].shape[self.dim], len(index), self._outer, max(1, MOVED // self._block), self._block,
                num_warps=MOVER_WARPS,
            )  # fmt: skip

    def _move_rows(self, index: torch.Tensor, batch: torch.Tensor, *, to_pool: bool) -> None:
        if len(index) and self._words:
            _move_rows[len(index), self._outer](
                self._pool, index, self._num_slots, self._words, batch, len(index), to_pool, self._block
            )


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["index"])  # type: ignore[untyped-decorator]
def _move_rows(pool, index, num_slots, words, batch, num_rows, TO_POOL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row: pool [outer, num_slots, words], batch [outer, num_rows, words]."""
    row, outer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    in_pool = pool + (outer * num_slots + tl.load(index + row)) * words
    other = batch + (outer * num_rows + row) * words
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if TO_POOL:
            tl.store(in_pool + at, tl.load(other + at, mask=at < words), mask=at < words)
        else:
            tl.store(other + at, tl.load(in_pool + at, mask=at < words), mask=at < words)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["index", "out", "pages"])  # type: ignore[untyped-decorator]
def _exchange_pages(  # type: ignore[no-untyped-def]
    pool, index, num_slots, words, table, out, pages, num_pages, num_rows, num_outer, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the pool go to the pages `out`, and others come in from `pages`; nothing where the page is -1.

    Pages are in chunks [outer, num_pages, words], whose addresses are in `table`.

    A program takes many rows, ROWS at once: what is on its way over the bus is as much as it holds.
    """
    for first in range(tl.program_id(0) * ROWS, num_rows * num_outer, tl.num_programs(0) * ROWS):
        i = first + tl.arange(0, ROWS)
        valid = i < num_rows * num_outer
        row, outer = i % num_rows, (i // num_rows).to(tl.int64)
        in_pool = pool + (outer * num_slots + tl.load(index + row, valid, other=0)) * words
        page_out, page_in = tl.load(out + row, valid, other=-1), tl.load(pages + row, valid, other=-1)
        leaves, comes = page_out >= 0, page_in >= 0
        to = _in_page(pool, table, page_out, leaves, outer, num_pages, words)
        source = _in_page(pool, table, page_in, comes, outer, num_pages, words)
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)[None, :]
            new = tl.load(source[:, None] + at, mask=comes[:, None] & (at < words))
            old = tl.load(in_pool[:, None] + at, mask=leaves[:, None] & (at < words))
            tl.store(to[:, None] + at, old, mask=leaves[:, None] & (at < words))
            tl.store(in_pool[:, None] + at, new, mask=comes[:, None] & (at < words))


@triton.jit
def _in_page(pool, table, page, valid, outer, num_pages, words):  # type: ignore[no-untyped-def]
    """Where a row lies in its page."""
    chunk = tl.load(table + page // num_pages, valid, other=0).to(pool.dtype)
    return chunk + (outer * num_pages + page % num_pages) * words
