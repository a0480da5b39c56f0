"""The numbers of every session that this owner holds, and what becomes of a frame's entries. Pure.

A session's timesteps lie on one line: acked <= sent <= progress <= next. `acked`: the client holds the outputs below;
`sent`: an answer with the outputs below has left; `progress`: outputs exist; `next`: inputs are accepted. Of a session
that has come from elsewhere `began` is where it did: outputs below are not here, though they may not be acknowledged.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from serve_app.compiled import array, compiled, own_array
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    NotOwner,
    Overloaded,
    Rewound,
    SessionEnded,
    StartMismatch,
    TooManySessions,
    WindowFull,
)
from serve_app.frame import COLUMNS, NO_CLOSE, Frame
from serve_app.spec import TensorSpec

MAX_TOMBSTONES = 65536
EPOCH, NEXT, REWIND, CLOSE_AT, ACKED, SENT, PROGRESS, SENDER, WAITED, TOOK, TOGETHER, KEPT, BEGAN = range(13)
"""Columns of the table of all sessions."""
NEVER = -(2**40)
"""`checkpointed` of a session whose next checkpoint is due at once."""
OVER = -3
"""`close_at` of a session that does not run any more."""


class Status(IntEnum):
    """Of a row. ENDED: nothing runs any more, some outputs are not acknowledged yet."""

    FREE = 0
    OPEN = 1
    ENDED = 2


class Verdict(IntEnum):
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
    """By entry [n]: its row (-1: unknown), and below which timestep outputs are acknowledged.

    Those that bring timesteps to run, columns [m]: `take` timesteps of `running`, from `offset` of the frame's data on.

    `verdict` [n] is None where all is as it nearly always is: what comes next in sessions that are open, not closing.
    """

    rows: np.ndarray
    acked: np.ndarray
    running: np.ndarray
    offset: np.ndarray
    take: np.ndarray
    verdict: np.ndarray | None = None


class Advanced(NamedTuple):
    """Of the sessions of a step, those that are still there: which they were, their rows, and their first timesteps.

    `closing`: the rows of those that are to close now; `sender`: of all of them, -1 when there are several.
    """

    members: np.ndarray
    rows: np.ndarray
    starts: np.ndarray
    closing: np.ndarray
    sender: int


class Unsent(NamedTuple):
    """Outputs to be sent, columns [n]: `length` timesteps from `start` of each of `rows`; `left`: rows without room.

    timing [3, n]: us that they waited, us of their steps, sessions of the last of those. due: which [m] have all their
    outputs sent with this, and have run so far since the last checkpoint that the next is due.
    """

    rows: np.ndarray
    epoch: np.ndarray
    next: np.ndarray
    rewind: np.ndarray
    start: np.ndarray
    length: np.ndarray
    timing: np.ndarray
    left: np.ndarray
    due: np.ndarray


class SessionTable:
    """One row a session, up to `max_sessions`; a column for each number of it."""

    def __init__(self, max_sessions: int, max_window: int) -> None:
        self.max_sessions = max_sessions
        self.max_window = max_window
        self._table = np.zeros((max_sessions, 13), np.int64)
        self.epoch, self.next, self.rewind, self.close_at, *others = self._table.T
        self.acked, self.sent, self.progress, self.sender, *timing, self.checkpointed, self.began = others
        self._timing = timing  # of what was not sent: us of waiting and of steps, sessions of the last step
        self.status = np.zeros(max_sessions, np.int64)
        self.active_at = np.zeros(max_sessions)
        self.names: dict[int, str] = {}
        self.tombstones: OrderedDict[int, Tombstone] = OrderedDict()
        #: Rows by epoch: each lies at the low bits of its epoch or as near behind as there was a place, which are -1.
        self._row_near = np.full(1 << (4 * max_sessions - 1).bit_length(), -1, np.int64)
        self.epoch[:] = -1
        self._free: list[int] = []
        self._num_rows = 0  # rows ever used

    def holds(self, epoch: int) -> bool:
        """Whether the session of that epoch has a row."""
        return bool(_find(self._row_near, self._table, epoch) >= 0)

    def open(
        self, epoch: int, name: str, sender: int, now: float, start: int = 0, rewind: int = 0, acked: int = 0
    ) -> int:
        """A row for a session that begins here at `start`, after `rewind` failed steps; TooManySessions, SessionEnded.

        Its client has the outputs below `acked`, maybe more than that.
        """
        if epoch in self.tombstones:
            raise self.ended_error(epoch)
        if len(self.names) >= self.max_sessions:
            raise TooManySessions(
                f"{self.max_sessions} sessions are open, the limit of this replica: try again later, or raise "
                "session.max_sessions"
            )
        if self._free:
            row = self._free.pop()
        else:
            row = self._num_rows
            self._num_rows += 1
        for column in (self.next, self.progress, self.sent, self.began, self.checkpointed):
            column[row] = start
        self.acked[row] = min(acked, start)
        for column in self._timing:
            column[row] = 0
        self.rewind[row] = rewind
        self.epoch[row], self.close_at[row], self.sender[row] = epoch, NO_CLOSE, sender
        self.active_at[row], self.status[row] = now, Status.OPEN
        self.names[row] = name
        _insert(self._row_near, self._table, row)
        return row

    def adopt(self, row: int, epoch: int, sender: int, acked: int, now: float) -> None:
        """The session of a row goes on under another epoch, for a sender who has the outputs below `acked`."""
        _remove(self._row_near, self._table, row)
        self.epoch[row], self.sender[row], self.active_at[row] = epoch, sender, now
        _insert(self._row_near, self._table, row)
        self.acked[row] = self.sent[row] = max(int(self.acked[row]), min(acked, int(self.progress[row])))
        self.checkpointed[row] = NEVER

    def row_of(self, epoch: int) -> int:
        """The row of a session, -1 when it has none."""
        return int(_find(self._row_near, self._table, epoch))

    def accept(self, frame: Frame, now: float, room: int) -> Accepted:
        """Judge every entry of a frame, which `check_frame` has seen, and move the numbers of those that are taken.

        room: timesteps of outputs that there is still space for, in all sessions together.
        """
        rows, acked, verdict, running, offset, take = found = np.empty((6, len(frame)), np.int64)
        count, usual = _accept(
            own_array(frame.columns), self._row_near, self._table, self.status, self.active_at, now, room,
            self.max_window, found,
        )  # fmt: skip
        return Accepted(rows, acked, running[:count], offset[:count], take[:count], None if usual else verdict)

    def advance(
        self, rows: np.ndarray, epochs: np.ndarray, counts: np.ndarray, waited_us: np.ndarray, took_us: int, now: float
    ) -> Advanced:
        """Sessions [B] have run `counts` timesteps; who has ended since, or whose row has another, is left out."""
        members, running, starts, closing = found = np.empty((4, len(rows)), np.int64)
        count, num_closing, sender = _advance(
            self._table, self.active_at, array(rows), array(epochs), array(counts), array(waited_us), took_us, now,
            found,
        )  # fmt: skip
        return Advanced(members[:count], running[:count], starts[:count], closing[:num_closing], sender)

    def take_unsent(self, rows: np.ndarray, sender: int, room: int, every: int) -> Unsent:
        """What `rows` of this sender have computed and not sent, up to `room` timesteps: it is sent now.

        every: timesteps after which a session's next checkpoint is due; 0: never.
        """
        found = np.empty((10, len(rows)), np.int64)
        count, looked_at, due = _take_unsent(self._table, array(rows), sender, room, every, found)
        running, epoch, following, rewind, start, length, *_ = found[:, :count]
        left = rows[looked_at:]
        return Unsent(running, epoch, following, rewind, start, length, found[6:9, :count], left, found[9, :due])

    def running(self, rows: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Which of `rows` [B] still have the session of that epoch, and run it."""
        there: np.ndarray = (self.epoch[rows] == epochs) & (self.close_at[rows] != OVER)
        return there

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
                    f"limit is {self.max_window}: read outputs first, or raise session.max_window_timesteps and "
                    "engine.max_retained_bytes",
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
        del self.names[row]
        _remove(self._row_near, self._table, row)
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

    def has_all_acked(self, row: int) -> bool:
        """Whether the client has all outputs that there are."""
        return bool(self.acked[row] >= self.progress[row])

    @property
    def num_open(self) -> int:
        """Sessions that are open."""
        return int((self.status[: self._num_rows] == Status.OPEN).sum())

    def check(self) -> None:
        """Assert what must always hold."""
        held = np.array(list(self.names), np.int64)
        assert set(held.tolist()) == set(np.flatnonzero(self.status != Status.FREE).tolist())
        assert [_find(self._row_near, self._table, epoch) for epoch in self.epoch[held].tolist()] == held.tolist()
        assert (self._row_near >= 0).sum() == len(held)
        assert (self.acked[held] <= self.sent[held]).all(), "acknowledged before sent"
        assert (self.sent[held] <= self.progress[held]).all(), "sent before computed"
        assert (self.progress[held] <= self.next[held]).all(), "computed before accepted"
        assert (self.next[held] - self.acked[held] <= self.max_window).all(), "window exceeded"


