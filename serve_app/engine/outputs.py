"""Outputs that exist and are not acknowledged yet. A step's outputs stay one slab until half of it is acknowledged."""

from collections import deque
from collections.abc import Iterator

import numpy as np


class _Slab:
    """The outputs of one step, and which sessions still need theirs."""

    __slots__ = ("compact", "entries", "live")

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.live = 0
        self.compact = False


class _Entry:
    """k timesteps of one session: each value is [k, *shape], a view into the slab, or a copy once that is compacted."""

    __slots__ = ("slab", "start", "stop", "values")

    def __init__(self, slab: _Slab, start: int, stop: int, values: list[np.ndarray]) -> None:
        self.slab, self.start, self.stop, self.values = slab, start, stop, values


class OutputStore:
    """Outputs by row, in order; freed only by `ack` and `drop`."""

    def __init__(self) -> None:
        self._held: dict[int, deque[_Entry]] = {}
        self.timesteps = 0

    def append(self, rows: np.ndarray, starts: np.ndarray, values: list[np.ndarray]) -> None:
        """values: one array [B, k, *shape] for each output; row i's first timestep is starts[i]."""
        k = values[0].shape[1]
        slab = _Slab()
        slab.live = len(rows)
        self.timesteps += k * len(rows)
        for i, (row, start) in enumerate(zip(rows.tolist(), starts.tolist(), strict=True)):
            entry = _Entry(slab, start, start + k, [value[i] for value in values])
            slab.entries.append(entry)
            held = self._held.get(row)
            if held is None:
                self._held[row] = deque((entry,))
            else:
                held.append(entry)

    def ack(self, rows: np.ndarray, acked: np.ndarray) -> None:
        """The clients of `rows` hold what is below `acked`."""
        for row, below in zip(rows.tolist(), acked.tolist(), strict=True):
            held = self._held.get(row)
            if held is None:
                continue
            while held and held[0].stop <= below:
                self._release(held.popleft())
            if not held:
                del self._held[row]

    def drop(self, row: int) -> None:
        """Forget the outputs of a row."""
        for entry in self._held.pop(row, ()):
            self._release(entry)

    def holds(self, row: int) -> bool:
        """Whether a row has outputs here."""
        return row in self._held

    def read(self, row: int, start: int) -> Iterator[list[np.ndarray]]:
        """The outputs of a row from timestep `start` on, piece by piece."""
        for entry in self._held.get(row, ()):
            if entry.stop > start:
                skip = max(0, start - entry.start)
                yield [value[skip:] for value in entry.values]

    def _release(self, entry: _Entry) -> None:
        slab = entry.slab
        slab.live -= 1
        self.timesteps -= entry.stop - entry.start
        entry.values = []
        if not slab.compact and 0 < 2 * slab.live < len(slab.entries):
            slab.compact = True
            for other in slab.entries:
                other.values = [value.copy() for value in other.values]
            slab.entries = []
