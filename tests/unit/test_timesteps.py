"""The store of timesteps against plain lists."""

import random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine import timesteps
from serve_app.engine.timesteps import TimestepStore

ROWS = 12
WIDTHS = 16, 8


def values_of(numbers: np.ndarray) -> list[np.ndarray]:
    """Two tensors of timesteps that are called `numbers` [N]: [N, 2] and [N]."""
    return [np.stack([numbers, -numbers], -1), numbers]


def read(store: TimestepStore, rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> list[int]:
    pairs, numbers = (found.view(np.int64) for found in store.read(rows, starts, counts))
    assert pairs.tolist() == [sign * number for number in numbers.tolist() for sign in (1, -1)]
    return list(numbers.tolist())


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0, 2**20]))
def test_what_is_read_is_what_was_added(seed: int, compacts: bool, worth_threads: int) -> None:
    """Blocks of any members in any order with gaps between, read from anywhere and in both orders, dropped anyhow."""
    rng = random.Random(seed)
    store = TimestepStore(WIDTHS, ROWS, compacts=compacts)
    held: list[list[int]] = [[] for _ in range(ROWS)]
    starts, ends, number = np.zeros(ROWS, np.int64), np.zeros(ROWS, np.int64), 0
    with mock.patch.object(timesteps, "WORTH_THREADS", worth_threads):
        for _ in range(50):
            rows = np.array(rng.sample(range(ROWS), rng.randint(1, ROWS)))
            counts = np.array([rng.choice([2, 2, 2, rng.randint(1, 4)]) for _ in rows])
            gap = rng.choice([0, 0, 1])  # timesteps that were refused
            numbers = np.arange((counts + gap).sum()) + number
            number += len(numbers)
            offsets = (counts + gap).cumsum() - counts
            store.add(values_of(numbers), rows, ends[rows], offsets, counts)
            ends[rows] += counts
            for row, offset, count in zip(rows.tolist(), offsets, counts, strict=True):
                held[row] += numbers[offset : offset + count].tolist()

            rows = np.array(rng.choice([rows.tolist(), rng.sample(range(ROWS), rng.randint(0, ROWS))]), np.int64)
            skips = [rng.choice([0, 0, rng.randint(0, len(held[row]))]) for row in rows]
            lengths = [
                rng.choice([len(held[row]), rng.randint(0, len(held[row]))]) - skip
                for row, skip in zip(rows, skips, strict=True)
            ]
            lengths = [max(0, length) for length in lengths]
            due = [held[row][skip : skip + length] for row, skip, length in zip(rows, skips, lengths, strict=True)]
            at = starts[rows] + np.array(skips, np.int64)
            assert read(store, rows, at, np.array(lengths, np.int64)) == [n for each in due for n in each]

            k = rng.randint(1, 3)
            ready = np.array([row for row in rows if len(held[row]) >= k], np.int64)
            plan = store.plan(ready, np.zeros_like(ready), np.full(len(ready), k), across=len(ready))
            found = np.zeros(8 * k * len(ready), np.uint8)
            store.copy(plan, 1, found, across=len(ready))
            assert found.view(np.int64).reshape(k, -1).T.tolist() == [held[row][:k] for row in ready]

            rows = np.array(rng.sample(range(ROWS), rng.randint(0, ROWS)), np.int64)
            drops = np.array([rng.choice([0, 1, len(held[row]), 2 * len(held[row])]) for row in rows], np.int64)
            match rng.randrange(3):
                case 0:
                    store.drop_first(rows, drops)
                case 1:
                    store.drop_below(rows, starts[rows] + drops)
                case _:
                    store.drop(rows)
                    drops = ends[rows] - starts[rows]
            for row, drop in zip(rows, drops.tolist(), strict=True):
                starts[row] += len(held[row][:drop])
                del held[row][:drop]
            store.check()
            assert [store.holds(row) for row in range(ROWS)] == [bool(each) for each in held]
            assert store.timesteps == sum(map(len, held))
    store.drop(np.arange(ROWS))
    store.check()
    assert (store.timesteps, store.nbytes) == (0, 0)


def test_what_lies_in_order_is_not_copied() -> None:
    store = TimestepStore(WIDTHS, ROWS, compacts=True)
    rows, counts = np.array([3, 1, 2]), np.array([4, 4, 4])
    values = values_of(np.arange(12))
    store.add(values, rows, counts * 0, np.array([0, 4, 8]), counts)
    for found, value in zip(store.read(rows, counts * 0, counts), values, strict=True):
        assert np.shares_memory(found, value)
    for found, value in zip(store.read(rows[1:], counts[1:] * 0, counts[1:]), values, strict=True):
        assert np.shares_memory(found, value)
    for found, value in zip(store.read(rows[::-1], counts * 0, counts), values, strict=True):
        assert not np.shares_memory(found, value)
    store.drop_below(rows, np.array([4, 4, 0]))
    (found, _) = store.read(rows[2:], counts[2:] * 0, counts[2:])
    assert found.view(np.int64)[::2].tolist() == [8, 9, 10, 11]
    assert not np.shares_memory(found, values[0]), "a third of a block keeps all of it"


@pytest.mark.parametrize("compacts", [True, False])
def test_memory_is_at_most_twice_what_is_needed_where_it_is_compacted(compacts: bool) -> None:
    store, rows = TimestepStore([8], 64, compacts=compacts), np.arange(64)
    store.add([rows.repeat(3)], rows, rows * 0, 3 * rows, rows * 0 + 3)
    for kept in (64, 31, 31, 12, 5, 1):
        store.drop_below(rows[kept:], np.full(64 - kept, 3))
        (found,) = store.read(rows[:kept], rows[:kept] * 0, rows[:kept] * 0 + 3)
        assert found.view(np.int64).tolist() == rows[:kept].repeat(3).tolist()
        assert store.nbytes <= 2 * kept * 3 * 8 if compacts else store.nbytes == 64 * 3 * 8
        store.check()


def test_as_many_blocks_as_a_window_has_are_dropped_at_once() -> None:
    store, rows, blocks = TimestepStore([8], 4, compacts=True), np.array([2, 0]), 4096
    for t in range(blocks):
        store.add([np.full(2, t)], rows, np.full(2, t), np.array([0, 1]), np.ones(2, np.int64))
    store.drop_below(rows, np.array([blocks, blocks - 1]))
    assert (store.holds(2), store.holds(0), store.timesteps) == (False, True, 1)
    assert store.read(rows[1:], np.array([0]), np.array([1]))[0].view(np.int64).tolist() == [blocks - 1]
