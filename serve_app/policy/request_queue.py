"""Requests that wait for a batch: which go together, and when. Pure: time comes in as `now`, in seconds.

A batch is built around the request that is first in line: the longest waiting of the highest priority. It is always in,
so within a priority nobody starves; a lower one waits for as long as a higher one has requests. To it come others, of
its priority first, of such lengths that padding all to the longest wastes no more than is allowed.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from serve_app.errors import InvalidInput, Overloaded

T = TypeVar("T", bound=Hashable)


class Level(NamedTuple):
    """Of one priority. `max_size`: requests that may wait (0: any number); `timeout_s`: how long (0: any time).

    `delays`: one that has waited too long is not refused, but stands behind all others of its priority.
    """

    max_size: int = 0
    timeout_s: float = 0.0
    delays: bool = False


class Waiting(NamedTuple, Generic[T]):
    """A request of a batch, and when it has come."""

    item: T
    arrived: float


@dataclass(eq=False, slots=True)
class _Entry(Generic[T]):
    """`number`: its place among those of its line."""

    item: T
    length: int
    arrived: float
    deadline: float
    level: int
    number: int
    late: bool = False


class _Line(Generic[T]):
    """Entries of one priority that are alike: on time, or late. By length, in order."""

    def __init__(self) -> None:
        self.by_length: dict[int, OrderedDict[T, _Entry[T]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.by_length.values()))

    def add(self, entry: _Entry[T]) -> None:
        alike = self.by_length.get(entry.length)
        if alike is None:
            alike = self.by_length[entry.length] = OrderedDict()
        alike[entry.item] = entry

    def remove(self, entry: _Entry[T]) -> None:
        alike = self.by_length[entry.length]
        del alike[entry.item]
        if not alike:
            del self.by_length[entry.length]

    def first(self) -> _Entry[T]:
        """Of all; there is one."""
        return min((next(iter(alike.values())) for alike in self.by_length.values()), key=attrgetter("number"))


class RequestQueue(Generic[T]):
    """Requests by priority, 1 the highest.

    `max_batch_size`: requests of a batch. A batch of one of the `preferred_sizes`, or full, goes at once; another when
    its longest waiting request has waited `max_delay_s`. `max_padding`: share of a batch, each request padded to the
    longest, that may be padding.
    """

    def __init__(
        self,
        max_batch_size: int,
        *,
        preferred_sizes: Sequence[int] = (),
        max_delay_s: float = 0.0,
        max_padding: float = 0.0,
        levels: Sequence[Level] = (Level(),),
    ) -> None:
        self._sizes = sorted({max_batch_size, *preferred_sizes}, reverse=True)
        self._max_delay_s = max_delay_s
        self._least_full = 1 - max_padding
        self._levels = levels
        self._lines = [_Line[T]() for _ in range(2 * len(levels))]  # of each level: on time, late
        self._entries: OrderedDict[T, _Entry[T]] = OrderedDict()  # all, in the order of arrival
        self._deadlines: list[tuple[float, int, _Entry[T]]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self, items: Sequence[T], lengths: Sequence[int], now: float, priority: int = 1, timeout_s: float = 0.0
    ) -> None:
        """Take requests in, each of its length, all or none.

        Raises Overloaded when too many would wait, InvalidInput when these alone are too many.
        timeout_s: how long these may wait, if that is less than others of their priority (0: as long as those).
        """
        level = self._levels[priority - 1]
        if level.max_size:
            if len(items) > level.max_size:
                raise InvalidInput(
                    f"{len(items)} rows of priority {priority} came at once, {level.max_size} may wait: send fewer, or "
                    "raise batching.priorities[].max_queue_size"
                )
            waiting = sum(map(len, self._lines[2 * priority - 2 : 2 * priority]))
            if waiting + len(items) > level.max_size:
                raise Overloaded(
                    f"{waiting} rows of priority {priority} wait, the limit is {level.max_size}: try again later, or "
                    "raise batching.priorities[].max_queue_size"
                )
        deadline = now + min(level.timeout_s or math.inf, timeout_s or math.inf)
        for item, length in zip(items, lengths, strict=True):
            entry = _Entry(item, length, now, deadline, priority - 1, next(self._numbers))
            self._entries[item] = entry
            self._line_of(entry).add(entry)
            if deadline < math.inf:
                heapq.heappush(self._deadlines, (deadline, entry.number, entry))

    def cancel(self, item: T) -> None:
        """Nobody wants its result any more; no error where it does not wait."""
        entry = self._entries.get(item)
        if entry is not None:
            self._remove(entry)

    def expire(self, now: float) -> list[Waiting[T]]:
        """Requests that have waited too long, to be refused; those that are to be delayed are, from now on."""
        refused = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, entry = heapq.heappop(self._deadlines)
            if self._entries.get(entry.item) is not entry:
                continue  # it has gone
            if self._levels[entry.level].delays:
                self._line_of(entry).remove(entry)
                entry.late, entry.number = True, next(self._numbers)
                self._line_of(entry).add(entry)
            else:
                refused.append(self._remove(entry))
        return refused

    def take(self, now: float, least: int = 1) -> list[Waiting[T]]:
        """The next batch, which waits no longer; none when there may soon be a better one. First, `expire`.

        least: requests that make a batch worth it.
        """
        if len(self._entries) < least or not self._entries:
            return []
        chosen: list[_Entry[T]] = []
        for size in self._sizes:
            if len(self._entries) >= size >= least and len(chosen := self._choose(size)) == size:
                return [self._remove(entry) for entry in chosen]
        if now < self._overdue_at() or len(chosen := self._choose(self._sizes[0])) < least:
            return []
        return [self._remove(entry) for entry in chosen]

    def due(self) -> float:
        """When `take` or `expire` will have something, if nothing comes before."""
        return min(self.expires_at(), self._overdue_at() if self._entries else math.inf)

    def expires_at(self) -> float:
        """When `expire` will have something."""
        while self._deadlines and self._entries.get((entry := self._deadlines[0][2]).item) is not entry:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else math.inf

    def _overdue_at(self) -> float:
        return next(iter(self._entries.values())).arrived + self._max_delay_s

    def _line_of(self, entry: _Entry[T]) -> _Line[T]:
        return self._lines[2 * entry.level + entry.late]

    def _remove(self, entry: _Entry[T]) -> Waiting[T]:
        del self._entries[entry.item]
        self._line_of(entry).remove(entry)
        return Waiting(entry.item, entry.arrived)

    def _choose(self, size: int) -> list[_Entry[T]]:
        """The largest batch around the first in line, of `size` at most."""
        chosen: list[_Entry[T]] = []
        lengths: list[int] = []
        for line in self._lines:
            if not line.by_length or len(chosen) == size:
                continue
            head = None
            if not chosen:
                head = line.first()
                chosen.append(head)
                lengths.append(head.length)
            for length, number in self._fitting(line, lengths, size - len(chosen), has_head=head is not None):
                others = (entry for entry in line.by_length[length].values() if entry is not head)
                chosen += islice(others, number)
                lengths += [length] * number
        return chosen

    def _fitting(
        self, line: _Line[T], chosen: Sequence[int], room: int, *, has_head: bool
    ) -> Iterable[tuple[int, int]]:
        """How many of which length go best with those that are chosen: as many as possible, then the least padding.

        They are neighbours in length: for each longest length, and each number of them, the longest below are tried.
        chosen: lengths of those that are in the batch; has_head: the only one is the first of this line.
        """
        lengths = sorted(line.by_length)
        counts = [len(line.by_length[length]) for length in lengths]
        if has_head:
            counts[lengths.index(chosen[0])] -= 1
        if not any(counts) or not room:
            return []
        if len({*lengths, *chosen}) == 1:
            return [(lengths[0], min(counts[0], room))]
        counts = [min(count, room) for count in counts]
        each = np.repeat(lengths, counts)  # one for each request, rising
        sums, ends = np.concatenate([[0], np.cumsum(each)]), np.cumsum(counts)
        more = np.arange(1, room + 1)
        first = ends[:, None] - more  # [lengths, room]: of the requests that are taken
        filled = sum(chosen) + sums[ends][:, None] - sums[np.maximum(first, 0)]
        padded = np.maximum(max(chosen), lengths)[:, None] * (len(chosen) + more)
        fits = (first >= 0) & (np.array(counts)[:, None] > 0) & (filled >= self._least_full * padded - 1e-9)
        if not fits.any():
            return []
        most = int(more[fits.any(0)].max())
        waste = np.where(fits[:, most - 1], padded[:, most - 1] - filled[:, most - 1], np.iinfo(np.int64).max)
        end = int(ends[int(np.argmin(waste))])
        taken, numbers = np.unique(each[end - most : end], return_counts=True)
        return list(zip(taken.tolist(), numbers.tolist(), strict=True))