def check_frame(frame: Frame, spec: TensorSpec) -> None:
    """Raise InvalidInput unless the columns belong together and the data fits the model's input."""
    columns, x = frame.columns, frame.x
    if columns.dtype != np.int64 or columns.ndim != 2 or len(columns) != len(COLUMNS):
        raise InvalidInput(f"frame columns are {columns.dtype} {columns.shape}, expected int64 ({len(COLUMNS)}, n)")
    total, rising = _check_columns(own_array(columns), len(x))
    if total == NEGATIVE:
        raise InvalidInput("a frame with a negative epoch, start or length arrived")
    if total == TOO_LONG:
        raise InvalidInput(f"a frame with {len(x)} timesteps has an entry of {frame.length.max()}")
    if x.shape != (total, *spec.shape) or x.dtype != spec.dtype:
        raise InvalidInput(f"frame data is {x.dtype} {x.shape}, expected {spec.dtype} {(total, *spec.shape)}")
    if not rising and _repeats(array(frame.epoch)):
        raise InvalidInput("a frame names a session twice: send its timesteps as one entry")


NEGATIVE, TOO_LONG = -1, -2
"""What `_check_columns` says instead of how many timesteps there are."""


@compiled
def _check_columns(columns: np.ndarray, limit: int) -> tuple[int, bool]:
    """How many timesteps a frame has, and whether its epochs rise."""
    total, rising = 0, True
    for i in range(columns.shape[1]):
        length, epoch, start = columns[0, i], columns[1, i], columns[2, i]
        if length < 0 or epoch < 0 or start < 0:
            return NEGATIVE, False
        if length > limit:
            return TOO_LONG, False
        total += length
        rising = rising and (i == 0 or epoch > columns[1, i - 1])
    return total, rising


