"""Outputs that exist and are not acknowledged yet. A step makes one slab; a session knows where in it its own are."""

from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

from serve_app.engine.distinct import distinct
from serve_app.spec import TensorSpec


class _Slab:
    """The outputs of one step, [B, k, *shape] each. Once less than half of them are needed, only those are kept."""

    __slots__ = ("num_live", "place", "values")

    def __init__(self, values: list[np.ndarray]) -> None:
        self.values = values
        self.num_live = len(values[0])
        self.place = np.arange(self.num_live)  # in `values`, by index of the session in the step; -1: not needed

    def release(self, indices: np.ndarray) -> None:
        """These sessions of the step do not need theirs any more."""
        self.place[indices] = -1
        self.num_live -= len(indices)
        if 0 < 2 * self.num_live < len(self.values[0]):
            live = self.place >= 0
            self.values = [value[self.place[live]] for value in self.values]
            self.place[live] = np.arange(self.num_live)


class OutputStore:
    """Outputs by row, in order; freed only by `ack` and `drop`."""

    def __init__(self, specs: Mapping[str, TensorSpec], max_rows: int) -> None:
        self._specs = specs
        self._slabs: dict[int, _Slab] = {}
        self._last_slab = 0
        # The first run that each row has here: its slab (0: none), its index in that, its timesteps; further ones wait
        # in _later.
        self._runs = np.zeros((4, max_rows), np.int64)
        self._slab, self._index, self._start, self._stop = self._runs
        self._later: dict[int, deque[tuple[int, int, int, int]]] = {}
        self.timesteps = 0

    def append(self, rows: np.ndarray, starts: np.ndarray, values: list[np.ndarray]) -> None:
        """values: one array [B, k, *shape] for each output; row i's first timestep is starts[i]."""
        k = values[0].shape[1]
        self._last_slab += 1
        slab = self._last_slab
        self._slabs[slab] = _Slab(values)
        self.timesteps += k * len(rows)
        indices = np.arange(len(rows))
        busy = self._slab[rows] > 0
        if busy.any():
            for i in busy.nonzero()[0].tolist():
                start = int(starts[i])
                self._later.setdefault(int(rows[i]), deque()).append((slab, i, start, start + k))
            rows, starts, indices = rows[~busy], starts[~busy], indices[~busy]
        self._runs[:, rows] = np.full(len(rows), slab), indices, starts, starts + k

    def ack(self, rows: np.ndarray, acked: np.ndarray) -> None:
        """The clients of `rows` (distinct) hold what is below `acked`."""
        done = (self._slab[rows] > 0) & (self._stop[rows] <= acked)
        while done.any():
            rows, acked = rows[done], acked[done]
            if not self._drop_first(rows):
                break
            done = (self._slab[rows] > 0) & (self._stop[rows] <= acked)

    def drop(self, row: int) -> None:
        """Forget the outputs of a row."""
        while self.holds(row):
            self._drop_first(np.array([row]))

    def holds(self, row: int) -> bool:
        """Whether a row has outputs here."""
        return bool(self._slab[row] > 0)

    def read(self, row: int, start: int) -> Iterator[list[np.ndarray]]:
        """The outputs of a row from timestep `start` on, piece by piece."""
        first = (column[row] for column in (self._slab, self._index, self._start, self._stop))
        for slab, index, begin, stop in (first, *self._later.get(row, ())):
            if slab > 0 and stop > start:
                place = self._slabs[slab].place[index]
                yield [value[place, max(0, start - begin) :] for value in self._slabs[slab].values]

    def read_all(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Timesteps [starts, starts + lengths) of each of `rows`, row after row: [sum(lengths), *shape] by output."""
        ends = starts + lengths
        whole = (self._start[rows] == starts) & (self._stop[rows] == ends) & (lengths > 0)
        slab_of = self._slab[rows]
        slabs = [(self._slabs[slab], whole & (slab_of == slab)) for slab in distinct(slab_of[whole])]
        if len(slabs) == 1 and whole.all():
            values, places = slabs[0][0].values, slabs[0][0].place[self._index[rows]]
            if len(places) != len(values[0]) or (places != np.arange(len(places))).any():
                values = [value[places] for value in values]
            # Else it is the whole step in its order: not even copied.
            outputs = [value.reshape(-1, *value.shape[2:]) for value in values]
            return dict(zip(self._specs, outputs, strict=True))

        outputs = [np.empty((int(lengths.sum()), *spec.shape), spec.dtype) for spec in self._specs.values()]
        at = lengths.cumsum() - lengths
        for slab, members in slabs:
            places = slab.place[self._index[rows[members]]]
            for output, value in zip(outputs, slab.values, strict=True):
                output[at[members][:, None] + np.arange(value.shape[1])] = value[places]
        for i in (~whole).nonzero()[0].tolist():
            filled, end = int(at[i]), int(at[i] + lengths[i])
            for piece in self.read(int(rows[i]), int(starts[i])):
                for output, value in zip(outputs, piece, strict=True):
                    output[filled:end][: len(value)] = value[: end - filled]
                filled = min(end, filled + len(piece[0]))
        return dict(zip(self._specs, outputs, strict=True))

    def _drop_first(self, rows: np.ndarray) -> bool:
        """Forget the first run of each of `rows`, which all have one; False when no row has another."""
        slab_of = self._slab[rows]
        for slab in distinct(slab_of):
            self._slabs[slab].release(self._index[rows[slab_of == slab]])
            if self._slabs[slab].num_live == 0:
                del self._slabs[slab]
        self.timesteps -= int((self._stop[rows] - self._start[rows]).sum())
        self._slab[rows] = 0
        if not self._later:
            return False
        for row in rows.tolist():
            self._next_run(row)
        return True

    def _next_run(self, row: int) -> None:
        if later := self._later.get(row):
            self._slab[row], self._index[row], self._start[row], self._stop[row] = later.popleft()
            if not later:
                del self._later[row]
