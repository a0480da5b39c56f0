"""Which session's state is in which slot. Pure; sessions are row numbers."""

from typing import NamedTuple

import numpy as np

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
        self._num_free = num_slots

    def place(self, rows: np.ndarray, waiting: np.ndarray, now: float) -> Placement:
        """Give each of `rows` a slot, the lowest free ones first, then those of sessions that can wait best.

        waiting [max_rows]: timesteps ready, by row. No more rows than slots may ask.
        """
        enter = rows[self.slot_of[rows] < 0]
        if not len(enter):
            self._used_at[self.slot_of[rows]] = now
            return Placement(enter, enter, enter)
        free = evict_slots = enter[:0]
        if self._num_free:
            free = np.flatnonzero(self.row_of < 0)[: len(enter)]
        if len(free) < len(enter):
            # Neither free slots nor those of this step are to be chosen: as if used last of all.
            stay = np.concatenate([free, self.slot_of[rows[self.slot_of[rows] >= 0]]])
            last_used, busy = self._used_at.copy(), waiting[self.row_of] > 0
            last_used[stay], busy[stay] = np.inf, True
            evict_slots = choose_victims(last_used, busy, len(enter) - len(free))
        enter_slots = np.concatenate([free, evict_slots])
        used_at = float(self._used_at[enter_slots].max())
        placement = Placement(self.row_of[evict_slots], enter, enter_slots, used_at)
        self.release(placement.evict_rows)
        self._num_free -= len(enter)
        self.slot_of[enter] = placement.enter_slots
        self.row_of[placement.enter_slots] = enter
        self.generation[placement.enter_slots] += 1
        self._used_at[self.slot_of[rows]] = now
        return placement

    def release(self, rows: np.ndarray) -> None:
        """Take the slots of `rows` back; rows without one are left alone."""
        slots = self.slot_of[rows]
        slots = slots[slots >= 0]
        self._num_free += len(slots)
        self.row_of[slots] = -1
        self.slot_of[rows] = -1

    @property
    def num_used(self) -> int:
        """Slots that are lent."""
        return len(self.row_of) - self._num_free

    def check(self) -> None:
        """Assert what must always hold."""
        rows = np.flatnonzero(self.slot_of >= 0)
        assert (self.row_of[self.slot_of[rows]] == rows).all(), "a row's slot belongs to another"
        assert (self.row_of >= 0).sum() == len(rows) == self.num_used, "a slot is lent to nobody"
