"""What waits for one sender: sessions with outputs to send, notices, and the calls that can carry them."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from serve_app.engine.sessions import SessionTable
from serve_app.engine.timesteps import TimestepStore
from serve_app.frame import Answer, Checkpoints, Notice
from serve_app.spec import TensorSpec

MAX_WAITING = 3
"""Calls of one sender that wait for mail: one for each frame on its way, and one more. Others are answered at once."""

Ticket = object
"""What `Engine.receive` was given to name a call, and `Engine.answers` gives back."""


@dataclass(slots=True)
class Mailbox:
    """The mail of sender number `sender`. Outputs stay in the store; only rows are kept here."""

    sender: int
    marked: list[np.ndarray] = field(default_factory=list)
    notices: deque[Notice] = field(default_factory=deque)
    calls: deque[tuple[Ticket, float]] = field(default_factory=deque)  # with the time by which each is answered
    num_sessions: int = 0
    leaving: set[int] = field(default_factory=set)  # epochs of sessions to be given back with the next call

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

    @property
    def is_left(self) -> bool:
        """Whether its sender has nothing here, and does not call for what there is to tell."""
        return not (self.num_sessions or self.calls)

    def mark(self, rows: np.ndarray) -> None:
        """These rows (distinct) have outputs to send."""
        if len(rows):
            self.marked.append(rows)

    def write_answer(
        self,
        sessions: SessionTable,
        store: TimestepStore,
        specs: Mapping[str, TensorSpec],
        room: int,
        every: int,
        checkpoint: Callable[[int, np.ndarray], Checkpoints | None],
    ) -> Answer:
        """All there is, up to `room` timesteps; what is left goes with a later call. Notices follow the last output.

        store: the outputs, which are as `specs` says. checkpoint: takes this sender and its rows whose next is due,
        `every` so many timesteps (0: never); returns what there is for it, of these or earlier ones.
        """
        marked = self.marked or [np.empty(0, np.int64)]
        rows = marked[0] if len(marked) == 1 else np.concatenate(marked)
        unsent = sessions.take_unsent(rows, self.sender, room, every)
        self.marked = []
        self.mark(unsent.left)
        values = store.read(unsent.rows, unsent.start, unsent.length)
        outputs = {
            name: value.view(spec.dtype).reshape(-1, *spec.shape)
            for (name, spec), value in zip(specs.items(), values, strict=True)
        }
        notices: tuple[Notice, ...] = ()
        if self.notices and not self.marked:
            notices = tuple(self.notices)
            self.notices.clear()
        _, epoch, following, rewind, start, length, timing, _, due = unsent
        checkpoints = checkpoint(self.sender, due)
        return Answer(epoch, following, rewind, start, length, outputs, notices, timing, checkpoints)
