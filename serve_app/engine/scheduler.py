"""Who runs next: a queue of sessions with timesteps ready. Pure; sessions are row numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from serve_app.policy.batching import choose_batch


class Batch(NamedTuple):
    """One step: `k` timesteps of each session in `rows` [B]. `waited_s` [B]: how long each waited for it, falling."""

    rows: np.ndarray
    k: int
    waited_s: np.ndarray


class Scheduler:
    """First come, first served, in steps of up to `max_batch_size` sessions.

    `timesteps`: how many a step may take of each session, rising from 1.

    A session waits at most once in the queue, so it is at most once in a batch, and its order needs no care. What a
    step leaves of its timesteps waits again, at the tail.
    """

    def __init__(self, max_batch_size: int, timesteps: Sequence[int], max_rows: int) -> None:
        self.max_batch_size = max_batch_size
        self.timesteps = np.array(timesteps, np.int64)
        #: Timesteps ready, by row.
        self.left = np.zeros(max_rows, np.int64)
        #: The same of all rows together.
        self.total = 0
        self._since = np.zeros(max_rows)
        #: The number of the queue entry that counts for a row; 0 when it does not wait. Others are stale.
        self._ticket = np.zeros(max_rows, np.int64)
        self._last_ticket = 0
        self._queue = np.zeros((2, 1024), np.int64)  # row, ticket
        self._head = self._tail = 0

    def add(self, rows: np.ndarray, counts: np.ndarray, now: float) -> None:
        """Let each of `rows` (distinct) have `counts` further timesteps ready."""
        self.left[rows] += counts
        self.total += int(counts.sum())
        self._push(rows[self._ticket[rows] == 0], now)

    def schedule(self, now: float) -> Batch | None:
        """Take the next step's sessions out of the queue; None when nothing is ready."""
        # Enough of the queue to find a full batch of one length in, never all of it.
        entries = self._queue[:, self._head : min(self._tail, self._head + 4 * self.max_batch_size)]
        current = self._ticket[entries[0]] == entries[1]
        num_current = np.count_nonzero(current)
        if num_current == 0:
            self._head += entries.shape[1]
            return self.schedule(now) if self._head < self._tail else None
        end = self._head + entries.shape[1]
        if num_current < entries.shape[1]:
            entries = entries[:, current]
        chosen, k = choose_batch(self.left[entries[0]], self.max_batch_size, self.timesteps)
        rows = entries[0][chosen]
        self._head = end - (num_current - len(rows))
        if self._head < end:
            stay = np.ones(num_current, bool)
            stay[chosen] = False
            self._queue[:, self._head : end] = entries[:, stay]
        self._ticket[rows] = 0
        return Batch(rows, k, now - self._since[rows])

    def complete(self, batch: Batch, now: float) -> None:
        """The step was launched: its timesteps are no longer ready; what is left of them waits again."""
        self.left[batch.rows] -= batch.k
        self.total -= batch.k * len(batch.rows)
        self._push(batch.rows[self.left[batch.rows] > 0], now)

    def drop(self, rows: np.ndarray) -> None:
        """Forget everything that `rows` have ready."""
        self.total -= int(self.left[rows].sum())
        self.left[rows] = 0
        self._ticket[rows] = 0

    @property
    def ready(self) -> bool:
        """Whether a step could run now. May be True once too often, for a queue of stale entries."""
        return self._head < self._tail

    def _push(self, rows: np.ndarray, now: float) -> None:
        n = len(rows)
        if n == 0:
            return
        if self._tail + n > self._queue.shape[1]:
            self._make_room(n)
        tickets = np.arange(self._last_ticket + 1, self._last_ticket + n + 1)
        self._last_ticket += n
        self._queue[0, self._tail : self._tail + n] = rows
        self._queue[1, self._tail : self._tail + n] = tickets
        self._tail += n
        self._ticket[rows] = tickets
        self._since[rows] = now

    def _make_room(self, n: int) -> None:
        """Move the live part to the front of a queue at least twice its size."""
        live = self._queue[:, self._head : self._tail]
        live = live[:, self._ticket[live[0]] == live[1]]
        size = max(1024, 2 * (live.shape[1] + n))
        queue = self._queue if size <= self._queue.shape[1] else np.zeros((2, size), np.int64)
        queue[:, : live.shape[1]] = live.copy()
        self._queue, self._head, self._tail = queue, 0, live.shape[1]

    def check(self) -> None:
        """Assert what must always hold between steps."""
        live = self._queue[:, self._head : self._tail]
        live = live[:, self._ticket[live[0]] == live[1]]
        rows = live[0].tolist()
        assert len(rows) == len(set(rows)), "a session waits twice"
        assert set(rows) == set(np.flatnonzero(self.left > 0).tolist()), "a session with timesteps does not wait"
        assert (self.left >= 0).all()
        assert self.left.sum() == self.total
