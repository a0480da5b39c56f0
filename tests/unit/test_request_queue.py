"""Which requests go together, and when."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.errors import InvalidInput, Overloaded
from serve_app.policy.request_queue import Level, RequestQueue


def taken(queue: RequestQueue[str], now: float) -> str:
    """The next batch: items are single letters."""
    return "".join(waiting.item for waiting in queue.take(now))


def test_without_a_delay_whatever_is_there_goes_at_once() -> None:
    queue = RequestQueue[str](3)
    queue.add("abcde", [1] * 5, now=0)
    assert [taken(queue, 0) for _ in range(3)] == ["abc", "de", ""]
    assert queue.due() == math.inf


def test_with_a_delay_it_waits_for_a_full_batch_or_its_time() -> None:
    queue = RequestQueue[str](3, max_delay_s=2)
    queue.add("a", [1], now=0)
    queue.add("b", [1], now=1)
    assert (taken(queue, 1), queue.due()) == ("", 2)
    queue.add("c", [1], now=1.5)
    assert taken(queue, 1.5) == "abc"
    queue.add("d", [1], now=5)
    assert (taken(queue, 6.9), taken(queue, 7)) == ("", "d")


def test_a_preferred_size_goes_at_once() -> None:
    queue = RequestQueue[str](8, preferred_sizes=[2, 4], max_delay_s=10)
    queue.add("abcdefg", [1] * 7, now=0)
    assert [taken(queue, 0) for _ in range(3)] == ["abcd", "ef", ""]
    assert taken(queue, 10) == "g"


def test_others_of_like_length_join_the_first_in_line() -> None:
    queue = RequestQueue[str](3, max_padding=0.25)
    for item, length in (("a", 10), ("b", 100), ("c", 11), ("d", 90), ("e", 12), ("f", 10)):
        queue.add(item, [length], now=0)
    assert [sorted(taken(queue, 0)) for _ in range(3)] == [["a", "c", "f"], ["b", "d"], ["e"]]


def test_a_short_one_may_join_many_long_ones() -> None:
    """The bound is on the batch: 9 of 50 are padding."""
    queue = RequestQueue[str](5, max_padding=0.2)
    queue.add("a", [1], now=0)
    queue.add("bcde", [10] * 4, now=0)
    assert taken(queue, 0) == "abcde"


def test_high_priority_first_then_what_fits() -> None:
    queue = RequestQueue[str](3, levels=[Level(), Level()], max_padding=0.3)
    queue.add("ab", [8] * 2, now=0, priority=2)
    queue.add("c", [10], now=1, priority=1)
    queue.add("d", [100], now=2, priority=1)
    assert [taken(queue, 2) for _ in range(3)] == ["cab", "d", ""]


def test_a_full_queue_refuses_all_of_a_request() -> None:
    queue = RequestQueue[str](8, levels=[Level(max_size=3), Level()])
    queue.add("ab", [1] * 2, now=0)
    with pytest.raises(Overloaded, match="2 rows of priority 1 wait, the limit is 3: try again later"):
        queue.add("cd", [1] * 2, now=0)
    with pytest.raises(InvalidInput, match="4 rows of priority 1 came at once, 3 may wait: send fewer"):
        queue.add("cdef", [1] * 4, now=0)
    queue.add("cd", [1] * 2, now=0, priority=2)
    queue.cancel("a")
    queue.add("ef", [1] * 2, now=0)
    assert taken(queue, 0) == "befcd"


def test_what_waits_too_long_is_refused_or_goes_behind() -> None:
    queue = RequestQueue[str](1, levels=[Level(timeout_s=5), Level(timeout_s=1, delays=True)])
    queue.add("a", [1], now=0)
    queue.add("b", [1], now=0, timeout_s=2)
    queue.add("c", [1], now=0, timeout_s=20)  # not longer than others
    queue.add("x", [1], now=0, priority=2)
    queue.add("y", [1], now=2, priority=2)
    assert [w.item for w in queue.expire(2)] == ["b"]
    assert [w.item for w in queue.expire(5)] == ["a", "c"]
    queue.add("z", [1], now=5, priority=2)
    assert [taken(queue, 5) for _ in range(3)] == ["z", "x", "y"]


@dataclass(slots=True)
class Request:
    number: int
    length: int
    priority: int
    arrived: float
    deadline: float
    end: str = ""
    late: bool = False


@dataclass
class Book:
    """Keeps the queue's books: what is where, and that every rule holds."""

    queue: RequestQueue[int]
    levels: Sequence[Level]
    sizes: set[int]
    max_delay_s: float
    max_padding: float
    all: list[Request] = field(default_factory=list)
    now: float = 0.0

    def waiting(self, priority: int | None = None) -> list[Request]:
        return [r for r in self.all if not r.end and priority in (None, r.priority)]

    def add(self, count: int, length: int, priority: int, timeout_s: float) -> None:
        level, numbers = self.levels[priority - 1], range(len(self.all), len(self.all) + count)
        fits = not level.max_size or len(self.waiting(priority)) + count <= level.max_size
        try:
            self.queue.add(numbers, [length] * count, self.now, priority, timeout_s)
        except Overloaded:
            assert not fits and count <= level.max_size
            return
        except InvalidInput:
            assert 0 < level.max_size < count
            return
        assert fits
        deadline = self.now + min(level.timeout_s or math.inf, timeout_s or math.inf)
        self.all += [Request(number, length, priority, self.now, deadline) for number in numbers]

    def cancel(self, request: Request) -> None:
        self.queue.cancel(request.number)
        request.end = request.end or "cancelled"

    def take(self) -> int:
        """Refuse what is too late, then take batches while there are any."""
        due, count = self.queue.due(), 0
        expired = {waiting.item for waiting in self.queue.expire(self.now)}
        for request in self.waiting():
            if request.deadline <= self.now and not request.late:
                if self.levels[request.priority - 1].delays:
                    request.late = True
                else:
                    assert request.number in expired
                    request.end = "refused"
        assert expired == {r.number for r in self.all if r.end == "refused" and r.number in expired}
        while batch := self.queue.take(self.now):
            count += 1
            self.check([self.all[waiting.item] for waiting in batch])
        assert count or expired or due > self.now or any(r.late for r in self.waiting()) or not self.waiting()
        return count

    def check(self, batch: list[Request]) -> None:
        waiting = self.waiting()
        assert all(not request.end for request in batch), "taken twice"
        assert len({request.number for request in batch}) == len(batch)
        overdue = min(request.arrived for request in waiting) + self.max_delay_s <= self.now
        assert len(batch) in self.sizes or (overdue and len(batch) < max(self.sizes))
        longest = max(request.length for request in batch)
        assert sum(request.length for request in batch) >= (1 - self.max_padding) * longest * len(batch) - 1e-6
        assert min(waiting, key=lambda r: (r.priority, r.late, r.deadline if r.late else 0, r.number)) in batch, (
            "the first in line has to wait"
        )
        for request in batch:
            request.end = "taken"
        for left in self.waiting():
            for request in batch:
                alike = (left.priority, left.late, left.length) == (request.priority, request.late, request.length)
                if alike and not left.late:
                    assert request.number < left.number, "one overtook another"


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    max_batch_size=st.integers(1, 12),
    preferred=st.lists(st.integers(1, 12), max_size=3),
    max_delay_s=st.sampled_from([0.0, 1.0, 5.0]),
    max_padding=st.sampled_from([0.0, 0.1, 0.3, 0.9]),
    levels=st.lists(
        st.builds(Level, st.sampled_from([0, 5, 20]), st.sampled_from([0.0, 2.0, 8.0]), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    lengths=st.sampled_from([1, 4, 50]),
)
def test_nothing_is_lost_doubled_overtaken_or_padded_too_much(
    seed: int,
    max_batch_size: int,
    preferred: list[int],
    max_delay_s: float,
    max_padding: float,
    levels: list[Level],
    lengths: int,
) -> None:
    rng, preferred = random.Random(seed), [size for size in preferred if size <= max_batch_size]
    queue = RequestQueue[int](
        max_batch_size, preferred_sizes=preferred, max_delay_s=max_delay_s, max_padding=max_padding, levels=levels
    )
    book = Book(queue, levels, {max_batch_size, *preferred}, max_delay_s, max_padding)
    for _ in range(rng.randint(1, 60)):
        match rng.randint(0, 5):
            case 0 | 1 | 2:
                timeout_s = rng.choice([0.0, 0.0, 3.0])
                book.add(rng.randint(1, 6), rng.randint(1, lengths), rng.randint(1, len(levels)), timeout_s)
            case 3 if book.all:
                book.cancel(rng.choice(book.all))
            case 4:
                book.take()
            case _:
                book.now += rng.choice([0.5, 1.0, 4.0])
        assert len(queue) == len(book.waiting())
    while book.waiting():  # what is left goes by itself, at the times that the queue says
        book.now = max(book.now, queue.due())
        assert book.now < math.inf
        before = len(book.waiting())
        assert book.take() or len(book.waiting()) < before or any(r.late for r in book.waiting())
    assert len(queue) == 0
    assert {request.end for request in book.all} <= {"taken", "refused", "cancelled"}


def test_the_least_padding_of_the_largest_batches() -> None:
    """Of many there are, those nearest in length."""
    rng = random.Random(0)
    queue = RequestQueue[int](32, max_padding=0.5)
    lengths = [rng.randint(1, 128) for _ in range(4096)]
    for number, length in enumerate(lengths):
        queue.add([number], [length], now=0)
    padded = 0
    while batch := queue.take(0):
        padded += len(batch) * max(lengths[waiting.item] for waiting in batch)
    assert sum(lengths) / padded > 0.97
