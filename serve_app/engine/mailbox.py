"""What waits for one sender: sessions with outputs to send, notices, and the calls that can carry them."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from serve_app.engine.outputs import OutputStore
from serve_app.engine.sessions import SessionTable
from serve_app.frame import Answer, Notice
from serve_app.spec import ModelSpec

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

    @property
    def idle(self) -> bool:
        """Whether nobody would miss it."""
        return not (self.num_sessions or self.calls or self.has_mail)

    def mark(self, rows: Iterable[int]) -> None:
        """These rows have outputs to send."""
        self.rows.update(dict.fromkeys(rows))

    def write_answer(self, sessions: SessionTable, store: OutputStore, spec: ModelSpec, max_bytes: int) -> Answer:
        """All there is, up to about max_bytes; what is left goes with a later call. Notices follow the last output."""
        entries: list[tuple[int, ...]] = []  # epoch, next, rewind, start, length
        pieces: list[list[np.ndarray]] = []
        room = max(1, max_bytes // max(1, spec.output_bytes))  # timesteps
        while self.rows and room > 0:
            row = next(iter(self.rows))
            start = stop = int(sessions.sent[row])
            for piece in store.read(row, start):
                pieces.append(piece)
                stop += len(piece[0])
                if stop - start >= room:
                    break
            room -= stop - start
            sessions.sent[row] = stop
            if stop == sessions.progress[row]:
                del self.rows[row]
            numbers = (int(column[row]) for column in (sessions.epoch, sessions.next, sessions.rewind))
            entries.append((*numbers, start, stop - start))
        notices: tuple[Notice, ...] = ()
        if not self.rows:
            notices = tuple(self.notices)
            self.notices.clear()
        epoch, due, rewind, start_of, length = np.ascontiguousarray(np.array(entries, np.int64).reshape(-1, 5).T)
        outputs = {
            name: np.concatenate([piece[i] for piece in pieces]) if pieces else np.empty((0, *output.shape), output.dtype)
            for i, (name, output) in enumerate(spec.outputs.items())
        }
        return Answer(epoch, due, rewind, start_of, length, outputs, notices)
