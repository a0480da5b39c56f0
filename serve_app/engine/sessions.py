"""The numbers of every session that this owner holds, and what becomes of a frame's entries. Pure.

A session's timesteps lie on one line: acked <= sent <= progress <= next. `acked`: the client holds the outputs below;
`sent`: an answer with the outputs below has left; `progress`: outputs exist; `next`: inputs are accepted.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serve_app.errors import (
    LockstepError,
    NotOwner,
    Overloaded,
    Rewound,
    SessionEnded,
    StartMismatch,
    TooManySessions,
    WindowFull,
)
from serve_app.frame import NO_CLOSE, Frame

MAX_TOMBSTONES = 65536


OVER = -3
"""`close_at` of a session that does not run any more."""


class Status:
    """Of a row. ENDED: nothing runs any more, some outputs are not acknowledged yet. (numpy is slow with an Enum.)"""

    FREE = 0
    OPEN = 1
    ENDED = 2


class Verdict:
    """What becomes of a frame's entry: taken, or why not."""

    OK = 0
    UNKNOWN = 1
    ENDED = 2
    REWOUND = 3
    AHEAD = 4
    CLOSING = 5
    CLOSE_BEHIND = 6
    OVERLOADED = 7
    WINDOW_FULL = 8


@dataclass(frozen=True, slots=True)
class Tombstone:
    """What is remembered of a session that is gone."""

    reason: str
    progress: int


class Accepted(NamedTuple):
    """By entry [n]: its row (-1: unknown), where in the frame's data it goes on, timesteps to run, and what is acked.

    `verdict` is None where all is as it nearly always is: what comes next in sessions that are open and not closing.
    """

    rows: np.ndarray
    offset: np.ndarray
    take: np.ndarray
    acked: np.ndarray
    verdict: np.ndarray | None = None


