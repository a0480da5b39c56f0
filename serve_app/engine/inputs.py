"""Accepted timesteps that have not run yet. A frame's data stays one block; what of it is left is counted there."""

import warnings
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from serve_app.engine.distinct import distinct
from serve_app.engine.members import EVERYONE, Finder, Positions

WORTH_THREADS = 128 * 1024
"""Bytes that torch copies, with as many threads as it has."""

# torch warns, once in a process, of tensors in memory that may only be read; these are.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


class _Block:
    """A frame's data x [N, *features], and each session's run in it: where that goes on, and timesteps left."""

    __slots__ = ("count", "live", "offset", "rows", "x")

    def __init__(self, x: np.ndarray, rows: np.ndarray, offset: np.ndarray, count: np.ndarray) -> None:
        self.x = x
        self.rows = rows
        self.offset = offset.copy()
        self.count = count.copy()
        self.live = int(count.sum())

    def in_order(self, at: Positions, k: int) -> np.ndarray | None:
        """The next k timesteps of each, [B, k, *features]: a view, None where they do not lie one after the other."""
        offset = self.offset[at]
        size = k * len(offset)
        if not (at is EVERYONE and size == len(self.x)) and (offset[1:] - offset[:-1] != k).any():
            return None
        first = int(offset[0])
        return self.x[first : first + size].reshape(len(offset), k, *self.x.shape[1:])

    def copy(self, at: Positions, x: np.ndarray) -> None:
        """Fill x [k, B, *features] with the next k timesteps of each."""
        run = self.in_order(at, len(x))
        if run is not None:
            run = run.swapaxes(0, 1)
            if run.nbytes < WORTH_THREADS:
                np.copyto(x, run)
            else:
                torch.from_numpy(x).copy_(torch.from_numpy(run))
        else:
            places = self.offset[at] + np.arange(len(x))[:, None]  # [k, B]
            self.x.take(places, axis=0, out=x, mode="clip")  # which spares a buffer; all are within


class InputStore:
    """Inputs by row, in order. Memory goes back by the block, when the last timestep of a frame has run."""

    def __init__(self, max_rows: int) -> None:
        self._blocks: dict[int, _Block] = {}
        self._last_block = 0
        self._nbytes = 0
        #: The block that each row goes on in, 0 without one; further ones wait in _later.
        self._block_of = np.zeros(max_rows, np.int64)
        self._later: dict[int, deque[int]] = {}
        self._finder = Finder(max_rows)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks held."""
        return self._nbytes

    def add(self, x: np.ndarray, rows: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> None:
        """x [N, *features]: `counts` timesteps from `offsets` on for each of `rows` (distinct), counts at least 1."""
        self._last_block += 1
        self._blocks[self._last_block] = _Block(x, rows, offsets, counts)
        self._nbytes += x.nbytes
        if (busy := self._block_of[rows] > 0).any():
            for row in rows[busy].tolist():
                self._later.setdefault(row, deque()).append(self._last_block)
            rows = rows[~busy]
        self._block_of[rows] = self._last_block

    def take(self, rows: np.ndarray, k: int, buffer: Callable[[int, int], np.ndarray], views: bool) -> np.ndarray:
        """The next k timesteps of each of `rows` [k, B, *features]; they are gone from here.

        In what `buffer(k, B)` returns; with `views`, where they lie in a frame's data in that order, a view of that.
        """
        numbers = self._block_of[rows]
        found = distinct(numbers)
        if len(found) == 1:  # all from one frame
            block = self._blocks[found[0]]
            at = self._finder.find(rows, block.rows)
            if block.count[at].min() >= k:
                run = block.in_order(at, k) if views else None
                if run is not None:
                    x = run.swapaxes(0, 1)
                else:
                    x = buffer(k, len(rows))
                    block.copy(at, x)
                self._advance(found[0], rows, at, k)
                return x

        x = buffer(k, len(rows))
        for number in found:
            block = self._blocks[number]
            columns = (numbers == number).nonzero()[0]
            at = self._finder.find(rows[columns], block.rows)
            whole = block.count[at] >= k
            for column in columns[~whole].tolist():
                self._take_across(int(rows[column]), x[:, column])
            if len(columns := columns[whole]):
                at = self._finder.find(rows[columns], block.rows)
                part = np.empty((k, len(columns), *x.shape[2:]), x.dtype)
                block.copy(at, part)
                x[:, columns] = part
                self._advance(number, rows[columns], at, k)
        return x

    def drop(self, rows: np.ndarray) -> None:
        """Forget everything that `rows` have here."""
        for row in rows[self._block_of[rows] > 0].tolist():
            one = np.array([row])
            while number := int(self._block_of[row]):
                block = self._blocks[number]
                at = self._finder.find(one, block.rows)
                self._advance(number, one, at, int(block.count[at][0]))

    def _take_across(self, row: int, x: np.ndarray) -> None:
        """Fill x [k, *features] from as many blocks as it takes."""
        one, filled = np.array([row]), 0
        while filled < len(x):
            number = int(self._block_of[row])
            block = self._blocks[number]
            at = self._finder.find(one, block.rows)
            n = min(len(x) - filled, int(block.count[at][0]))
            block.copy(at, x[filled : filled + n, None])
            self._advance(number, one, at, n)
            filled += n

    def _advance(self, number: int, rows: np.ndarray, at: Positions, k: int) -> None:
        """The next k timesteps of `rows`, members of a block at these positions, are needed no more."""
        block = self._blocks[number]
        block.live -= k * len(rows)
        if block.live == 0:
            self._nbytes -= self._blocks.pop(number).x.nbytes
            done = rows
        else:
            block.offset[at] += k
            block.count[at] -= k
            done = rows[block.count[at] == 0]
        self._block_of[done] = 0
        if self._later:
            for row in done.tolist():
                self._next_block(row)

    def _next_block(self, row: int) -> None:
        if later := self._later.get(row):
            self._block_of[row] = later.popleft()
            if not later:
                del self._later[row]
