"""What waits for one sender: sessions with outputs to send, notices, and the calls that can carry them."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

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
    """The mail of one sender. Outputs stay in the OutputStore; only rows are kept here."""

    rows: dict[int, None] = field(default_factory=dict)  # an ordered set
    notices: deque[Notice] = field(default_factory=deque)
    calls: deque[tuple[Ticket, float]] = field(default_factory=deque)  # with the time by which each is answered
    num_sessions: int = 0

    @property
    def has_mail(self) -> bool:
        """Whether there is something to tell."""
        return bool(self.rows or self.notices)

    def due(self, now: float) -> bool:
        """Whether the oldest call is to be answered. For a sender without sessions there is nothing to wait for."""
        waits = len(self.calls)
        return waits > 0 and (self.has_mail or waits > MAX_WAITING or self.num_sessions == 0 or self.calls[0][1] <= now)

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return not (self.num_sessions or self.calls or self.has_mail)

    def mark(self, rows: Iterable[int]) -> None:
        """These rows have outputs to send."""
        self.rows.update(dict.fromkeys(rows))

    def write_answer(self, sessions: SessionTable, store: OutputStore, room: int) -> Answer:
        """All there is, up to `room` timesteps; what is left goes with a later call. Notices follow the last output."""
        rows = np.fromiter(islice(self.rows, room), np.int64)
        start = sessions.sent[rows]
        length = sessions.progress[rows] - start
        if len(rows) == len(self.rows) and length.sum() <= room:
            self.rows.clear()
        else:
            before = length.cumsum() - length
            fit = before < room
            rows, start, length = rows[fit], start[fit], np.minimum(length, room - before)[fit]
            for row in rows[start + length == sessions.progress[rows]].tolist():
                del self.rows[row]
        sessions.sent[rows] = start + length
        outputs = store.read_all(rows, start, length)
        notices: tuple[Notice, ...] = ()
        if not self.rows:
            notices = tuple(self.notices)
            self.notices.clear()
        return Answer(sessions.epoch[rows], sessions.next[rows], sessions.rewind[rows], start, length, outputs, notices)
