"""Who runs next: a queue of sessions with timesteps ready. Pure; sessions are row numbers."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from serve_app.policy.batching import choose_batch

LOOK_AHEAD = 4
"""Full batches that are looked at, to find one of sessions with as many timesteps each."""


class Batch(NamedTuple):
    """One step: `k` timesteps of each session in `rows` [B]. `waited_s`: how long the first of them waited for it."""

    rows: np.ndarray
    k: int
    waited_s: float


class Scheduler:
    """First come, first served, in steps of up to `max_batch_size` sessions.

    `timesteps`: how many a step may take of each session, rising from 1.

    A session waits at most once in the queue, so it is at most once in a batch, and its order needs no care. Sessions
    that became ready together stay one entry.
    """

    def __init__(self, max_batch_size: int, timesteps: Sequence[int], max_rows: int) -> None:
        self.max_batch_size = max_batch_size
        self.timesteps = np.array(timesteps, np.int64)
        #: Timesteps ready, by row.
        self.left = np.zeros(max_rows, np.int64)
        #: The same of all rows together.
        self.total = 0
        self._since = np.zeros(max_rows)
        self._queue: deque[tuple[int, np.ndarray]] = deque()  # numbered entries, each of some rows
        self._last_entry = 0
        #: The entry that each row waits in, 0 when it does not; in any other it is stale.
        self._entry_of = np.zeros(max_rows, np.int64)

    def add(self, rows: np.ndarray, counts: np.ndarray, now: float) -> None:
        """Let each of `rows` (distinct) have `counts` further timesteps ready."""
        self.left[rows] += counts
        self.total += int(counts.sum())
        if (waiting := self._entry_of[rows] > 0).any():
            rows = rows[~waiting]
        self._wait(rows, now)

    def schedule(self, now: float) -> Batch | None:
        """Take the next step; None when nothing is ready. What it leaves of its sessions' timesteps waits again."""
        waiting = self._next_entry()
        if waiting is None:
            return None
        number, rows = waiting
        left = self.left[rows]
        if len(rows) < self.max_batch_size or (left[: self.max_batch_size] != left[0]).any():
            number, rows = self._more(number, rows)
            left = self.left[rows]
        chosen, k = choose_batch(left, self.max_batch_size, self.timesteps)
        if len(chosen) < len(rows):
            stay = np.ones(len(rows), bool)
            stay[chosen] = False
            self._queue.appendleft((number, rows[stay]))
            rows, left = rows[chosen], left[chosen]
        batch = Batch(rows, k, now - float(self._since[rows[0]]))
        left = left - k
        self.left[rows] = left
        self.total -= k * len(rows)
        self._entry_of[rows] = 0
        if left.any():
            self._wait(rows[left > 0], now)
        return batch

    def drop(self, rows: np.ndarray) -> None:
        """Forget everything that `rows` have ready."""
        self.total -= int(self.left[rows].sum())
        self.left[rows] = 0
        self._entry_of[rows] = 0

    @property
    def ready(self) -> bool:
        """Whether a step could run now. May be True once too often, for a queue of stale entries."""
        return bool(self._queue)

    def _wait(self, rows: np.ndarray, now: float) -> None:
        if len(rows):
            self._last_entry += 1
            self._queue.append((self._last_entry, rows))
            self._entry_of[rows] = self._last_entry
            self._since[rows] = now

    def _next_entry(self) -> tuple[int, np.ndarray] | None:
        """The entry at the head without what is stale in it, taken out; None when there is none left."""
        while self._queue:
            number, rows = self._queue.popleft()
            if not (current := self._entry_of[rows] == number).all():
                rows = rows[current]
            if len(rows):
                return number, rows
        return None

    def _more(self, number: int, rows: np.ndarray) -> tuple[int, np.ndarray]:
        """An entry, with those behind it: enough to find a full batch of one length in, never all of them."""
        parts, size = [rows], len(rows)
        while size < LOOK_AHEAD * self.max_batch_size and (waiting := self._next_entry()) is not None:
            parts.append(waiting[1])
            size += len(waiting[1])
        if len(parts) == 1:
            return number, rows
        rows = np.concatenate(parts)
        self._last_entry += 1
        self._entry_of[rows] = self._last_entry
        return self._last_entry, rows

    def check(self) -> None:
        """Assert what must always hold between steps."""
        rows = [row for number, rows in self._queue for row in rows[self._entry_of[rows] == number].tolist()]
        assert len(rows) == len(set(rows)), "a session waits twice"
        assert set(rows) == set(np.flatnonzero(self.left > 0).tolist()), "a session with timesteps does not wait"
        assert (self.left >= 0).all()
        assert self.left.sum() == self.total