@compiled
def _repeats(epochs: np.ndarray) -> bool:
    """Whether one is there twice."""
    size = 2
    while size < 2 * len(epochs):
        size *= 2
    seen = np.full(size, -1)  # each at its low bits or the first free place behind
    for epoch in epochs:
        place = epoch & (size - 1)
        while seen[place] >= 0:
            if seen[place] == epoch:
                return True
            place = (place + 1) & (size - 1)
        seen[place] = epoch
    return False


@compiled
def _find(row_near: np.ndarray, table: np.ndarray, epoch: int) -> int:
    """The row of an epoch, -1 when there is none."""
    place = epoch & (len(row_near) - 1)
    row: int = row_near[place]
    while row >= 0 and table[row, EPOCH] != epoch:
        place = (place + 1) & (len(row_near) - 1)
        row = row_near[place]
    return row


@compiled
def _insert(row_near: np.ndarray, table: np.ndarray, row: int) -> None:
    place = table[row, EPOCH] & (len(row_near) - 1)
    while row_near[place] >= 0:
        place = (place + 1) & (len(row_near) - 1)
    row_near[place] = row


@compiled
def _remove(row_near: np.ndarray, table: np.ndarray, row: int) -> None:
    """Empty the place of a row; others behind it move up as near to their own as they can."""
    mask = len(row_near) - 1
    place = table[row, EPOCH] & mask
    while row_near[place] != row:
        place = (place + 1) & mask
    behind = place
    while True:
        behind = (behind + 1) & mask
        other = row_near[behind]
        if other < 0:
            break
        if (behind - table[other, EPOCH]) & mask >= (behind - place) & mask:
            row_near[place] = other
            place = behind
    row_near[place] = -1


