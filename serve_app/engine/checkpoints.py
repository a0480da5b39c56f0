"""Checkpoints: states of sessions, read many at a time beside the steps, for the answers to their senders."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from serve_app.engine.sessions import SessionTable, Status
from serve_app.engine.state_pool import Reading, StatePool
from serve_app.frame import Checkpoints

WITHIN_S = 0.05
"""One that is due waits so long for others."""
FAR = 4096
"""Timesteps since the last, after which the next is due however short a time that was: senders retain all of them."""
LONG_AGO = -1e18
"""When a session was read that never was: with any number of seconds on top, even an infinite one, it is a time."""


class Checkpointer:
    """Reads the states of sessions that are due, known by their rows: `together` of them at once, or after WITHIN_S.

    Those of a session at least `apart_s` one after the other, unless it has run FAR meanwhile.
    Whose step is on its way, or who has outputs that were not sent, is not read: it is due again with its next outputs.
    """

    def __init__(
        self, pool: StatePool, sessions: SessionTable, max_rows: int, together: int, apart_s: float = 0.0
    ) -> None:
        self._pool = pool
        self._sessions = sessions
        self._together = together
        self._due: list[np.ndarray] = []
        self._is_due, self._busy = np.zeros((2, max_rows), np.bool_)
        self._num_ready = 0  # of those, by now
        self._apart_s = apart_s
        self._read_at, self._due_at = np.full((2, max_rows), LONG_AGO)
        self._slabs: list[_Slab] = []
        #: When those that are due are to be read.
        self.read_at = math.inf

    def add(self, rows: np.ndarray, now: float) -> None:
        """These (distinct) are due; they may be already, and are by now where they have run FAR meanwhile."""
        if not len(rows):
            return
        is_far = self._sessions.progress[rows] - self._sessions.checkpointed[rows] >= FAR
        is_due = self._is_due[rows]
        changes = ~is_due | (is_far & (self._due_at[rows] > now))
        if changes.any():
            self._due.append(rows[~is_due])
            rows, is_far = rows[changes], is_far[changes]
            self._is_due[rows] = True
            due_at = self._due_at[rows] = np.maximum(now, np.where(is_far, now, self._read_at[rows] + self._apart_s))
            self._num_ready += int((due_at <= now).sum())
            self._look_at(due_at)

    def _look_at(self, due_at: np.ndarray) -> None:
        """`read` is to be called for those."""
        soon = float(due_at.min(initial=math.inf)) + WITHIN_S
        self.read_at = -math.inf if self._num_ready >= self._together else min(self.read_at, soon)

    def read(self, slot_of: np.ndarray, on_their_way: Iterable[np.ndarray], now: float) -> int:
        """Start reading all that are due by now and have a slot; returns how many.

        slot_of [max_rows]; on_their_way: the rows of each step that is.
        """
        rows = np.concatenate(self._due)
        is_ready = self._due_at[rows] <= now
        later, rows = rows[~is_ready], rows[is_ready]
        self._due = [later]
        self._is_due[rows] = False
        self._num_ready, self.read_at = 0, math.inf
        self._look_at(self._due_at[later])
        rows = rows[slot_of[rows] >= 0]
        return len(self._read(rows, slot_of[rows], on_their_way, now))

    def read_leaving(self, rows: np.ndarray, slots: np.ndarray, on_their_way: Iterable[np.ndarray], now: float) -> int:
        """Start reading those of `rows` that are due, in whose `slots` others come next; returns how many."""
        due = self._is_due[rows]
        return len(self._read(rows[due], slots[due], on_their_way, now)) if due.any() else 0

    def read_wanted(
        self,
        rows: np.ndarray,
        slot_of: np.ndarray,
        page_of: np.ndarray,
        on_their_way: Iterable[np.ndarray],
        now: float,
    ) -> np.ndarray:
        """Start reading those of `rows` that can be; returns which.

        slot_of, page_of [max_rows]: where states are.
        """
        busy = list(on_their_way)
        in_slots, in_pages = rows[slot_of[rows] >= 0], rows[page_of[rows] >= 0]
        return np.concatenate(
            [
                self._read(in_slots, slot_of[in_slots], busy, now, is_wanted=True),
                self._read(in_pages, page_of[in_pages], busy, now, is_wanted=True, in_pages=True),
            ]
        )

    def is_awaited(self, sender: int) -> bool:
        """Whether some are there that were wanted, and not taken yet."""
        return any(slab.is_wanted and slab.sender == sender and slab.states.is_here for slab in self._slabs)

    def take(self, sender: int) -> Checkpoints | None:
        """The oldest of a sender's that have been read."""
        for i, (of, epochs, at, which, states, _) in enumerate(self._slabs):
            if of == sender and states.is_here:
                del self._slabs[i]
                leaves = states.arrays()
                return Checkpoints(
                    epochs, at, leaves if len(epochs) == len(leaves[0]) else tuple(leaf[which] for leaf in leaves)
                )
        return None

    def forget(self, sender: int) -> None:
        """Nobody takes that sender's any more."""
        self._slabs = [slab for slab in self._slabs if slab.sender != sender]

    @property
    def num_slabs(self) -> int:
        """What has been read, or is being read, and not taken."""
        return len(self._slabs)

    def _read(
        self,
        rows: np.ndarray,
        slots: np.ndarray,
        on_their_way: Iterable[np.ndarray],
        now: float,
        *,
        is_wanted: bool = False,
        in_pages: bool = False,
    ) -> np.ndarray:
        sessions = self._sessions
        busy = list(on_their_way)
        for each in busy:
            self._busy[each] = True
        here = (
            (sessions.sent[rows] == sessions.progress[rows])
            & (sessions.status[rows] == Status.OPEN)
            & ~self._busy[rows]
        )
        for each in busy:
            self._busy[each] = False
        rows, slots = rows[here], slots[here]
        if not len(rows):
            return rows
        sessions.checkpointed[rows], self._read_at[rows] = sessions.progress[rows], now
        states = self._pool.read_pages(slots) if in_pages else self._pool.read(slots)
        senders = sessions.sender[rows]
        for sender in np.unique(senders).tolist():
            which = np.flatnonzero(senders == sender)
            of = rows[which]
            self._slabs.append(_Slab(sender, sessions.epoch[of], sessions.progress[of], which, states, is_wanted))
        return rows


class _Slab(NamedTuple):
    """States of sessions of one sender, known by their epochs [n], at timesteps [n]: rows `which` [n] of `states`."""

    sender: int
    epochs: np.ndarray
    at: np.ndarray
    which: np.ndarray
    states: Reading
    is_wanted: bool
