"""The store of inputs against plain lists."""

import random
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine import inputs
from serve_app.engine.inputs import InputStore

ROWS = 12


def buffer(k: int, batch: int) -> np.ndarray:
    return np.full((k, batch, 2), -1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0, 2**20]))
def test_what_is_taken_is_what_was_added(seed: int, views: bool, worth_threads: int) -> None:
    """Frames of any members in any order with gaps between, steps of some that have enough, sessions dropped."""
    rng = random.Random(seed)
    store = InputStore(ROWS)
    waiting: dict[int, list[list[int]]] = {row: [] for row in range(ROWS)}
    number = 0
    with mock.patch.object(inputs, "WORTH_THREADS", worth_threads):
        for _ in range(40):
            rows = np.array(rng.sample(range(ROWS), rng.randint(1, ROWS)))
            counts = np.array([rng.choice([2, 2, 2, rng.randint(1, 4)]) for _ in rows])
            gap = rng.choice([0, 0, 1])  # timesteps that were refused
            x = np.arange(2 * (counts + gap).sum()).reshape(-1, 2) + number
            number += x.size
            offsets = (counts + gap).cumsum() - counts
            x.flags.writeable = False
            store.add(x, rows, offsets, counts)
            for row, offset, count in zip(rows.tolist(), offsets, counts, strict=True):
                waiting[row] += x[offset : offset + count].tolist()

            k = rng.randint(1, 4)
            ready = [row for row in rng.choice([rows.tolist(), range(ROWS)]) if len(waiting[row]) >= k]
            if ready:
                found = store.take(np.array(ready), k, buffer, views)
                assert found.shape == (k, len(ready), 2)
                assert found.swapaxes(0, 1).tolist() == [waiting[row][:k] for row in ready]
                for row in ready:
                    del waiting[row][:k]
            if rng.random() < 0.2:
                row = rng.randrange(ROWS)
                store.drop(np.array([row]))
                waiting[row].clear()
        for row, left in waiting.items():
            if left:
                assert store.take(np.array([row]), len(left), buffer, views)[:, 0].tolist() == left
    assert store.nbytes == 0
    assert not store._blocks
    assert not store._later


def test_a_frame_in_its_order_is_not_copied() -> None:
    store = InputStore(ROWS)
    x = np.arange(24).reshape(12, 2)
    rows = np.array([3, 1, 2])
    store.add(x, rows, np.array([0, 4, 8]), np.array([4, 4, 4]))
    assert np.shares_memory(store.take(rows, 4, buffer, views=True), x)
    store.add(x, rows, np.array([0, 4, 8]), np.array([4, 4, 4]))
    assert not np.shares_memory(store.take(rows[::-1], 4, buffer, views=True), x)
