"""The store of outputs against a plain dictionary."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.outputs import OutputStore
from serve_app.spec import TensorSpec

ROWS = 12
SPECS = {"a": TensorSpec((2,), "int64"), "b": TensorSpec((), "int64")}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_what_is_read_is_what_was_appended(seed: int) -> None:
    """Steps of any members and lengths, reads from anywhere of what is held, acknowledgements, sessions dropped."""
    rng = random.Random(seed)
    store = OutputStore(SPECS, ROWS)
    progress, acked = np.zeros((2, ROWS), np.int64)
    for _ in range(60):
        rows = np.array(rng.sample(range(ROWS), rng.randint(1, ROWS)))
        k = rng.randint(1, 4)
        timesteps = progress[rows][:, None] + np.arange(k)
        b = timesteps * 1000 + rows[:, None]
        store.append(rows, progress[rows], [np.stack([b, -b], -1), b])
        progress[rows] += k

        rows = np.array(rng.sample(range(ROWS), rng.randint(0, ROWS)), np.int64)
        if rng.random() < 0.5:  # as an answer reads: all that is held
            starts, lengths = acked[rows], progress[rows] - acked[rows]
        else:
            starts = np.array([rng.randint(acked[row], progress[row]) for row in rows], np.int64)
            lengths = np.array([rng.randint(0, progress[row] - start) for row, start in zip(rows, starts, strict=True)])
            lengths = lengths.astype(np.int64)
        due = [t * 1000 + row for row, at, n in zip(rows, starts, lengths, strict=True) for t in range(at, at + n)]
        found = store.read_all(rows, starts, lengths)
        assert found["b"].tolist() == due
        assert found["a"].tolist() == [[value, -value] for value in due]

        rows = np.array(rng.sample(range(ROWS), rng.randint(0, ROWS)), np.int64)
        acked[rows] = [rng.choice([acked[row], progress[row], rng.randint(acked[row], progress[row])]) for row in rows]
        store.ack(rows, acked[rows])
        if rng.random() < 0.2:
            row = rng.randrange(ROWS)
            store.drop(row)
            progress[row] = acked[row] = 0
        assert [store.holds(row) for row in range(ROWS)] == (acked < progress).tolist()
        assert store.timesteps >= (progress - acked).sum()
    for row in range(ROWS):
        store.drop(row)
    assert store.timesteps == 0
    assert not store._slabs
    assert not store._later


def test_a_slab_is_compacted_more_than_once() -> None:
    store = OutputStore({"b": TensorSpec((), "int64")}, 64)
    rows = np.arange(64)
    store.append(rows, rows * 0, [rows[:, None].repeat(3, 1)])
    for kept in (64, 31, 31, 12, 5, 1):
        store.ack(rows[kept:], np.full(64 - kept, 3))
        left = rows[:kept]
        assert store.read_all(left, left * 0, left * 0 + 3)["b"].tolist() == left.repeat(3).tolist()
        assert sum(value.nbytes for slab in store._slabs.values() for value in slab.values) <= 2 * kept * 3 * 8


def test_as_many_steps_as_a_window_has_are_acknowledged_at_once() -> None:
    store = OutputStore({"b": TensorSpec((), "int64")}, 4)
    rows, steps = np.array([2, 0]), 4096
    for t in range(steps):
        store.append(rows, np.full(2, t), [np.full((2, 1), t)])
    store.ack(rows, np.array([steps, steps - 1]))
    assert (store.holds(2), store.holds(0), store.timesteps) == (False, True, 1)
    assert [piece[0].tolist() for piece in store.read(0, 0)] == [[steps - 1]]


def test_an_acknowledgement_of_nothing_leaves_a_step_whole() -> None:
    store = OutputStore({"b": TensorSpec((), "int64")}, 8)
    rows, values = np.array([5, 1, 3]), np.arange(6).reshape(3, 2)
    store.append(rows, rows * 0, [values])
    store.ack(rows[:2], np.array([1, 0]))
    found = store.read_all(rows, rows * 0, rows * 0 + 2)["b"]
    assert found.tolist() == values.ravel().tolist()
    assert np.shares_memory(found, values)
