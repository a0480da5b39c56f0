"""What waits for one sender: sessions with outputs to send, notices, and the calls that can carry them."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from serve_app.engine.outputs import OutputStore
from serve_app.engine.sessions import SessionTable
from serve_app.frame import Answer, Notice

MAX_WAITING = 3
"""Calls of one sender that wait for mail: one for each frame on its way, and one more. Others are answered at once."""

Ticket = object
"""What `Engine.receive` was given to name a call, and `Engine.answers` gives back."""


@dataclass(slots=True)
class Mailbox:
    """The mail of sender number `sender`. Outputs stay in the OutputStore; only rows are kept here."""

    sender: int
    marked: list[np.ndarray] = field(default_factory=list)
    notices: deque[Notice] = field(default_factory=deque)
    calls: deque[tuple[Ticket, float]] = field(default_factory=deque)  # with the time by which each is answered
    num_sessions: int = 0

    @property
    def has_mail(self) -> bool:
        """Whether there is something to tell. True once too often when sessions with outputs to send have ended."""
        return bool(self.marked or self.notices)

    def due(self, now: float) -> bool:
        """Whether the oldest call is to be answered. For a sender without sessions there is nothing to wait for."""
        waits = len(self.calls)
        return waits > 0 and (self.has_mail or waits > MAX_WAITING or self.num_sessions == 0 or self.calls[0][1] <= now)

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return not (self.num_sessions or self.calls or self.has_mail)

    def mark(self, rows: np.ndarray) -> None:
        """These rows (distinct) have outputs to send."""
        if len(rows):
            self.marked.append(rows)

    def write_answer(self, sessions: SessionTable, store: OutputStore, room: int) -> Answer:
        """All there is, up to `room` timesteps; what is left goes with a later call. Notices follow the last output."""
        rows = self._take_marked()
        epoch, due, rewind, _, _, start, progress, sender = sessions.numbers(rows)
        length = progress - start
        if not (here := (length > 0) & (sender == self.sender)).all():  # others were answered, or have ended
            rows, epoch, due, rewind, start, length = (
                column[here] for column in (rows, epoch, due, rewind, start, length)
            )
        if length.sum() > room:
            before = length.cumsum() - length
            fit = before < room
            given = np.minimum(length, room - before)
            self.mark(rows[given < length])
            rows, epoch, due, rewind, start, length = (
                column[fit] for column in (rows, epoch, due, rewind, start, given)
            )
        sessions.sent[rows] = start + length
        outputs = store.read_all(rows, start, length)
        notices: tuple[Notice, ...] = ()
        if not self.marked:
            notices = tuple(self.notices)
            self.notices.clear()
        return Answer(epoch, due, rewind, start, length, outputs, notices)

    def _take_marked(self) -> np.ndarray:
        """Each marked row once, in the order in which they were first marked; none is marked then."""
        marked, self.marked = self.marked, []
        if len(marked) == 1:
            return marked[0]
        rows = np.concatenate([np.empty(0, np.int64), *marked])
        _, first = np.unique(rows, return_index=True)
        return rows[np.sort(first)]
