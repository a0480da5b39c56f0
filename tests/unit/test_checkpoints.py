"""What is read when, of sessions by row; states are their rows."""

import math
from typing import Any

import numpy as np
import pytest

from serve_app.engine.checkpoints import FAR, WITHIN_S, Checkpointer
from serve_app.engine.sessions import SessionTable

NOBODY = np.empty(0, np.int64)


class Reading:
    """See state_pool.Reading: what was in these slots."""

    def __init__(self, slots: np.ndarray) -> None:
        self.slots, self.is_here = slots, False

    def arrays(self) -> tuple[np.ndarray, ...]:
        return (self.slots * 10,)


class Pool:
    def __init__(self) -> None:
        self.readings: list[Reading] = []

    def read(self, slots: np.ndarray) -> Reading:
        self.readings.append(Reading(slots))
        return self.readings[-1]


class World:
    """Sessions of which each has run 7 timesteps; its slot is its row and 100; its epoch its row and 1."""

    def __init__(self, together: int, senders: list[int], apart_s: float = 0.0) -> None:
        self.pool, self.sessions = Pool(), SessionTable(len(senders), 4096)
        for epoch, sender in enumerate(senders, 1):
            assert self.sessions.open(epoch, f"s{epoch}", sender, 0.0, 0) == epoch - 1
        self.sessions.progress[:] = self.sessions.sent[:] = 7
        self.slot_of = np.arange(len(senders)) + 100
        pool: Any = self.pool
        self.checkpointer = Checkpointer(pool, self.sessions, len(senders), together, apart_s)

    def land(self) -> None:
        for reading in self.pool.readings:
            reading.is_here = True

    def taken(self, sender: int) -> dict[int, int]:
        """State by epoch, of all that can be taken."""
        found: dict[int, int] = {}
        while (kept := self.checkpointer.take(sender)) is not None:
            assert (kept.at == 7).all()
            found |= dict(zip(kept.epoch.tolist(), kept.state[0].tolist(), strict=True))
        return found


def test_they_are_read_together_or_after_a_while() -> None:
    world = World(3, [1] * 5)
    world.checkpointer.add(np.array([0, 1]), 10.0)
    world.checkpointer.add(np.array([1]), 11.0)
    assert world.checkpointer.read_at == 10.0 + WITHIN_S
    world.checkpointer.add(np.array([4]), 12.0)
    assert world.checkpointer.read_at < 0
    assert world.checkpointer.read(world.slot_of, [], 12.0) == 3
    assert world.checkpointer.read_at == np.inf
    assert world.taken(1) == {}, "they are on their way"
    world.land()
    assert world.taken(1) == {1: 1000, 2: 1010, 5: 1040}
    assert (world.sessions.checkpointed == [7, 7, 0, 0, 7]).all()


def test_those_of_a_session_are_some_time_apart() -> None:
    world = World(1, [1] * 3, apart_s=2.0)
    rows = np.arange(3)
    world.checkpointer.add(rows, 10.0)
    assert world.checkpointer.read(world.slot_of, [], 10.0) == 3
    world.sessions.progress[:] = world.sessions.sent[:] = 8
    world.sessions.progress[2] = world.sessions.sent[2] = 7 + FAR
    world.checkpointer.add(rows[:2], 11.0)
    assert world.checkpointer.read_at == 12.0 + WITHIN_S, "though nobody says again that they are due"
    world.checkpointer.add(rows, 11.0)
    assert world.checkpointer.read_at < 0
    assert world.checkpointer.read(world.slot_of, [], 11.0) == 1, "the one that has run far"
    assert world.checkpointer.read_at == 12.0 + WITHIN_S
    assert world.checkpointer.read(world.slot_of, [], world.checkpointer.read_at) == 2
    assert world.checkpointer.read_at == np.inf
    assert (world.sessions.checkpointed == [8, 8, 7 + FAR]).all()


def test_those_that_are_never_due_by_time_are_when_they_have_run_far() -> None:
    world = World(1, [1] * 2, apart_s=math.inf)
    world.sessions.progress[1] = world.sessions.sent[1] = FAR
    world.checkpointer.add(np.arange(2), 10.0)
    assert world.checkpointer.read(world.slot_of, [], 1e9) == 1
    assert (world.sessions.checkpointed == [0, FAR]).all()


def test_each_sender_gets_its_own() -> None:
    world = World(1, [1, 2, 2, 1, 3])
    world.checkpointer.add(np.arange(5), 0.0)
    world.checkpointer.read(world.slot_of, [], 0.0)
    assert len(world.pool.readings) == 1
    world.land()
    world.checkpointer.forget(3)
    assert [world.taken(sender) for sender in (2, 1, 3)] == [{2: 1010, 3: 1020}, {1: 1000, 4: 1030}, {}]
    assert world.checkpointer.num_slabs == 0


@pytest.mark.parametrize("why", ["unsent", "running", "no slot", "ended"])
def test_some_are_due_another_time(why: str) -> None:
    world = World(1, [1, 1])
    if why == "unsent":
        world.sessions.progress[0] = 8
    elif why == "no slot":
        world.slot_of[0] = -1
    elif why == "ended":
        world.sessions.end(0, "closed")
    world.checkpointer.add(np.array([0, 1]), 0.0)
    assert world.checkpointer.read(world.slot_of, [NOBODY, np.array([0])] if why == "running" else [], 0.0) == 1
    world.land()
    assert world.taken(1) == {2: 1010}
    assert world.sessions.checkpointed[0] == 0
    world.checkpointer.add(np.array([0]), 1.0)
    assert world.checkpointer.read_at < 0, "it can be due again"


def test_those_that_leave_their_slot_are_read_before() -> None:
    world = World(9, [1] * 4)
    world.checkpointer.add(np.array([1, 3]), 0.0)
    assert world.checkpointer.read_leaving(np.array([0, 2]), np.array([100, 102]), [], 0.0) == 0
    assert world.checkpointer.read_leaving(np.array([0, 3]), np.array([100, 103]), [], 0.0) == 1
    world.slot_of[3] = -1
    assert world.checkpointer.read(world.slot_of, [], 0.0) == 1
    world.land()
    assert world.taken(1) == {2: 1010, 4: 1030}


def test_one_that_is_due_later_is_due_at_once_when_it_has_run_far() -> None:
    world = World(2, [1] * 3, apart_s=10.0)
    rows = np.arange(3)
    world.checkpointer.add(rows, 10.0)
    assert world.checkpointer.read(world.slot_of, [], 10.0) == 3
    world.sessions.progress[:] = world.sessions.sent[:] = 107
    world.checkpointer.add(rows, 11.0)
    assert world.checkpointer.read_at == 20.0 + WITHIN_S
    world.sessions.progress[2] = world.sessions.sent[2] = 7 + FAR
    for _ in range(2):
        world.checkpointer.add(rows, 12.0)
        assert world.checkpointer.read_at == 12.0 + WITHIN_S, "it is one, however often it is said"
    assert world.checkpointer.read(world.slot_of, [], 12.0 + WITHIN_S) == 1
    assert (world.sessions.checkpointed == [7, 7, 7 + FAR]).all()
    assert world.checkpointer.read_at == 20.0 + WITHIN_S
    assert world.checkpointer.read(world.slot_of, [], 20.0 + WITHIN_S) == 2
    world.sessions.progress[:] = world.sessions.sent[:] = 107 + 2 * FAR
    world.checkpointer.add(rows, 21.0)
    assert world.checkpointer.read_at < 0, "two that are far are read at once"
