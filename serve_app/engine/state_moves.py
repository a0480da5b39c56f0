"""States between slots and a batch, on a GPU: whole rows by index, in one kernel, where torch's go value by value."""

import torch
import triton
import triton.language as tl

from serve_app.engine.columns import Column

BLOCK = 1024  # words


class MovedColumn(Column):
    """See Column."""

    def select(self, index: torch.Tensor) -> torch.Tensor:
        batch = self.tensor.new_empty(self.form(len(index))[0])
        _launch(self.tensor, batch, self.dim, index, to_pool=False)
        return batch

    def put(self, index: torch.Tensor, new: torch.Tensor) -> None:
        _launch(self.tensor, new.contiguous(), self.dim, index, to_pool=True)


def _launch(pool: torch.Tensor, batch: torch.Tensor, dim: int, index: torch.Tensor, *, to_pool: bool) -> None:
    outer, row = pool.shape[:dim].numel(), pool.shape[dim + 1 :].numel() * pool.element_size()
    word = next(kind for kind in (torch.int32, torch.int16, torch.int8) if row % kind.itemsize == 0)
    words = row // word.itemsize
    if batch.numel():
        _move[len(index), outer](
            pool.view(-1).view(word), batch.view(-1).view(word), index, pool.shape[dim], len(index), words, to_pool,
            min(BLOCK, triton.next_power_of_2(words)),
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _move(pool, batch, index, num_slots, num_rows, words, TO_POOL: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row: pool [outer, num_slots, words], batch [outer, num_rows, words]."""
    row, outer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    in_pool = pool + (outer * num_slots + tl.load(index + row)) * words
    in_batch = batch + (outer * num_rows + row) * words
    for start in range(0, words, BLOCK):
        at = start + tl.arange(0, BLOCK)
        if TO_POOL:
            tl.store(in_pool + at, tl.load(in_batch + at, mask=at < words), mask=at < words)
        else:
            tl.store(in_batch + at, tl.load(in_pool + at, mask=at < words), mask=at < words)
