"""Which session's state is in which slot. Pure; sessions are row numbers."""

from typing import NamedTuple

import numpy as np

from serve_app.compiled import array, compiled
from serve_app.policy.eviction import choose_victims


class Placement(NamedTuple):
    """What must happen to the state pool before a step: `evict_rows` leave, then `enter_*` get their slots.

    The last of the slots that are entered are those that are left. `used_at`: when a step last used one of them.
    """

    evict_rows: np.ndarray
    enter_rows: np.ndarray
    enter_slots: np.ndarray
    used_at: float = -np.inf


class SlotTable:
    """`num_slots` slots, lent to sessions. Every lending has a generation."""

    def __init__(self, num_slots: int, max_rows: int) -> None:
        #: Slot of each row, -1 without one; row of each slot, -1 when free.
        self.slot_of = np.full(max_rows, -1, np.int64)
        self.row_of = np.full(num_slots, -1, np.int64)
        #: How often each slot has been lent.
        self.generation = np.zeros(num_slots, np.int64)
        self._used_at = np.full(num_slots, -np.inf)
        #: A ring of the slots in the order of their last use, free ones first; slot `num_slots` is where it begins.
        around = np.arange(num_slots + 1)
        self._newer, self._older = np.roll(around, -1), np.roll(around, 1)
        self._moves = np.empty((3, num_slots), np.int64)

    def place(self, rows: np.ndarray, waiting: np.ndarray, now: float) -> Placement:
        """Give each of `rows` a slot, the longest free ones first, then those of sessions that can wait best.

        waiting [max_rows]: timesteps ready, by row. No more rows than slots may ask.
        """
        num_entering, num_evicted, used_at = _place(
            self.slot_of, self.row_of, self.generation, self._used_at, self._newer, self._older, array(rows), waiting,
            now, self._moves,
        )  # fmt: skip
        enter_rows, enter_slots, evict_rows = self._moves[:, :num_entering].copy()
        return Placement(evict_rows[num_entering - num_evicted :], enter_rows, enter_slots, used_at)

    def release(self, rows: np.ndarray) -> None:
        """Take the slots of `rows` back; rows without one are left alone."""
        _release(self.slot_of, self.row_of, self._newer, self._older, array(rows))

    @property
    def num_used(self) -> int:
        """Slots that are lent."""
        return int((self.row_of >= 0).sum())

    def check(self) -> None:
        """Assert what must always hold."""
        rows = np.flatnonzero(self.slot_of >= 0)
        assert (self.row_of[self.slot_of[rows]] == rows).all(), "a row's slot belongs to another"
        assert len(rows) == self.num_used, "a slot is lent to nobody"
        order = [len(self.row_of)]
        for _ in range(len(self.row_of)):
            order.append(int(self._newer[order[-1]]))
            assert self._older[order[-1]] == order[-2]
        assert sorted(order) == list(range(len(order))), "a slot is not in order"


@compiled
def _move(newer: np.ndarray, older: np.ndarray, slot: int, to_newest: bool) -> None:
    """Make a slot the newest in the order of use, or the oldest."""
    newer[older[slot]], older[newer[slot]] = newer[slot], older[slot]
    begin = len(newer) - 1
    before, after = (older[begin], begin) if to_newest else (begin, newer[begin])
    older[slot], newer[slot] = before, after
    newer[before] = older[after] = slot


@compiled
def _place(
    slot_of: np.ndarray,
    row_of: np.ndarray,
    generation: np.ndarray,
    used_at: np.ndarray,
    newer: np.ndarray,
    older: np.ndarray,
    rows: np.ndarray,
    waiting: np.ndarray,
    now: float,
    moves: np.ndarray,
) -> tuple[int, int, float]:
    """Fill `moves` with rows and slots that are entered, and rows that leave, at the same place as those who come."""
    enter_rows, enter_slots, evict_rows = moves[0], moves[1], moves[2]
    entering, evicted, last_used = 0, 0, -np.inf
    for row in rows:
        slot = slot_of[row]
        if slot >= 0:
            used_at[slot] = now
            _move(newer, older, slot, True)
        else:
            enter_rows[entering] = row
            entering += 1
    if entering:
        choose_victims(newer, row_of, waiting, len(row_of) - (len(rows) - entering), enter_slots[:entering])
    for i in range(entering):
        slot = enter_slots[i]
        last_used = max(last_used, used_at[slot])
        evict_rows[i] = row_of[slot]
        if row_of[slot] >= 0:
            slot_of[row_of[slot]] = -1
            evicted += 1
        slot_of[enter_rows[i]], row_of[slot] = slot, enter_rows[i]
        generation[slot] += 1
        used_at[slot] = now
        _move(newer, older, slot, True)
    return entering, evicted, last_used


@compiled
def _release(slot_of: np.ndarray, row_of: np.ndarray, newer: np.ndarray, older: np.ndarray, rows: np.ndarray) -> None:
    for row in rows:
        slot = slot_of[row]
        if slot >= 0:
            slot_of[row] = row_of[slot] = -1
            _move(newer, older, slot, False)