@compiled
def _accept(
    columns: np.ndarray,
    row_near: np.ndarray,
    table: np.ndarray,
    status: np.ndarray,
    active_at: np.ndarray,
    now: float,
    room: int,
    max_window: int,
    found: np.ndarray,
) -> tuple[int, bool]:
    """Fill `found` with what Accepted has; returns how many run, and whether all is usual."""
    for i in range(columns.shape[1]):  # on its own, so that many are looked up at once
        found[0, i] = _find(row_near, table, columns[1, i])
    end, running, usual = 0, 0, True
    for i in range(columns.shape[1]):
        length, start = columns[0, i], columns[2, i]
        rewind, close, acked = columns[3, i], columns[4, i], columns[5, i]
        offset = end
        end += length
        row = found[0, i]
        if row < 0:
            found[1, i], found[2, i], usual = 0, Verdict.UNKNOWN.value, False
            continue
        line = table[row]
        line[ACKED] = max(line[ACKED], min(acked, line[PROGRESS]))
        line[SENT] = max(line[SENT], line[ACKED])
        due, close_at = line[NEXT], line[CLOSE_AT]
        usual = usual and start == due and rewind == line[REWIND] and close == NO_CLOSE == close_at
        skip = min(max(due - start, 0), length)
        take = length - skip
        closing = close >= 0
        brings = length > 0 or closing
        if brings and status[row] != Status.OPEN:
            verdict = Verdict.ENDED
        elif brings and rewind != line[REWIND]:
            verdict = Verdict.REWOUND
        elif length > 0 and start > due:
            verdict = Verdict.AHEAD
        elif take > 0 and close_at >= 0 and due + take > close_at:
            verdict = Verdict.CLOSING
        elif closing and close < due + take:
            verdict = Verdict.CLOSE_BEHIND
        elif take > room:
            verdict = Verdict.OVERLOADED
        elif take > 0 and due + take - line[ACKED] > max_window:
            verdict = Verdict.WINDOW_FULL
        else:
            verdict = Verdict.OK
            room -= take
            line[NEXT] += take
            line[SENT] = max(min(line[SENT], start), line[ACKED], line[BEGAN])  # a resend is answered again
            if brings:
                active_at[row] = now
            if closing:
                line[CLOSE_AT] = close
            if take > 0:
                found[3, running], found[4, running], found[5, running] = row, offset + skip, take
                running += 1
        found[1, i], found[2, i], usual = line[ACKED], verdict.value, usual and verdict == Verdict.OK
    return running, usual


@compiled
def _advance(
    table: np.ndarray,
    active_at: np.ndarray,
    rows: np.ndarray,
    epochs: np.ndarray,
    counts: np.ndarray,
    waited_us: np.ndarray,
    took_us: int,
    now: float,
    found: np.ndarray,
) -> tuple[int, int, int]:
    """Fill `found` with the columns of Advanced; returns how many there are, how many close, and the sender."""
    count, closing, sender = 0, 0, -1
    for i in range(len(rows)):
        row = rows[i]
        line = table[row]
        if line[EPOCH] != epochs[i] or line[CLOSE_AT] == OVER:
            continue
        sender = line[SENDER] if count == 0 or sender == line[SENDER] else -1
        found[:3, count] = i, row, line[PROGRESS]
        count += 1
        line[PROGRESS] += counts[i]
        line[WAITED] += waited_us[i]
        line[TOOK] += took_us
        line[TOGETHER] = len(rows)
        active_at[row] = now
        if line[PROGRESS] == line[CLOSE_AT]:
            found[3, closing] = row
            closing += 1
    return count, closing, sender


@compiled
def _take_unsent(
    table: np.ndarray, rows: np.ndarray, sender: int, room: int, every: int, found: np.ndarray
) -> tuple[int, int, int]:
    """Fill `found` with the columns of Unsent; returns how many there are, rows that need no further, and are due."""
    count, due = 0, 0
    for i in range(len(rows)):
        line = table[rows[i]]
        start = line[SENT]
        length = line[PROGRESS] - start
        if line[SENDER] != sender or length <= 0:
            continue
        given = min(length, room)
        if given > 0:
            found[:6, count] = rows[i], line[EPOCH], line[NEXT], line[REWIND], start, given
            found[6:9, count] = line[WAITED], line[TOOK], line[TOGETHER]
            line[WAITED] = line[TOOK] = 0
            count += 1
        line[SENT] += given
        room -= given
        if given < length:
            return count, i, due
        if every and line[PROGRESS] - line[KEPT] >= every and line[CLOSE_AT] != OVER:
            found[9, due] = rows[i]
            due += 1
    return count, len(rows), due
