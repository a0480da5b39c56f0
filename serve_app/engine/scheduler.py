"""Who runs next: a queue of sessions with timesteps ready. Pure; sessions are row numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from serve_app.compiled import array, compiled
from serve_app.policy.batching import choose_batch
from serve_app.policy.delay import PATIENCE_S, StepTimes, step_limit_s

LOOK_AHEAD = 4
"""Full batches that are looked at, to find one of sessions with as many timesteps each."""
HEAD, SIZE, TOTAL = range(3)


class Batch(NamedTuple):
    """One step: so many timesteps (`counts` [B]) of each session in `rows` [B]; `waited_us` [B] for it.

    `k`: the timesteps of each where all have the same number, else 0.
    """

    rows: np.ndarray
    counts: np.ndarray
    waited_us: np.ndarray
    k: int

    @property
    def timesteps(self) -> int:
        """Of all sessions together."""
        return self.k * len(self.rows) or int(self.counts.sum())


class Scheduler:
    """First come, first served, in steps of up to `max_batch_size` sessions.

    `timesteps`: how many a step may take of each session, rising from 1. `delay_target_s` (0: none): within which a
    segment of few timesteps is to run; it bounds how many a step takes.

    A session waits at most once in the queue, so it is at most once in a batch, and its order needs no care.
    """

    def __init__(
        self, max_batch_size: int, timesteps: Sequence[int], max_rows: int, delay_target_s: float = 0.0
    ) -> None:
        self.max_batch_size = max_batch_size
        self.timesteps = np.array(timesteps, np.int64)
        self._step_times = StepTimes(timesteps)
        self._delay_target_s = delay_target_s
        self._satisfied_at = -math.inf  # when a step last took all that a session had ready
        #: Timesteps ready, by row.
        self.left = np.zeros(max_rows, np.int64)
        self._since = np.zeros(max_rows)
        #: A ring of rows, and whether each is in it; one that has nothing left is passed over when its turn comes.
        self._queue = np.zeros(max_rows, np.int64)
        self._queued = np.zeros(max_rows, np.bool_)
        self._numbers = np.zeros(3, np.int64)
        self._window = np.zeros((2, LOOK_AHEAD * max_batch_size), np.int64)
        self._chosen = np.zeros(max_batch_size, np.int64)

    def add(self, rows: np.ndarray, counts: np.ndarray, now: float) -> None:
        """Let each of `rows` (distinct) have `counts` further timesteps ready; none where that is 0."""
        _add(self._numbers, self._queue, self._queued, self.left, self._since, array(rows), array(counts), now)

    def schedule(self, now: float, in_flight: int = 0, *, ragged: bool = False) -> Batch | None:
        """Take the next step; None when nothing is ready. What it leaves of its sessions' timesteps waits again.

        in_flight: steps that will run before it. ragged: its sessions may have different numbers of timesteps, so it
        takes all that those have who have waited longest. With a delay target all have the same.
        """
        if not self.total:
            return None
        rows, counts, waited_us = found = np.empty((3, self.max_batch_size), np.int64)
        if ragged and not self._delay_target_s:
            batch, k = _schedule_ragged(
                self._numbers, self._queue, self._queued, self.left, self._since, self.timesteps[-1], now, found
            )
        else:
            batch, k = _schedule(
                self._numbers, self._queue, self._queued, self.left, self._since, self.timesteps, self._window,
                self._chosen, self._step_times.seconds, self._limit_s(now, in_flight), now, found,
            )  # fmt: skip
        if self._delay_target_s and not self.left[rows[:batch]].all():
            self._satisfied_at = now
        return Batch(rows[:batch], counts[:batch], waited_us[:batch], k)

    def took(self, k: int, batch: int, seconds: float) -> None:
        """A step of k timesteps of `batch` sessions has taken so long; which counts where there is a target."""
        if self._delay_target_s:
            self._step_times.add(k, batch, seconds)

    def _limit_s(self, now: float, in_flight: int) -> float:
        if now - self._satisfied_at > PATIENCE_S:
            return math.inf
        return step_limit_s(self._delay_target_s, in_flight, int(self._numbers[SIZE]), self.max_batch_size)

    def drop(self, rows: np.ndarray) -> None:
        """Forget everything that `rows` have ready."""
        self._numbers[TOTAL] -= self.left[rows].sum()
        self.left[rows] = 0

    def longest_wait_s(self, now: float) -> float:
        """For how long who waits longest has waited."""
        return float(now - self._since[self.left > 0].min(initial=now))

    @property
    def total(self) -> int:
        """Timesteps ready, of all rows together."""
        return int(self._numbers[TOTAL])

    def check(self) -> None:
        """Assert what must always hold between steps."""
        head, size, total = self._numbers.tolist()
        rows = self._queue[(head + np.arange(size)) % len(self._queue)].tolist()
        assert len(rows) == len(set(rows)), "a session waits twice"
        assert set(rows) == set(np.flatnonzero(self._queued).tolist())
        assert set(rows) >= set(np.flatnonzero(self.left > 0).tolist()), "a session with timesteps does not wait"
        assert (self.left >= 0).all()
        assert self.left.sum() == total


@compiled
def _push(numbers: np.ndarray, queue: np.ndarray, queued: np.ndarray, row: int) -> None:
    queue[(numbers[HEAD] + numbers[SIZE]) % len(queue)] = row
    queued[row] = True
    numbers[SIZE] += 1


@compiled
def _add(
    numbers: np.ndarray,
    queue: np.ndarray,
    queued: np.ndarray,
    left: np.ndarray,
    since: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray,
    now: float,
) -> None:
    for i in range(len(rows)):
        row = rows[i]
        if counts[i] and not left[row]:
            since[row] = now
            if not queued[row]:
                _push(numbers, queue, queued, row)
        left[row] += counts[i]
        numbers[TOTAL] += counts[i]


@compiled
def _schedule(
    numbers: np.ndarray,
    queue: np.ndarray,
    queued: np.ndarray,
    left: np.ndarray,
    since: np.ndarray,
    timesteps: np.ndarray,
    window: np.ndarray,
    chosen: np.ndarray,
    seconds: np.ndarray,
    limit_s: float,
    now: float,
    found: np.ndarray,
) -> tuple[int, int]:
    """Fill `found` with rows from the head of the queue, timesteps, and how long they waited.

    Returns how many these are, and the timesteps of each.
    """
    looked_at, ready = window[0], window[1]
    count, alike = 0, True
    while numbers[SIZE] and count < len(ready) and not (alike and count == len(chosen)):
        row = queue[numbers[HEAD]]
        numbers[HEAD] = (numbers[HEAD] + 1) % len(queue)
        numbers[SIZE] -= 1
        if left[row]:
            looked_at[count], ready[count] = row, left[row]
            alike = alike and ready[count] == ready[0]
            count += 1
        else:
            queued[row] = False
    batch, k = choose_batch(ready[:count], len(chosen), timesteps, chosen, seconds, limit_s)
    which = batch - 1
    for i in range(count - 1, -1, -1):  # those that are not chosen are where they were
        if which >= 0 and chosen[which] == i:
            which -= 1
        else:
            numbers[HEAD] = (numbers[HEAD] - 1) % len(queue)
            numbers[SIZE] += 1
            queue[numbers[HEAD]] = looked_at[i]
    for i in range(batch):
        _take(numbers, queue, queued, left, since, looked_at[chosen[i]], k, now, found[:, i])
    return batch, k


@compiled
def _schedule_ragged(
    numbers: np.ndarray,
    queue: np.ndarray,
    queued: np.ndarray,
    left: np.ndarray,
    since: np.ndarray,
    most: int,
    now: float,
    found: np.ndarray,
) -> tuple[int, int]:
    """The same of the first in the queue, up to `most` timesteps of each; 0 timesteps where they differ."""
    batch, k = 0, 0
    for _ in range(numbers[SIZE]):  # who has more left waits behind them
        if batch == found.shape[1]:
            break
        row = queue[numbers[HEAD]]
        numbers[HEAD] = (numbers[HEAD] + 1) % len(queue)
        numbers[SIZE] -= 1
        if left[row]:
            count = min(left[row], most)
            _take(numbers, queue, queued, left, since, row, count, now, found[:, batch])
            k = count if batch == 0 or count == k else 0
            batch += 1
        else:
            queued[row] = False
    return batch, k


@compiled
def _take(
    numbers: np.ndarray,
    queue: np.ndarray,
    queued: np.ndarray,
    left: np.ndarray,
    since: np.ndarray,
    row: int,
    count: int,
    now: float,
    found: np.ndarray,
) -> None:
    """A session that is not in the queue gives `count` timesteps: fill in its row, those, and how long it waited."""
    found[0], found[1], found[2] = row, count, 1e6 * (now - since[row])
    left[row] -= count
    numbers[TOTAL] -= count
    if left[row]:
        since[row] = now
        _push(numbers, queue, queued, row)
    else:
        queued[row] = False
