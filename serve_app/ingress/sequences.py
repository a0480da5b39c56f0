"""Sequences of the Open Inference Protocol, as sessions: clients name them, and send start and end with the inputs.

A sequence id means something within a space: a stream's own, that of a client who has a name, or the one that all
others share. Requests of a sequence run and are answered in order; sequences do not wait for each other.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from serve_app.directory import Turn
from serve_app.errors import InvalidInput, LockstepError, SessionEnded, SessionExists, TimedOut, TooLate, WindowFull
from serve_app.ingress.hub import Hub
from serve_app.segment import Timing
from serve_app.session import Session

SequenceId = int | str
MAX_EARLY = 4096
"""Timesteps of a sequence that may wait for its session to open."""


class Request(NamedTuple):
    """Timesteps x [T, *features] of a sequence; T may be 0 where it ends.

    priority: of the whole sequence, from 1, the highest (0: not said). deadline: by when it is to be answered, on the
    monotonic clock. notice: with its start, whether to tell of an end that the client has not asked for.
    """

    model: str
    sequence: SequenceId
    start: bool
    end: bool
    x: np.ndarray
    priority: int = 0
    deadline: float = math.inf
    notice: bool = False


class Result(NamedTuple):
    """The outputs of a request's timesteps, each [T, *shape]."""

    values: dict[str, np.ndarray]
    timing: Timing


Reply = Callable[[Result | LockstepError], None]
"""Called once, on the event loop, with what came of a request."""
Notice = Callable[[LockstepError], None]
"""Called once, on the event loop, when a sequence has ended in another way than by its last request."""


class Space:
    """Sequences by model and id. `name` is None for the one that is shared: a sequence there is nobody's to restart."""

    def __init__(self, hub: Hub, name: str | None) -> None:
        self._hub = hub
        self._name = name
        self._sequences: dict[tuple[str, SequenceId], Sequence] = {}

    def ask(self, request: Request, reply: Reply, stream: object = None, notice: Notice | None = None) -> None:
        """Run a request; `reply` gets its outputs, or the error. Raises WindowFull: ask again after `room`.

        stream: what the request came with; while that lasts, no other takes its sequences, and `notice` is called, if
        the request asks for that. When the request's deadline passes, a sequence that still waits for a place is over
        (TimedOut). One that runs goes on, with the timesteps of this request, whose outputs nobody gets (TooLate):
        those that follow need the state after them.
        """
        key = request.model, request.sequence
        sequence = self._sequences.get(key)
        if sequence is not None and sequence.stream not in (None, stream):
            reply(
                SessionExists(
                    f"sequence {request.sequence!r} of model {request.model!r} is in use on another stream: end it "
                    "there, or choose another id"
                )
            )
            return
        if request.start:
            if sequence is not None and self._name is None and not sequence.ends:
                reply(
                    SessionExists(
                        f"sequence {request.sequence!r} of model {request.model!r} is open already: end it, choose "
                        "another id, or name your client (metadata or header lockstep-client) so that it has its own"
                    )
                )
                return
            sequence = self._sequences[key] = Sequence(self._hub, self._session_name(request), request, sequence)
            sequence.stream = stream
            sequence.notice = notice if request.notice else None
            sequence.over = lambda: self._forget(key, sequence)
        elif sequence is None:
            reply(
                InvalidInput(
                    f"inference request for sequence {request.sequence} to model '{request.model}' must specify the "
                    "START flag on the first request of the sequence"
                )
            )
            return
        elif request.priority not in (0, sequence.priority):
            reply(
                InvalidInput(
                    f"sequence {request.sequence!r} of model {request.model!r} began with priority "
                    f"{sequence.priority or 'unsaid'}, and a request of it has {request.priority}: leave it out there"
                )
            )
            return
        if request.deadline == math.inf:
            sequence.ask(request, reply)
            return
        timed = _Timed(request, reply, sequence)
        sequence.ask(request, timed)
        timed.start()

    def give_up(self, request: Request) -> None:
        """Nobody waits for the answer any more: a sequence that still waits for its place is over."""
        sequence = self._sequences.get((request.model, request.sequence))
        if request.start and sequence is not None and not sequence.is_open:
            sequence.abort()

    async def room(self, request: Request) -> None:
        """Wait until more of the sequence's inputs may be taken, or it is over."""
        sequence = self._sequences.get((request.model, request.sequence))
        if sequence is not None:
            await sequence.room()

    def leave(self, stream: object) -> None:
        """The stream is over: its sequences can be gone on with by others of the space, unless they wait to begin."""
        for sequence in self._sequences.values():
            if sequence.stream is stream:
                sequence.stream = sequence.notice = None
                if not sequence.is_open:
                    sequence.abort()

    def abort(self) -> None:
        """End all sequences: nobody can ask for them any more."""
        for sequence in list(self._sequences.values()):
            sequence.abort()

    def __len__(self) -> int:
        return len(self._sequences)

    def _session_name(self, request: Request) -> str:
        space = "" if self._name is None else self._name
        return f"sequence {request.sequence} of {request.model} @{space}"

    def _forget(self, key: tuple[str, SequenceId], sequence: "Sequence") -> None:
        if self._sequences.get(key) is sequence:
            del self._sequences[key]


