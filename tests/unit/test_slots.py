"""Slots: everyone in a step gets one, and who leaves is who can wait best."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.slots import SlotTable

ROWS, SLOTS = 20, 6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_any_steps(seed: int) -> None:
    """`held` is what lies in the slots, moved as the placements say; times repeat."""
    rng = random.Random(seed)
    table = SlotTable(SLOTS, ROWS)
    held: dict[int, int] = {}  # slot -> row
    used_at: dict[int, int] = {}  # by row
    for now in sorted(rng.randrange(30) for _ in range(60)):
        rows = rng.sample(range(ROWS), rng.randint(1, SLOTS))
        waiting = np.array([rng.choice([0, 0, 1]) for _ in range(ROWS)])
        idle_before = {row for row in held.values() if row not in rows and not waiting[row]}
        placement = table.place(np.array(rows), waiting, now)
        evicted, entered = placement.evict_rows.tolist(), placement.enter_rows.tolist()
        slots = placement.enter_slots.tolist()
        assert set(entered) == set(rows) - set(held.values())
        assert not set(evicted) & set(rows)
        assert len(evicted) == max(0, len(entered) - (SLOTS - len(held)))
        for slot, row in zip(slots[len(slots) - len(evicted) :], evicted, strict=True):
            assert held.pop(slot) == row
        if any(waiting[row] for row in evicted):
            assert idle_before <= set(evicted), "one that waits left before one that does not"
        left_idle = [used_at[row] for row in evicted if not waiting[row]]
        stay_idle = [used_at[row] for row in idle_before - set(evicted)]
        assert not left_idle or not stay_idle or max(left_idle) <= min(stay_idle)
        assert not set(slots) & set(held), "a slot was lent twice"
        held |= dict(zip(slots, entered, strict=True))
        used_at |= dict.fromkeys(rows, now)
        if rng.random() < 0.3:
            table.release(np.array(rows[:2]))
            held = {slot: row for slot, row in held.items() if row not in rows[:2]}
        assert {slot: row for slot, row in enumerate(table.row_of.tolist()) if row >= 0} == held
        table.check()