class SessionTable:
    """One row a session, up to `max_sessions`; a column for each number of it."""

    def __init__(self, max_sessions: int, max_window: int) -> None:
        self.max_sessions = max_sessions
        self.max_window = max_window
        #: What most is done with, together for each row: see `numbers`. The first four are what a frame has to name.
        self._table = np.zeros((max_sessions, 8), np.int64)
        self.epoch, self.next, self.rewind, self.close_at, *others = self._table.T
        self.acked, self.sent, self.progress, self.sender = others
        self.status = np.zeros(max_sessions, np.int64)
        self.active_at = np.zeros(max_sessions)
        self.names: dict[int, str] = {}
        self.tombstones: OrderedDict[int, Tombstone] = OrderedDict()
        self._row_of: dict[int, int] = {}
        #: The same for most sessions, by the low bits of the epoch: rows of many at once.
        self._row_near = np.zeros(1 << (4 * max_sessions - 1).bit_length(), np.int64)
        self.epoch[:] = -1
        self._free: list[int] = []
        self._num_rows = 0  # rows ever used

    def holds(self, epoch: int) -> bool:
        """Whether the session of that epoch has a row."""
        return epoch in self._row_of

    def open(self, epoch: int, name: str, sender: int, now: float) -> int:
        """A row for a new session. Raises TooManySessions, SessionEnded."""
        if epoch in self.tombstones:
            raise self.ended_error(epoch)
        if len(self._row_of) >= self.max_sessions:
            raise TooManySessions(
                f"{self.max_sessions} sessions are open, the limit of this replica: try again later, or raise "
                "session.max_sessions"
            )
        if self._free:
            row = self._free.pop()
        else:
            row = self._num_rows
            self._num_rows += 1
        for column in (self.next, self.progress, self.sent, self.acked, self.rewind):
            column[row] = 0
        self.epoch[row], self.close_at[row], self.sender[row] = epoch, NO_CLOSE, sender
        self.active_at[row], self.status[row] = now, Status.OPEN
        self.names[row], self._row_of[epoch] = name, row
        self._row_near[epoch % len(self._row_near)] = row
        return row

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """A copy [8, n]: epoch, next, rewind, close_at, acked, sent, progress and sender of each row."""
        return self._table.take(rows, 0).T

    def accept(self, frame: Frame, now: float, room: int) -> Accepted:
        """Judge every entry of a frame and move the numbers of those that are taken.

        room: timesteps of outputs that there is still space for, in all sessions together.
        """
        length = frame.length
        ends = length.cumsum()
        rows = self._row_near[frame.epoch & (len(self._row_near) - 1)]
        numbers = self._table.take(rows, 0)
        due, acked, sent, progress = numbers[:, 1], numbers[:, 4], numbers[:, 5], numbers[:, 6]
        usual = (frame.columns[1:5] == numbers[:, :4].T).all() and (frame.close == NO_CLOSE).all()
        due += length
        np.maximum(acked, np.minimum(frame.acked, progress), out=acked)
        np.maximum(sent, acked, out=sent)
        if len(rows) and not (usual and ends[-1] <= room and (due - acked).max() <= self.max_window):
            return self._judge(frame, self._rows_of(frame.epoch), ends - length, now, room)
        self._table[rows] = numbers
        self.active_at[rows if length.all() else rows[length > 0]] = now
        return Accepted(rows, ends - length, length, acked)

    def _rows_of(self, epochs: np.ndarray) -> np.ndarray:
        """The row of each epoch, -1 where there is none."""
        rows: np.ndarray = self._row_near[epochs % len(self._row_near)]
        for i in (self.epoch[rows] != epochs).nonzero()[0].tolist():
            rows[i] = self._row_of.get(int(epochs[i]), -1)
        return rows

    def _judge(self, frame: Frame, rows: np.ndarray, offset: np.ndarray, now: float, room: int) -> Accepted:
        known = rows >= 0
        held = rows[known]
        self.acked[held] = np.maximum(self.acked[held], np.minimum(frame.acked[known], self.progress[held]))
        self.sent[held] = np.maximum(self.sent[held], self.acked[held])
        due = self.next[rows]
        skip = np.minimum(np.maximum(due - frame.start, 0), frame.length)
        take = frame.length - skip
        runs, after, closing = take > 0, due + take, frame.close >= 0
        brings = (frame.length > 0) | closing
        close_at = self.close_at[rows]
        verdict = np.zeros(len(rows), np.int64)
        for reason, applies in (  # the last that applies stands
            (Verdict.WINDOW_FULL, runs & (after - self.acked[rows] > self.max_window)),
            (Verdict.OVERLOADED, runs & (take.cumsum() > room)),
            (Verdict.CLOSE_BEHIND, closing & (frame.close < after)),
            (Verdict.CLOSING, runs & (close_at >= 0) & (after > close_at)),
            (Verdict.AHEAD, (frame.length > 0) & (frame.start > due)),
            (Verdict.REWOUND, brings & (frame.rewind != self.rewind[rows])),
            (Verdict.ENDED, brings & (self.status[rows] != Status.OPEN)),
            (Verdict.UNKNOWN, ~known),
        ):
            verdict[applies] = reason
        good = verdict == Verdict.OK
        take[~good] = 0
        ok, start = rows[good], frame.start[good]
        self.next[ok] += take[good]
        self.sent[ok] = np.maximum(np.minimum(self.sent[ok], start), self.acked[ok])  # a resend is answered again
        self.active_at[rows[good & brings]] = now
        closes = good & closing
        self.close_at[rows[closes]] = frame.close[closes]
        return Accepted(rows, offset + skip, take, self.acked[rows], verdict)

    def refusal(self, verdict: int, frame: Frame, i: int, row: int) -> LockstepError:
        """The error for entry i of a frame, whose verdict is not OK."""
        epoch, start = int(frame.epoch[i]), int(frame.start[i])
        if verdict == Verdict.UNKNOWN:
            return NotOwner(f"no session with epoch {epoch} is here: ask the directory who owns it")
        name, due = self.names[row], int(self.next[row])
        expected = {"expected": due, "rewind": int(self.rewind[row])}
        match verdict:
            case Verdict.ENDED:
                return SessionEnded(f"session {name!r} has ended: open a new one", progress=int(self.progress[row]))
            case Verdict.REWOUND:
                return Rewound(
                    f"session {name!r} was rewound to timestep {due} by a failed step: resend from {due}", **expected
                )
            case Verdict.AHEAD:
                return StartMismatch(
                    f"a segment of session {name!r} starts at {start}, {due} was expected: resend from {due}",
                    **expected,
                )
            case Verdict.CLOSING:
                at = int(self.close_at[row])
                return SessionEnded(f"session {name!r} closes at timestep {at}: nothing further is taken", progress=at)
            case Verdict.CLOSE_BEHIND:
                at = int(frame.close[i])
                return StartMismatch(f"close of session {name!r} at timestep {at}, {due} are accepted", **expected)
            case Verdict.OVERLOADED:
                return Overloaded(
                    "the replica is full (engine.max_pending_bytes, engine.max_retained_bytes): try again later",
                    **expected,
                )
            case _:
                return WindowFull(
                    f"session {name!r} has {due - int(self.acked[row])} timesteps accepted and not acknowledged, the "
                    f"limit is {self.max_window}: read outputs first, or raise session.max_window_timesteps",
                    **expected,
                )

    def fail(self, rows: np.ndarray) -> None:
        """A step of `rows` failed: they are where they were before it, and what was accepted beyond is forgotten."""
        self.next[rows] = self.progress[rows]
        self.rewind[rows] += 1
        self.close_at[rows] = NO_CLOSE

    def due_to_close(self, rows: np.ndarray) -> np.ndarray:
        """Which of `rows` have run everything up to where they close."""
        due: np.ndarray = rows[self.progress[rows] == self.close_at[rows]]
        return due

    def idle_since(self, before: float) -> np.ndarray:
        """Rows, of whatever status, that were last active before `before` and have nothing to run."""
        live = slice(0, self._num_rows)
        old = (self.status[live] != Status.FREE) & (self.active_at[live] < before)
        return np.flatnonzero(old & (self.next[live] == self.progress[live]))

    def end(self, row: int, reason: str) -> None:
        """Nothing runs for the session any more; `free` follows when its outputs are acknowledged or given up."""
        self.status[row] = Status.ENDED
        self.next[row], self.close_at[row] = self.progress[row], OVER
        epoch = int(self.epoch[row])
        self.tombstones[epoch] = Tombstone(reason, int(self.progress[row]))
        if len(self.tombstones) > MAX_TOMBSTONES:
            self.tombstones.popitem(last=False)

    def free(self, row: int) -> None:
        """Give the row of an ended session to the next."""
        del self._row_of[int(self.epoch[row])], self.names[row]
        self.status[row], self.epoch[row] = Status.FREE, -1
        self.next[row] = self.progress[row] = self.sent[row] = self.acked[row] = 0
        self._free.append(row)

    def ended_error(self, epoch: int) -> SessionEnded:
        """The error for a session that only a tombstone remembers."""
        stone = self.tombstones[epoch]
        return SessionEnded(
            f"the session has ended ({stone.reason}) at timestep {stone.progress}: open a new one",
            reason=stone.reason,
            progress=stone.progress,
        )

    @property
    def num_open(self) -> int:
        """Sessions that are open."""
        return int((self.status[: self._num_rows] == Status.OPEN).sum())

    def check(self) -> None:
        """Assert what must always hold."""
        held = np.array(list(self._row_of.values()), np.int64)
        assert set(held.tolist()) == set(np.flatnonzero(self.status != Status.FREE).tolist())
        assert (self.acked[held] <= self.sent[held]).all(), "acknowledged before sent"
        assert (self.sent[held] <= self.progress[held]).all(), "sent before computed"
        assert (self.progress[held] <= self.next[held]).all(), "computed before accepted"
        assert (self.next[held] - self.acked[held] <= self.max_window).all(), "window exceeded"