class _Timed:
    """A reply that comes by the request's deadline, one way or the other."""

    def __init__(self, request: Request, reply: Reply, sequence: "Sequence") -> None:
        self._request, self._reply, self._sequence = request, reply, sequence
        self._timer: asyncio.TimerHandle | None = None
        self._is_done = False

    def start(self) -> None:
        """The request has been taken."""
        if not self._is_done:
            left_s = max(0.0, self._request.deadline - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(left_s, self._late)

    def __call__(self, result: Result | LockstepError) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._is_done:
            self._is_done = True
            self._reply(result)

    def _late(self) -> None:
        name = f"sequence {self._request.sequence!r} of model {self._request.model!r}"
        if self._request.start and not self._sequence.is_open:
            self(TimedOut(f"{name} has waited for a place longer than its timeout: try again later"))
            self._sequence.abort()
        else:
            self(
                TooLate(
                    f"a request of {name} was not answered within its timeout: its timesteps run all the same, go on "
                    "with those that follow"
                )
            )


class _Asked(NamedTuple):
    request: Request
    reply: Reply
    start: int
    end: int


class Sequence:
    """One sequence, from its start to its end."""

    def __init__(self, hub: Hub, name: str, first: Request, before: "Sequence | None") -> None:
        """before: what the id meant until now; unless it ends anyway it is aborted, and it is waited for."""
        self.stream: object = None
        self.notice: Notice | None = None
        #: Its last request has come.
        self.ends = False
        self.priority = first.priority
        self.over: Callable[[], None] = lambda: None
        self._hub = hub
        self._name = name
        self._session: Session | None = None
        self._early: deque[tuple[Request, Reply]] = deque()  # came before the session was open, or took the first
        self._asked: deque[_Asked] = deque()
        self._is_over = asyncio.get_running_loop().create_future()
        self._waiting: list[asyncio.Future[None]] = []
        self._opening = asyncio.create_task(self._open(first.model, before))
        self._opening.add_done_callback(self._on_opening)

    def ask(self, request: Request, reply: Reply) -> None:
        """See Space.ask."""
        if self.ends:
            reply(
                InvalidInput(
                    f"inference request for sequence {request.sequence} to model '{request.model}' came after its end: "
                    "specify the START flag on the first request of the next"
                )
            )
        elif self._session is None or self._early:
            if sum(len(early.x) for early, _ in self._early) > MAX_EARLY:
                raise WindowFull(
                    f"sequence {request.sequence!r} takes nothing yet, and {MAX_EARLY} timesteps wait for it"
                )
            self.ends = request.end
            self._early.append((request, reply))
        else:
            self._submit(self._session, request, reply)
            self.ends = request.end

    @property
    def is_open(self) -> bool:
        """Whether it has a session; before, it may wait for long."""
        return self._session is not None

    async def room(self) -> None:
        """Wait for outputs that can go, or the end."""
        if not self._is_over.done():
            changed = asyncio.get_running_loop().create_future()
            self._waiting.append(changed)
            await changed

    async def closed(self) -> None:
        """Wait until it is over."""
        await asyncio.shield(self._is_over)

    def abort(self) -> None:
        """End it at once."""
        if self._session is not None:
            self._session.abort()
        else:
            self._opening.cancel()

    def _on_opening(self, opening: asyncio.Task[None]) -> None:
        if opening.cancelled():
            self._end(None)

    async def _open(self, model: str, before: "Sequence | None") -> None:
        try:
            if before is not None:
                if not before.ends:
                    before.abort()
                await before.closed()
            session = await self._hub.begin(self._name, model, Turn(self.priority))
        except LockstepError as error:
            self._end(error)
            return
        self._session = session
        session.changed = self._on_change
        self._submit_early(session)

    def _submit_early(self, session: Session) -> None:
        """What came before the session was open, as far as its window takes it; the rest goes after outputs."""
        while self._early:
            request, reply = self._early.popleft()
            try:
                self._submit(session, request, reply)
            except WindowFull:
                self._early.appendleft((request, reply))
                return

    def _submit(self, session: Session, request: Request, reply: Reply) -> None:
        """Raises WindowFull; other errors are the reply."""
        try:
            start = session.next
            end = session.submit(request.x) if len(request.x) or not request.end else start
            self._asked.append(_Asked(request, reply, start, end))
            if request.end:
                session.close()
        except WindowFull:
            raise
        except LockstepError as error:
            reply(error)
        else:
            if start == end:
                self._on_change()

    def _on_change(self) -> None:
        session = self._session
        assert session is not None
        why: LockstepError | None = None
        try:
            session.check()
        except LockstepError as error:
            self._fail(why := error)
        else:
            self._answer(session)
            self._submit_early(session)
        if session.end_reason is not None and not self._is_over.done():
            self._end(why)
        self._make_room()

    def _make_room(self) -> None:
        waiting, self._waiting = self._waiting, []
        for changed in waiting:
            if not changed.done():
                changed.set_result(None)

    def _answer(self, session: Session) -> None:
        """Reply to those whose outputs are all here."""
        asked, progress = self._asked, session.progress
        if not asked or asked[0].end > progress:
            return
        first = asked[0].start
        outputs = session.peek(first)
        timing = Timing() if outputs is None else outputs.timing
        while asked and asked[0].end <= progress:
            _, reply, start, end = asked.popleft()
            values = (
                {name: np.empty((0, *spec.shape), spec.dtype) for name, spec in session.spec.outputs.items()}
                if outputs is None
                else {name: value[start - first : end - first] for name, value in outputs.values.items()}
            )
            reply(Result(values, timing))
        session.ack(min(end, progress))

    def _fail(self, error: LockstepError) -> None:
        asked, self._asked = self._asked, deque()
        for each in asked:
            each.reply(error)

    def _end(self, error: LockstepError | None) -> None:
        """The session is over, or there is none."""
        why = error or SessionEnded(f"{self._name} has ended: start a new one")
        early, self._early = self._early, deque()
        for _, reply in early:
            reply(why)
        self._fail(why)
        if self.notice is not None and not self.ends:
            self.notice(why)
        if self._session is not None:
            self._hub.has_ended(self._session)
        self._is_over.set_result(None)
        self.over()
        self._make_room()
