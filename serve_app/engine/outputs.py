"""Outputs that exist and are not acknowledged yet. A step makes one slab; a session knows which."""

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

from serve_app.engine.distinct import distinct
from serve_app.engine.members import EVERYONE, Finder, Positions
from serve_app.spec import TensorSpec


class _Slab:
    """The outputs of one step, [B, k, *shape] each. Once less than half of them are needed, only those are kept."""

    __slots__ = ("_live", "k", "num_live", "rows", "starts", "values")

    def __init__(self, rows: np.ndarray, starts: np.ndarray, values: list[np.ndarray]) -> None:
        self.rows = rows
        self.starts = starts
        self.values = values
        self.k = values[0].shape[1]
        self.num_live = len(rows)
        self._live: np.ndarray | None = None  # whether each is needed; None: all are

    def release(self, at: Positions, count: int) -> None:
        """The `count` sessions at these positions do not need theirs any more. Positions may change."""
        self.num_live -= count
        if self.num_live == 0:
            return
        if self._live is None:
            self._live = np.ones(len(self.rows), bool)
        self._live[at] = False
        if 2 * self.num_live < len(self.rows):
            self.rows, self.starts = self.rows[self._live], self.starts[self._live]
            self.values = [value[self._live] for value in self.values]
            self._live = None


class OutputStore:
    """Outputs by row, in order; freed only by `ack` and `drop`."""

    def __init__(self, specs: Mapping[str, TensorSpec], max_rows: int) -> None:
        self._specs = specs
        self._slabs: dict[int, _Slab] = {}
        self._last_slab = 0
        #: The slab with the first outputs that each row has here, 0 without any; further ones wait in _later.
        self._slab_of = np.zeros(max_rows, np.int64)
        self._later: dict[int, deque[int]] = {}
        self._finder = Finder(max_rows)
        self.timesteps = 0

    def append(self, rows: np.ndarray, starts: np.ndarray, values: list[np.ndarray]) -> None:
        """values: one array [B, k, *shape] for each output; the first timestep of rows[i] (distinct) is starts[i]."""
        self._last_slab += 1
        slab = self._slabs[self._last_slab] = _Slab(rows, starts, values)
        self.timesteps += slab.k * len(rows)
        if (busy := self._slab_of[rows] > 0).any():
            for row in rows[busy].tolist():
                self._later.setdefault(row, deque()).append(self._last_slab)
            rows = rows[~busy]
        self._slab_of[rows] = self._last_slab

    def ack(self, rows: np.ndarray, acked: np.ndarray) -> None:
        """The clients of `rows` (distinct) hold what is below `acked`."""
        while len(rows):
            numbers = self._slab_of[rows]
            found = distinct(numbers)
            rows_go_on, acked_go_on = [rows[:0]], [acked[:0]]
            for number in found:
                if number == 0:
                    continue
                mine: Positions = EVERYONE if len(found) == 1 else numbers == number
                slab, some, below = self._slabs[number], rows[mine], acked[mine]
                at = self._finder.find(some, slab.rows)
                done = slab.starts[at] + slab.k <= below
                if not done.all():
                    some, below = some[done], below[done]
                    if not len(some):
                        continue
                    at = self._finder.find(some, slab.rows)
                if self._later:
                    rows_go_on.append(some)
                    acked_go_on.append(below)
                self._release(number, some, at)
            rows, acked = np.concatenate(rows_go_on), np.concatenate(acked_go_on)

    def drop(self, row: int) -> None:
        """Forget the outputs of a row."""
        one = np.array([row])
        while number := int(self._slab_of[row]):
            self._release(number, one, self._finder.find(one, self._slabs[number].rows))

    def holds(self, row: int) -> bool:
        """Whether a row has outputs here."""
        return bool(self._slab_of[row] > 0)

    def read(self, row: int, start: int) -> Iterator[list[np.ndarray]]:
        """The outputs of a row from timestep `start` on, piece by piece."""
        for number in (int(self._slab_of[row]), *self._later.get(row, ())):
            if number > 0:
                slab = self._slabs[number]
                at = self._finder.find(np.array([row]), slab.rows)
                begin = int(slab.starts[at][0])
                if begin + slab.k > start:
                    yield [value[at][0, max(0, start - begin) :] for value in slab.values]

    def read_all(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Timesteps [starts, starts + lengths) of each of `rows`, row after row: [sum(lengths), *shape] by output."""
        numbers = self._slab_of[rows]
        found = distinct(numbers)
        if len(found) == 1 and found[0] > 0:
            slab = self._slabs[found[0]]
            at = self._finder.find(rows, slab.rows)
            if (lengths == slab.k).all() and (starts == slab.starts[at]).all():
                # Mostly it is the whole step in its order: not even copied.
                return self._named([value[at].reshape(-1, *value.shape[2:]) for value in slab.values])

        outputs = [np.empty((int(lengths.sum()), *spec.shape), spec.dtype) for spec in self._specs.values()]
        first = lengths.cumsum() - lengths
        others = lengths > 0
        for number in found:
            if number == 0:
                continue
            mine = (numbers == number).nonzero()[0]
            slab = self._slabs[number]
            whole = (slab.starts[self._finder.find(rows[mine], slab.rows)] == starts[mine]) & (lengths[mine] == slab.k)
            if len(mine := mine[whole]):
                at = self._finder.find(rows[mine], slab.rows)
                for output, value in zip(outputs, slab.values, strict=True):
                    output[first[mine][:, None] + np.arange(slab.k)] = value[at]
                others[mine] = False
        for i in others.nonzero()[0].tolist():
            filled, end = int(first[i]), int(first[i] + lengths[i])
            for piece in self.read(int(rows[i]), int(starts[i])):
                for output, value in zip(outputs, piece, strict=True):
                    output[filled:end][: len(value)] = value[: end - filled]
                filled = min(end, filled + len(piece[0]))
        return self._named(outputs)

    def _named(self, outputs: list[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._specs, outputs, strict=True))

    def _release(self, number: int, rows: np.ndarray, at: Positions) -> None:
        """`rows`, members of a slab at these positions, go on in their next."""
        slab = self._slabs[number]
        slab.release(at, len(rows))
        if slab.num_live == 0:
            del self._slabs[number]
        self.timesteps -= slab.k * len(rows)
        self._slab_of[rows] = 0
        if self._later:
            for row in rows.tolist():
                self._next_slab(row)

    def _next_slab(self, row: int) -> None:
        if later := self._later.get(row):
            self._slab_of[row] = later.popleft()
            if not later:
                del self._later[row]
