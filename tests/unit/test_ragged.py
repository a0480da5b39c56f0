"""Steps whose sessions have different numbers of timesteps: how they are chosen, cut into parts, and undone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.runner import EagerRunner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.state_pool import StatePool
from serve_app.policy.batching import even_parts
from tests.fakes import SumModel

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(COUNTS)
def test_parts_have_each_timestep_once_and_in_order(counts: list[int]) -> None:
    done = [0] * len(counts)
    parts = list(even_parts(np.array(counts)))
    for members, at, k in parts:
        assert k > 0
        assert len(members) > 0
        for member, begin in zip(members.tolist(), at.tolist(), strict=True):
            assert done[member] == begin
            done[member] += k
    assert done == counts
    assert len(parts) <= 1 + (max(counts) - min(counts)).bit_length()


@given(COUNTS, st.integers(1, 8), st.integers(1, 12))
def test_who_has_waited_longest_runs_first_and_all_that_it_has(counts: list[int], batch: int, most: int) -> None:
    scheduler = Scheduler(batch, range(1, most + 1), len(counts))
    for row, count in enumerate(counts):
        scheduler.add(np.array([row]), np.array([count]), now=float(row))
    line, left, now = list(range(len(counts))), list(counts), len(counts)
    while line:
        found = scheduler.schedule(float(now), ragged=True)
        assert found is not None
        first, line = line[:batch], line[batch:]
        taken = [min(left[row], most) for row in first]
        assert found.rows.tolist() == first
        assert found.counts.tolist() == taken
        assert found.k == (taken[0] if len(set(taken)) == 1 else 0)
        assert found.timesteps == sum(taken)
        for row, count in zip(first, taken, strict=True):
            left[row] -= count
        line += [row for row in first if left[row]]
        scheduler.check()
    assert scheduler.schedule(float(now), ragged=True) is None


def test_a_step_that_fails_in_a_later_part_has_changed_nothing() -> None:
    model = SumModel(poison=0)
    pool = StatePool(model, 4, torch.device("cpu"))
    runner = EagerRunner(model, pool)
    slots, counts = np.array([2, 0, 1]), np.array([1, 2, 3])
    x = np.ones((counts.sum(), *model.input.shape), model.input.dtype)
    (before,) = runner.launch(x.reshape(-1).view(np.uint8), 0, slots, counts).outputs()
    x[-1] = -1
    with pytest.raises(RuntimeError, match="poisoned"):
        runner.launch(x.reshape(-1).view(np.uint8), 0, slots, counts)
    x[-1] = 1
    (after,) = runner.launch(x.reshape(-1).view(np.uint8), 0, slots, counts).outputs()
    total = np.repeat(counts, counts)[:, None]
    np.testing.assert_array_equal(after, before + total)
