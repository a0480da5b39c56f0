"""Steps that are kept short for a delay target, with a clock of the test's own."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.scheduler import Scheduler
from serve_app.policy.delay import PATIENCE_S, StepTimes, step_limit_s

LIVE = 0
TIMESTEPS = (1, 2, 4, 8, 16)


@dataclass
class Bench:
    """A device whose steps take `fixed_s`, and `each_s` for every timestep; sessions after the first have many."""

    scheduler: Scheduler
    fixed_s: float = 0.5e-3
    each_s: float = 1e-3
    now: float = 100.0
    delays: list[float] = field(default_factory=list)  # from a timestep of LIVE to its output
    steps: list[int] = field(default_factory=list)

    def run(self, seconds: float, live_every_s: float = math.inf, live_timesteps: int = 1) -> None:
        until, due = self.now + seconds, self.now
        arrived: list[float] = []
        while self.now < until:
            while due <= self.now:
                self.scheduler.add(np.array([LIVE]), np.array([live_timesteps]), due)
                arrived.extend([due] * live_timesteps)
                due += live_every_s
            batch = self.scheduler.schedule(self.now)
            if batch is None:
                self.now = due
                continue
            took_s = self.fixed_s + self.each_s * batch.k
            self.scheduler.took(batch.k, len(batch.rows), took_s)
            self.now += took_s
            self.steps.append(batch.k)
            if LIVE in batch.rows:
                self.delays += [self.now - at for at in arrived[: batch.k]]
                del arrived[: batch.k]
            self.scheduler.check()


def bench(target_s: float, bulk: int, max_batch_size: int = 8) -> Bench:
    """With `bulk` sessions that never run out."""
    scheduler = Scheduler(max_batch_size, TIMESTEPS, bulk + 1, target_s)
    if bulk:
        scheduler.add(np.arange(1, bulk + 1), np.full(bulk, 10**6), 100.0)
    return Bench(scheduler)


@pytest.mark.parametrize("bulk", [1, 7, 20])
def test_a_live_session_meets_its_target_beside_sessions_with_many_timesteps(bulk: int) -> None:
    target_s = 20e-3
    free, bound = bench(0.0, bulk), bench(target_s, bulk)
    for each in (free, bound):
        each.run(1.0, live_every_s=30e-3)
        each.delays.clear()
        each.run(5.0, live_every_s=30e-3)
    assert max(free.delays) > target_s
    assert max(bound.delays) <= target_s
    assert sum(free.steps) > sum(bound.steps)  # what it costs


def test_steps_are_long_again_when_nobody_gains_by_short_ones() -> None:
    each = bench(20e-3, bulk=7)
    each.run(1.0, live_every_s=30e-3)
    assert max(each.steps[-20:]) < TIMESTEPS[-1]
    each.run(PATIENCE_S + 0.1)
    assert each.steps[-1] == TIMESTEPS[-1]
    each.run(1.0, live_every_s=30e-3)
    assert max(each.steps[-20:]) < TIMESTEPS[-1]


def test_live_sessions_that_short_steps_are_too_slow_for_catch_up_with_long_ones() -> None:
    """1.2 timesteps a step of one, so they pile up; with long steps there is time to spare."""
    each = bench(2e-3, bulk=0)
    each.fixed_s = 10e-3
    each.run(60.0, live_every_s=(10e-3 + 1e-3) / 1.2)
    assert max(each.steps) == TIMESTEPS[-1]
    assert each.scheduler.total < 1000  # all that arrives in PATIENCE_S and a little more


def test_a_target_that_cannot_be_met_has_the_shortest_steps() -> None:
    each = bench(1e-6, bulk=7)
    each.run(1.0, live_every_s=30e-3)
    each.steps.clear()
    each.run(1.0, live_every_s=30e-3)
    assert set(each.steps) == {1}


@given(st.floats(1e-4, 1), st.integers(0, 3), st.integers(1, 10_000), st.integers(1, 2048))
def test_all_steps_that_a_newcomer_waits_for_fit_into_the_target(
    target_s: float, in_flight: int, waiting: int, max_batch_size: int
) -> None:
    limit_s = step_limit_s(target_s, in_flight, waiting, max_batch_size)
    turns = in_flight + 1 + math.ceil(waiting / max_batch_size)
    assert limit_s * turns == pytest.approx(target_s)
    assert step_limit_s(0.0, in_flight, waiting, max_batch_size) == math.inf


def test_one_slow_step_does_not_stay() -> None:
    times = StepTimes(TIMESTEPS)
    times.add(16, 8, 9.0)  # the first, which set something up
    times.add(16, 16, 7.0)
    times.add(2, 7, 0.1)
    assert times.seconds[4, 3] == pytest.approx(0.8)
    assert times.seconds[4, 4] == 7.0  # of other batch sizes nothing is known
    times.add(2, 8, 0.2)
    assert 0.1 < times.seconds[1, 3] < 0.2
