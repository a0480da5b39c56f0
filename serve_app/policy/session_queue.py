"""Which of the sessions that wait for a place is next: by priority, then by how long they have waited.

Nobody is called when a place is free: who waits asks again and again. So it need not say that it gives up, and nothing
is lost when whoever keeps the queue starts again. A place that is free is kept for the first in line, until that asks
or is gone. Pure: time comes in as `now`, in seconds.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ASK_AGAIN_S = 0.2
GONE_AFTER_S = 1.0
"""Who has not asked for so long waits no more."""
MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Of the sessions of a model. `max_waiting`: how many wait at most, the last of the lowest priority are refused.

    `max_wait_s`: how long one waits (0: not at all). `default_priority`: of those that say none.
    """

    max_waiting: int = 1024
    max_wait_s: float = 0.0
    default_priority: int = 1


NO_QUEUE = QueueLimits()


Waiter = tuple[str, str]
"""A session, and its sender."""


class SessionQueue:
    """Those who wait for a place of one model."""

    def __init__(self) -> None:
        self._line: list[tuple[int, float, Waiter]] = []  # in order: priority, since when
        self._places: OrderedDict[Waiter, tuple[tuple[int, float, Waiter], float]] = OrderedDict()  # by when they asked

    def __len__(self) -> int:
        return len(self._line)

    def ask(self, who: Waiter, priority: int, waited_s: float, now: float) -> int:
        """How many are before `who`, which waits from its first call on. waited_s: how long it says it does."""
        self.forget_gone(now)
        place, _ = self._places.get(who, (None, now))
        if place is None:
            place = priority, now - waited_s, who
            insort(self._line, place)
        self._places[who] = place, now
        self._places.move_to_end(who)
        return bisect_left(self._line, place)

    def leave(self, who: Waiter) -> None:
        """It waits no more; no error where it does not."""
        place, _ = self._places.pop(who, (None, 0.0))
        if place is not None:
            del self._line[bisect_left(self._line, place)]

    def forget_gone(self, now: float) -> None:
        """Who has not asked for a while waits no more."""
        while self._places:
            who, (_, asked_at) = next(iter(self._places.items()))
            if now - asked_at <= GONE_AFTER_S:
                break
            self.leave(who)

    def check(self) -> None:
        """Assert what must always hold."""
        assert self._line == sorted(place for place, _ in self._places.values())
        asked = [asked_at for _, asked_at in self._places.values()]
        assert asked == sorted(asked)


def retry_after_s(freed: Sequence[float], ahead: int, now: float) -> float:
    """In how many seconds there may be a place for one with so many before it.

    freed: when the last places became free, the earliest first.
    """
    if not freed:
        return 1.0
    each = (now - freed[0]) / len(freed)
    return min(MAX_RETRY_AFTER_S, max(1.0, (ahead + 1) * each))
