"""Timesteps of many sessions, in order: inputs that have not run, outputs that are not acknowledged.

What came together, a frame's data or a step's outputs, stays one block; what each session has there is a run.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from serve_app.compiled import array, compiled, copy_bytes

WORTH_THREADS = 128 * 1024
"""Bytes that torch copies, with as many threads as it has."""
BLOCK, OFFSET, START, COUNT, LATER = range(5)
"""Columns of the runs: `count` timesteps, the first of them is `start` and lies at `offset` of its block."""
SOURCE, TARGET = 1, 2
"""Columns of pieces, where those of runs have OFFSET and START."""
UNUSED, NUM_UNUSED, TIMESTEPS = range(3)
EVERYTHING = np.iinfo(np.int64).max

# torch warns, once in a process, of tensors in memory that may only be read; these are.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(b"0", np.uint8))


class Pieces(NamedTuple):
    """What is to be read: `pieces` [n, 4] are block, offset in it, place in the target and count, of some timesteps.

    `block`: that of all of them, -1 when they are of several; `at`: the offset of the first of them when they lie there
    one after the other, else -1.
    """

    pieces: np.ndarray
    block: int
    at: int
    total: int


class TimestepStore:
    """Runs by row, each row's in the order of time. Memory goes back by the block, when nothing in it is needed.

    `widths`: bytes of a timestep, of each tensor. `compacts`: of a block, only what is needed is kept when that is less
    than half of it.
    """

    def __init__(self, widths: Sequence[int], max_rows: int, *, compacts: bool) -> None:
        self._widths = widths
        self._compacts = compacts
        #: Of each block: its tensors as bytes, and the rows that it was made for.
        self._blocks: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}
        self._unused: list[int] = []  # numbers of blocks that are gone
        #: Timesteps of each block, and how many of them are needed.
        self._sizes, self._live = np.zeros((2, 0), np.int64)
        #: The first and the last run of each row, -1 without one. Unused runs are a chain of their own.
        self._ends = np.full((2, max_rows), -1, np.int64)
        self._runs = np.zeros((0, 5), np.int64)
        self._numbers = np.array([-1, 0, 0])
        self.nbytes = 0

    @property
    def timesteps(self) -> int:
        """Timesteps that are held, of all rows together."""
        return int(self._numbers[TIMESTEPS])

    def add(
        self,
        values: Sequence[np.ndarray],
        rows: np.ndarray,
        starts: np.ndarray,
        offsets: np.ndarray,
        counts: np.ndarray,
    ) -> None:
        """counts[i] timesteps from starts[i] on for each of `rows` (distinct), at offsets[i] of values [N, …].

        counts are at least 1. starts are where the row ended; any, where only the first timesteps that are there are
        read, and dropped by how many. The values are kept, not copied.
        """
        if not self._unused:
            more = max(64, len(self._live))
            self._unused = list(range(len(self._live), len(self._live) + more))
            self._sizes, self._live = np.concatenate([[self._sizes, self._live], np.zeros((2, more), np.int64)], 1)
        if self._numbers[NUM_UNUSED] < len(rows):
            first = len(self._runs)
            self._runs = np.concatenate([self._runs, np.zeros((max(len(rows), first, 64), 5), np.int64)])
            _unuse(self._runs, self._numbers, first)
        number = self._unused.pop()
        tensors = [_flat(value) for value in values]
        self._blocks[number] = tensors, rows
        self.nbytes += sum(len(tensor) for tensor in tensors)
        self._sizes[number] = len(tensors[0]) // self._widths[0]
        self._live[number] = _add(
            self._runs, self._ends, self._numbers, number, array(rows), array(starts), array(offsets), array(counts)
        )

    def plan(self, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray, across: int = 1) -> Pieces:
        """How to read counts[i] timesteps of each of `rows`, from starts[i] on, or from where those begin that it has.

        In the target the timesteps of a session are `across` apart: 1, or as many as there are sessions.
        """
        pieces = np.empty((len(rows), 4), np.int64)
        rows, starts, counts = array(rows), array(starts), array(counts)
        while True:
            found, block, at, total = _plan(self._runs, self._ends, rows, starts, counts, across, pieces)
            if found <= len(pieces):
                return Pieces(pieces[:found], block, at, total)
            pieces = np.empty((found, 4), np.int64)

    def view(self, plan: Pieces, tensor: int) -> np.ndarray:
        """The bytes that a plan with an `at` names, where they lie."""
        width = self._widths[tensor]
        return self._blocks[plan.block][0][tensor][plan.at * width : (plan.at + plan.total) * width]

    def copy(self, plan: Pieces, tensor: int, target: np.ndarray, across: int = 1) -> None:
        """Copy what a plan names to `target`, uint8 [total * width]."""
        pieces, width = plan.pieces, self._widths[tensor]
        if plan.at >= 0 and across == 1 and len(target) >= WORTH_THREADS:
            torch.from_numpy(target).copy_(torch.from_numpy(self.view(plan, tensor)))
        elif plan.block >= 0:
            _copy(pieces, self._blocks[plan.block][0][tensor], target, width, across)
        elif len(pieces):
            pieces = pieces[pieces[:, BLOCK].argsort(kind="stable")]
            for part in np.split(pieces, np.flatnonzero(np.diff(pieces[:, BLOCK])) + 1):
                _copy(part, self._blocks[int(part[0, BLOCK])][0][tensor], target, width, across)

    def read(self, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
        """Each tensor's bytes of timesteps [starts, starts + counts) of each of `rows`, row after row.

        Where they lie so anyway it is a view of that.
        """
        plan = self.plan(rows, starts, counts)
        if plan.at >= 0:
            return [self.view(plan, tensor) for tensor in range(len(self._widths))]
        found = [np.empty(plan.total * width, np.uint8) for width in self._widths]
        for tensor, target in enumerate(found):
            self.copy(plan, tensor, target)
        return found

    def drop_first(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """The next `counts` timesteps of `rows` (distinct), as far as there are so many, are not needed any more."""
        self._drop(rows, counts, by_start=False)

    def drop_below(self, rows: np.ndarray, starts: np.ndarray) -> None:
        """What `rows` (distinct) have below `starts` is not needed any more."""
        self._drop(rows, starts, by_start=True)

    def drop(self, rows: np.ndarray) -> None:
        """Forget everything that `rows` have."""
        self._drop(rows, np.full(len(rows), EVERYTHING), by_start=False)

    def holds(self, row: int) -> bool:
        """Whether a row has anything here."""
        return bool(self._ends[0, row] >= 0)

    def check(self) -> None:
        """Assert what must always hold."""
        live = np.zeros_like(self._live)
        for run in self._ends[0].tolist():
            while run >= 0:
                live[self._runs[run, BLOCK]] += self._runs[run, COUNT]
                run = int(self._runs[run, LATER])
        assert (live == self._live).all(), "a block is kept for nobody, or gone too early"
        assert live.sum() == self.timesteps
        assert set(self._blocks) == set(np.flatnonzero(live).tolist())
        assert sum(len(tensor) for tensors, _ in self._blocks.values() for tensor in tensors) == self.nbytes

    def _drop(self, rows: np.ndarray, limits: np.ndarray, *, by_start: bool) -> None:
        found = np.empty(2 * len(self._blocks), np.int64)
        count = _drop(
            self._runs, self._ends, self._numbers, self._sizes, self._live, array(rows), array(limits), by_start,
            self._compacts, found,
        )  # fmt: skip
        for number in found[:count].tolist():
            if self._live[number]:
                self._compact(number)
            elif number in self._blocks:
                tensors, _ = self._blocks.pop(number)
                self._unused.append(number)
                self.nbytes -= sum(len(tensor) for tensor in tensors)

    def _compact(self, number: int) -> None:
        """Keep only what is needed of a block."""
        tensors, rows = self._blocks[number]
        pieces = np.empty((len(rows), 4), np.int64)
        count = _compact(self._runs, self._ends, number, array(rows), pieces)
        total = int(self._live[number])
        moved = [np.empty(total * width, np.uint8) for width in self._widths]
        for width, source, target in zip(self._widths, tensors, moved, strict=True):
            _copy(pieces[:count], source, target, width, 1)
        self._blocks[number] = moved, rows[self._ends[0, rows] >= 0]
        self._sizes[number] = total
        self.nbytes += sum(map(len, moved)) - sum(map(len, tensors))


def _flat(values: np.ndarray) -> np.ndarray:
    """As bytes that may only be read, so that all sources are of one kind."""
    flat: np.ndarray = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    if flat.flags.writeable:
        flat = flat.view()
        flat.flags.writeable = False
    return flat


@compiled
def _unuse(runs: np.ndarray, numbers: np.ndarray, first: int) -> None:
    """The runs from `first` on are unused."""
    for run in range(first, len(runs)):
        runs[run, LATER] = numbers[UNUSED]
        numbers[UNUSED] = run
        numbers[NUM_UNUSED] += 1


@compiled
def _add(
    runs: np.ndarray,
    ends: np.ndarray,
    numbers: np.ndarray,
    block: int,
    rows: np.ndarray,
    starts: np.ndarray,
    offsets: np.ndarray,
    counts: np.ndarray,
) -> int:
    """A run for each of `rows`, at its end; returns the timesteps of all of them."""
    total = 0
    for i in range(len(rows)):
        row, run = rows[i], numbers[UNUSED]
        numbers[UNUSED] = runs[run, LATER]
        runs[run, BLOCK], runs[run, OFFSET], runs[run, START] = block, offsets[i], starts[i]
        runs[run, COUNT], runs[run, LATER] = counts[i], -1
        if ends[0, row] < 0:
            ends[0, row] = run
        else:
            runs[ends[1, row], LATER] = run
        ends[1, row] = run
        total += counts[i]
    numbers[NUM_UNUSED] -= len(rows)
    numbers[TIMESTEPS] += total
    return total


@compiled
def _plan(
    runs: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    across: int,
    pieces: np.ndarray,
) -> tuple[int, int, int, int]:
    """Fill `pieces` as far as they go; returns how many there are, and the rest of Pieces."""
    found, block, in_order, total = 0, -1, True, 0
    for i in range(len(rows)):
        run, done = ends[0, rows[i]], 0
        while done < counts[i] and run >= 0:
            skip = 0 if done else max(0, starts[i] - runs[run, START])
            count = min(runs[run, COUNT] - skip, counts[i] - done)
            if count > 0:
                source = runs[run, OFFSET] + skip
                if found < len(pieces):
                    pieces[found, BLOCK], pieces[found, SOURCE], pieces[found, COUNT] = runs[run, BLOCK], source, count
                    pieces[found, TARGET] = total if across == 1 else i + done * across
                    in_order = in_order and source - pieces[0, SOURCE] == total
                if found == 0:
                    block = runs[run, BLOCK]
                elif block != runs[run, BLOCK]:
                    block = -1
                found += 1
                done += count
                total += count
            run = runs[run, LATER]
    at = pieces[0, SOURCE] if in_order and block >= 0 else -1
    return found, block, at, total


@compiled
def _copy(pieces: np.ndarray, source: np.ndarray, target: np.ndarray, width: int, across: int) -> None:
    """Copy pieces of one block; in the target their timesteps are `across` apart."""
    for i in range(len(pieces)):
        begin, start, count = pieces[i, SOURCE] * width, pieces[i, TARGET] * width, pieces[i, COUNT]
        if across == 1:
            copy_bytes(target, start, source, begin, count * width)
        else:
            for t in range(count):
                copy_bytes(target, start + t * across * width, source, begin + t * width, width)


@compiled
def _drop(
    runs: np.ndarray,
    ends: np.ndarray,
    numbers: np.ndarray,
    sizes: np.ndarray,
    live: np.ndarray,
    rows: np.ndarray,
    limits: np.ndarray,
    by_start: bool,
    compacts: bool,
    found: np.ndarray,
) -> int:
    """Drop the first limits[i] timesteps of rows, or those below; `found`: blocks that are now gone or mostly so."""
    num_found = 0
    for i in range(len(rows)):
        row = rows[i]
        run = ends[0, row]
        left = limits[i] - runs[run, START] if by_start and run >= 0 else limits[i]
        while left > 0 and run >= 0:
            count, block = min(left, runs[run, COUNT]), runs[run, BLOCK]
            was_half = 2 * live[block] >= sizes[block]
            live[block] -= count
            if live[block] == 0 or (compacts and was_half and 2 * live[block] < sizes[block]):
                found[num_found] = block
                num_found += 1
            numbers[TIMESTEPS] -= count
            left -= count
            if count < runs[run, COUNT]:
                runs[run, OFFSET] += count
                runs[run, START] += count
                runs[run, COUNT] -= count
                break
            later = runs[run, LATER]
            runs[run, LATER] = numbers[UNUSED]
            numbers[UNUSED] = run
            numbers[NUM_UNUSED] += 1
            run = ends[0, row] = later
    return num_found


@compiled
def _compact(runs: np.ndarray, ends: np.ndarray, block: int, rows: np.ndarray, pieces: np.ndarray) -> int:
    """Let the runs of a block lie one after the other, with `pieces` as the way to copy it so; returns how many."""
    found, total = 0, 0
    for row in rows:
        run = ends[0, row]
        while run >= 0:
            if runs[run, BLOCK] == block:
                pieces[found, SOURCE], pieces[found, TARGET], pieces[found, COUNT] = (
                    runs[run, OFFSET], total, runs[run, COUNT],
                )  # fmt: skip
                runs[run, OFFSET] = total
                total += runs[run, COUNT]
                found += 1
            run = runs[run, LATER]
    return found
