"""Accepted timesteps that have not run yet. A frame's data stays one block; a session knows where in it its run is."""

from collections import deque

import numpy as np

from serve_app.engine.distinct import distinct


class InputStore:
    """Inputs by row, in order. Memory goes back by the block, when the last timestep of a frame has run."""

    def __init__(self, max_rows: int) -> None:
        self._blocks: dict[int, np.ndarray] = {}
        self._live: dict[int, int] = {}  # timesteps of a block that have yet to run
        self._last_block = 0
        self._nbytes = 0
        # The run that each row is in: its block, where it goes on, and timesteps left; further runs wait in _later.
        self._runs = np.zeros((3, max_rows), np.int64)
        self._block, self._offset, self._count = self._runs
        self._later: dict[int, deque[tuple[int, int, int]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks held."""
        return self._nbytes

    def add(self, x: np.ndarray, rows: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> None:
        """x [N, *features]: `counts` timesteps from `offsets` on for each of `rows` (distinct), counts at least 1."""
        self._last_block += 1
        block = self._last_block
        self._blocks[block], self._live[block] = x, int(counts.sum())
        self._nbytes += x.nbytes
        busy = self._count[rows] > 0
        for i in busy.nonzero()[0].tolist():
            self._later.setdefault(int(rows[i]), deque()).append((block, int(offsets[i]), int(counts[i])))
        free = ~busy
        at_once = rows[free]
        self._block[at_once], self._offset[at_once], self._count[at_once] = block, offsets[free], counts[free]

    def take(self, rows: np.ndarray, x: np.ndarray) -> None:
        """Fill x [k, B, *features] with the next k timesteps of each of `rows`; they are gone from here."""
        k = len(x)
        block_of, offset, count = self._runs[:, rows]
        whole = count >= k
        blocks = distinct(block_of[whole])
        if len(blocks) == 1 and whole.all():  # all from one frame: copied once
            data, size = self._blocks[blocks[0]], k * len(rows)
            if (offset[1:] - offset[:-1] == k).all():  # and in the frame's order
                run = data[offset[0] : offset[0] + size].reshape(len(rows), k, *data.shape[1:])
                np.copyto(x, run.swapaxes(0, 1))
            else:
                at = offset + np.arange(k)[:, None]  # [k, B]
                data.take(at, axis=0, out=x, mode="clip")  # which spares a buffer; all are within
            self._release(blocks[0], size)
        else:
            for block in blocks:
                columns = np.flatnonzero(whole & (block_of == block))
                x[:, columns] = self._blocks[block][offset[columns] + np.arange(k)[:, None]]
                self._release(block, k * len(columns))
        done = rows[whole]
        self._offset[done] += k
        self._count[done] -= k
        if self._later:
            for row in done[self._count[done] == 0].tolist():
                self._next_run(row)
        for column in (~whole).nonzero()[0].tolist():
            self._take_across(int(rows[column]), x[:, column])

    def drop(self, rows: np.ndarray) -> None:
        """Forget everything that `rows` have here."""
        for row in rows[self._count[rows] > 0].tolist():
            self._release(int(self._block[row]), int(self._count[row]))
            for block, _, count in self._later.pop(row, ()):
                self._release(block, count)
            self._count[row] = 0

    def _take_across(self, row: int, x: np.ndarray) -> None:
        """Fill x [k, *features] from as many runs of a row as it takes."""
        filled = 0
        while filled < len(x):
            n = min(len(x) - filled, int(self._count[row]))
            block, offset = int(self._block[row]), int(self._offset[row])
            x[filled : filled + n] = self._blocks[block][offset : offset + n]
            filled += n
            self._offset[row] += n
            self._count[row] -= n
            self._release(block, n)
            if self._count[row] == 0:
                self._next_run(row)

    def _next_run(self, row: int) -> None:
        if later := self._later.get(row):
            self._block[row], self._offset[row], self._count[row] = later.popleft()
            if not later:
                del self._later[row]

    def _release(self, block: int, count: int) -> None:
        self._live[block] -= count
        if self._live[block] == 0:
            self._nbytes -= self._blocks.pop(block).nbytes
            del self._live[block]
