"""Sequences of the Open Inference Protocol, as sessions: clients name them, and send start and end with the inputs.

A sequence id means something within a space: a stream's own, that of a client who has a name, or the one that all
others share. Requests of a sequence run and are answered in order; sequences do not wait for each other.

A stream's own sequences end with it. All others may be gone on with by any ingress: a single request is brought to the
one that has the sequence, a stream takes it over from there. When that one is gone, with it goes what it knew of which
answers have been sent: unless all are known to have been, the next request is told from which timestep to resend, and
requests that are sent again are answered as they were. A client that counts its timesteps needs not be told: what it
has not got is kept until it goes on, and it has its sequence though the stream before may not know that it is dead.
"""

import asyncio
import contextvars
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from serve_app.directory import Turn
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    NotOwner,
    SessionEnded,
    SessionExists,
    StartMismatch,
    StateLost,
    TimedOut,
    TooLate,
    Unavailable,
    UnknownSession,
    WindowFull,
)
from serve_app.frame import ADOPTED, UNKNOWN
from serve_app.ingress.hub import Hub
from serve_app.ingress.peers import NOT_HERE, Gone, Peers
from serve_app.segment import Timing
from serve_app.session import Session

logger = logging.getLogger(__name__)
SequenceId = int | str
MAX_EARLY = 4096
"""Timesteps of a sequence that may wait for its session to open."""
SENT_AFTER_S = 0.05
"""An answer is taken to have been sent then, if no other request has come before: it is not kept any more."""
SENT_BY_ANOTHER_AFTER_S = 1.0
"""The same, of one that another ingress has to send, which may be busy."""


class Request(NamedTuple):
    """Timesteps x [T, *features] of a sequence; T may be 0 where it ends.

    priority: of the whole sequence, from 1, the highest (0: not said). deadline: by when it is to be answered, on the
    monotonic clock. notice: with its start, whether to tell of an end that the client has not asked for. timestep: the
    number of its first, where the client gives it. asker_lost: of what came by another ingress; it is set should that
    die, and maybe the answer with it.
    """

    model: str
    sequence: SequenceId
    start: bool
    end: bool
    x: np.ndarray
    priority: int = 0
    deadline: float = math.inf
    notice: bool = False
    timestep: int | None = None
    asker_lost: asyncio.Event | None = None


class Forwarded(NamedTuple):
    """A request for the ingress that has its sequence; it is answered with a Result. client: the space's name."""

    client: str | None
    request: Request


class LetGo(NamedTuple):
    """Asks the ingress that has a sequence to have it no more: it starts again elsewhere, or moves to a stream.

    insists: though it may be in use on one here.
    """

    client: str | None
    model: str
    sequence: SequenceId
    starts: bool
    insists: bool = False


class Left(NamedTuple):
    """It has it no more. Which session it was at which owner; its client has the outputs below `acked`."""

    owner: str
    epoch: int
    acked: int


class Result(NamedTuple):
    """The outputs of a request's timesteps, each [T, *shape]. model: what that is served as which has computed them."""

    values: dict[str, np.ndarray]
    timing: Timing
    model: str


Begin = Session | Callable[[], Awaitable[Session]]
"""The session of a sequence, or how it comes to one."""
Reply = Callable[[Result | LockstepError], None]
"""Called once, on the event loop, with what came of a request."""
Notice = Callable[[LockstepError], None]
"""Called once, on the event loop, when a sequence has ended in another way than by its last request."""


class Space:
    """Sequences by model and id: of a client who has a name; or, without `peers`, of one stream; or else of all others.

    What is open in the space that those share is nobody's to restart.
    """

    def __init__(self, hub: Hub, name: str, client: str | None = None, peers: Peers | None = None) -> None:
        self._hub = hub
        self._name = name
        self._client = client
        self._peers = peers
        self._sequences: dict[tuple[str, SequenceId], Sequence] = {}
        self._started = count(1)
        self._forwarding: set[asyncio.Task[None]] = set()
        self._streams: set[object] = set()

    def join(self, stream: object) -> None:
        """A stream begins, whose requests are asked here."""
        self._streams.add(stream)

    def ask(self, request: Request, reply: Reply, stream: object = None, notice: Notice | None = None) -> None:
        """Run a request; `reply` gets its outputs, or the error. Raises WindowFull: ask again after `room`.

        stream: what the request came with; while that lasts no other takes its sequences, but one of a client who has a
        name and counts; and `notice` is called, if the request asks for that. When the request's deadline passes, a
        sequence that still waits for a place is over (TimedOut). One that runs goes on, with the timesteps of this
        request, whose outputs nobody gets (TooLate): those that follow need the state after them.
        """
        sequence = self._sequences.get((request.model, request.sequence))
        if sequence is not None and (refusal := self._refusal(request, sequence, stream)) is not None:
            reply(refusal)
            return
        if sequence is not None and sequence.stream is not stream and self._insists(request):
            sequence.move_to(stream)
        if request.start:
            sequence = self._start(request, sequence, stream)
            sequence.notice = notice if request.notice else None
        elif sequence is None and self._peers is not None and stream is None:
            self._forward(self._peers, request, reply)
            return
        elif sequence is None and self._peers is not None:
            sequence = self._put(request, partial(self._take_over, self._peers, request), stream)
        elif sequence is None:
            reply(_not_started(request))
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
        self._streams.discard(stream)
        for sequence in self._sequences.values():
            if sequence.stream is stream:
                sequence.stream = sequence.notice = None
                if not sequence.is_open and sequence.priority is not None:
                    sequence.abort()

    def abort(self) -> None:
        """End all sequences: nobody can ask for them any more."""
        for sequence in list(self._sequences.values()):
            sequence.abort()

    async def run(self, request: Request) -> Result:
        """As `ask`, for whoever waits for the result. Raises what it fails with."""
        done: asyncio.Future[Result | LockstepError] = asyncio.get_running_loop().create_future()

        def reply(result: Result | LockstepError) -> None:
            if not done.done():  # who waits may have gone
                done.set_result(result)

        self.ask(request, reply)
        result = await done
        if isinstance(result, LockstepError):
            raise result
        return result

    async def run_forwarded(self, request: Request) -> Any:
        """What came to another ingress: its Result, or NOT_HERE. Raises what it fails with."""
        is_here = (request.model, request.sequence) in self._sequences
        return await self.run(request) if is_here else NOT_HERE

    async def let_go(self, ask: LetGo) -> Any:
        """Have a sequence no more: Left, or NOT_HERE. Raises SessionExists where it is in use."""
        key = ask.model, ask.sequence
        sequence = self._sequences.get(key)
        if sequence is None:
            return NOT_HERE
        none = np.empty(0)
        asked = Request(*key, start=ask.starts, end=False, x=none, timestep=0 if ask.insists else None)
        refusal = self._refusal(asked, sequence, None)
        if refusal is not None:
            raise refusal
        if not ask.starts:
            return await sequence.let_go(at_once=sequence.stream is not None) or NOT_HERE
        await sequence.make_way()
        return sequence.left(UNKNOWN) or NOT_HERE

    @property
    def is_in_use(self) -> bool:
        """Whether there are sequences, requests on their way, or streams that may bring some."""
        return bool(self._sequences or self._forwarding or self._streams)

    def _refusal(self, request: Request, sequence: "Sequence", stream: object) -> LockstepError | None:
        """Why a request cannot be taken for the sequence that there is."""
        if sequence.stream not in (None, stream) and not self._insists(request):
            return SessionExists(f"{_named(request)} is in use on another stream: end it there, or choose another id")
        if request.start and self._is_shared and not sequence.ends and not sequence.is_broken:
            return SessionExists(
                f"{_named(request)} is open already: end it, choose another id, or name your client (metadata or "
                "header lockstep-client) so that it has its own"
            )
        if not request.start and request.priority and sequence.priority not in (None, request.priority):
            return InvalidInput(
                f"{_named(request)} began with priority {sequence.priority or 'unsaid'}, and a request of it has "
                f"{request.priority}: leave it out there"
            )
        return None

    def _insists(self, request: Request) -> bool:
        """Whether it has the sequence wherever that is in use: its client knows what it has got."""
        return self._client is not None and request.timestep is not None

    @property
    def _is_shared(self) -> bool:
        return self._client is None and self._peers is not None

    def _session_name(self, request: Request) -> str:
        return f"sequence {request.sequence!r} of {request.model} @{self._name}"

    def _start(self, request: Request, before: "Sequence | None", stream: object) -> "Sequence":
        """before: see `_begin`."""
        name, begun = self._session_name(request), None
        if self._peers is None:  # then nobody else knows of it, and no two have the same name
            name = f"{name} #{next(self._started)}"
            begun = self._hub.begin_ahead(name, request.model) if before is None else None
        return self._put(request, begun or partial(self._begin, name, request, before), stream, request.priority)

    def _put(self, request: Request, begin: Begin, stream: object, priority: int | None = None) -> "Sequence":
        """From now on the id means a sequence with that session."""
        key = request.model, request.sequence
        sequence = Sequence(self._hub, self._session_name(request), begin, self._peers is not None)
        sequence.stream, sequence.priority = stream, priority
        sequence.over = lambda: self._forget(key, sequence)
        self._sequences[key] = sequence
        return sequence

    async def _begin(self, name: str, request: Request, before: "Sequence | None") -> Session:
        """before: what the id meant until now; unless it ends anyway it is aborted, and it is waited for."""
        if before is not None:
            await before.make_way()
        begin = partial(self._hub.begin, name, request.model, Turn(request.priority), resumable=self._peers is not None)
        try:
            return await begin()
        except SessionExists:
            if self._peers is None:
                raise
            await self._free(self._peers, name, request)
        return await begin()

    async def _free(self, peers: Peers, name: str, request: Request) -> None:
        """Another ingress has a sequence of that id, which is to start again here. Raises SessionExists."""
        try:
            left = await peers.ask(name, self._let_go(request, starts=True))
            self._hub.has_ended(left.owner, left.epoch)
        except Gone as gone:
            await self._hub.discard(name, gone.sender)
        except UnknownSession as error:  # it has ended, and the directory may have to be told
            await self._hub.discard(name, error.details.get("sender", ""))
        peers.forget(name)

    async def _take_over(self, peers: Peers, request: Request, gone: Gone | None = None) -> Session:
        """Go on here with a sequence that is elsewhere; `gone`: that is so of the ingress which had it."""
        name, acked = self._session_name(request), UNKNOWN
        try:
            if gone is None:
                acked = (await peers.ask(name, self._let_go(request, starts=False))).acked
        except Gone:
            pass
        except UnknownSession:
            raise _not_started(request) from None
        try:
            if gone is not None and (await self._hub.describe(name)).sender != gone.sender:
                raise NotOwner(f"{name} goes on by another way in, and a request of it may have run: try again")
            return await self._hub.resume(name, acked, keep=False)
        except UnknownSession as error:
            raise StateLost(
                f"sequence {request.sequence!r} of model {request.model!r} has ended, or was lost with its way in and "
                f"its replica: start it again ({error})"
            ) from error

    def _let_go(self, request: Request, *, starts: bool) -> LetGo:
        return LetGo(self._client, request.model, request.sequence, starts, self._insists(request))

    def _forward(self, peers: Peers, request: Request, reply: Reply) -> None:
        timed = _Timed(request, reply) if request.deadline < math.inf else reply
        # In a context of its own: it must not hang on the call that the request came by.
        loop, context = asyncio.get_running_loop(), contextvars.Context()
        task = loop.create_task(self._run_elsewhere(peers, request, timed), context=context)
        self._forwarding.add(task)
        task.add_done_callback(self._forwarding.discard)
        if isinstance(timed, _Timed):
            timed.start()

    async def _run_elsewhere(self, peers: Peers, request: Request, reply: Reply) -> None:
        """Have the ingress run it that has the sequence; here, if that is gone."""
        name, key = self._session_name(request), (request.model, request.sequence)
        try:
            reply(await peers.ask(name, Forwarded(self._client, request._replace(deadline=math.inf))))
        except Gone as gone:
            take_over = partial(self._take_over, peers, request, gone)
            sequence = self._sequences.get(key) or self._put(request, take_over, None)
            try:
                sequence.ask(request, reply, is_lost=gone.was_asked)
            except WindowFull as error:
                reply(error)
        except UnknownSession:
            reply(_not_started(request))
        except LockstepError as error:
            reply(error)
        except Exception:
            logger.exception("a request of %s failed", name)
            reply(LockstepError("an unexpected error: the server's log has it"))

    def _forget(self, key: tuple[str, SequenceId], sequence: "Sequence") -> None:
        if self._sequences.get(key) is sequence:
            del self._sequences[key]


def _named(request: Request) -> str:
    return f"sequence {request.sequence!r} of model {request.model!r}"


def _not_started(request: Request) -> LockstepError:
    return InvalidInput(
        f"inference request for sequence {request.sequence} to model '{request.model}' must specify the START flag on "
        "the first request of the sequence"
    )


class _Timed:
    """A reply that comes by the request's deadline, one way or the other."""

    def __init__(self, request: Request, reply: Reply, sequence: "Sequence | None" = None) -> None:
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
        name = _named(self._request)
        if self._request.start and self._sequence is not None and not self._sequence.is_open:
            self(TimedOut(f"{name} has waited for a place longer than its timeout: try again later"))
            self._sequence.abort()
        else:
            self(
                TooLate(
                    f"a request of {name} was not answered within its timeout: its timesteps run all the same, go on "
                    "with those that follow"
                )
            )


def _nothing() -> None:
    pass


class _Asked(NamedTuple):
    request: Request
    reply: Reply
    start: int
    end: int


class Sequence:
    """One sequence, from its start to its end, or as long as it is here."""

    def __init__(self, hub: Hub, name: str, begin: Begin, outlives: bool) -> None:
        """outlives: another ingress can go on with it. Then an answer is kept until it has been sent."""
        self.stream: object = None
        self.notice: Notice | None = None
        #: Its last request has come.
        self.ends = False
        #: What it began with; None where it began elsewhere.
        self.priority: int | None = None
        self.over: Callable[[], None] = _nothing
        self._hub = hub
        self._name = name
        self._outlives = outlives
        self._session: Session | None = None
        self._early: deque[tuple[Request, Reply]] = deque()  # came before the session was open, or took the first
        self._asked: deque[_Asked] = deque()
        self._is_broken = False  # it was told so
        self._counts = False  # its client has said which timestep its last request starts at
        self._resent: int | None = None  # the next request starts there, not at the session's next timestep
        self._has_lost = False  # a request that may have run elsewhere
        self._ways: set[asyncio.Event] = set()  # by which requests came whose answers may not have been sent yet
        self._answered = 0
        self._sending: asyncio.TimerHandle | None = None
        self._is_over = asyncio.get_running_loop().create_future()
        self._waiting: list[asyncio.Future[None]] = []
        self._opening: asyncio.Task[None] | None = None
        if isinstance(begin, Session):
            self._opened(begin)
        else:
            self._opening = asyncio.create_task(self._open(begin))
            self._opening.add_done_callback(self._on_opening)

    def ask(self, request: Request, reply: Reply, *, is_lost: bool = False) -> None:
        """See Space.ask. is_lost: it was on its way to another ingress, and may have run; it is only told so."""
        if self.ends and not self._lost_an_answer:
            reply(_not_started(request))
        elif self._session is None or self._early:
            if sum(len(early.x) for early, _ in self._early) > MAX_EARLY:
                raise WindowFull(
                    f"sequence {request.sequence!r} takes nothing yet, and {MAX_EARLY} timesteps wait for it"
                )
            self._has_lost |= is_lost
            self.ends = request.end
            self._early.append((request, reply))
        elif is_lost or (self._is_broken and self.stream is not None and request.timestep is None):
            # On a stream more may be on its way that was sent before this was read.
            self._tell_resend(self._session, request, reply)
        elif self._lost_an_answer and request.timestep is None:
            self._break(self._session)
            self._tell_resend(self._session, request, reply)
        else:
            self._submit(self._session, request, reply)

    @property
    def is_broken(self) -> bool:
        """Whether it is not known that its client has the last answers, and it has not gone on since."""
        return self._is_broken or self._lost_an_answer

    @property
    def _lost_an_answer(self) -> bool:
        return bool(self._ways) and any(way.is_set() for way in self._ways)

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

    async def make_way(self) -> None:
        """Wait until it is over, which it is soon: unless it ends anyway it is aborted."""
        if self._sending is not None and self._session is not None and self._has_closed:
            self._sending.cancel()
            self._sent(self._session, self._answered)
        if not self.ends:
            self.abort()
        await asyncio.shield(self._is_over)

    def move_to(self, stream: object) -> None:
        """It goes on there, whatever it was used on."""
        self.stream, self.notice = stream, None

    async def let_go(self, *, at_once: bool) -> Left | None:
        """Be over, and leave the session for whoever takes it over; None where it has ended.

        at_once: nobody is there any more for the answers that have yet to come.
        """
        while (self._session is None or (self._is_due and not at_once)) and not self._is_over.done():
            await self.room()
        session = self._session
        if session is None or self._is_over.done():
            return None
        if at_once:
            self._refuse(NotOwner(f"{self._name} goes on by another way in, and this request may have run: try again"))
        elif not self.is_broken and not self._counts and self._resent is None:
            session.ack(session.next)
        self._finish()
        return self.left(session.acked)

    def left(self, acked: int) -> Left | None:
        """What there is to say of its session."""
        session = self._session
        return None if session is None else Left(session.owner, session.epoch, acked)

    def abort(self) -> None:
        """End it at once."""
        if self._session is not None:
            self._session.abort()
        elif self._opening is not None:
            self._opening.cancel()

    def _on_opening(self, opening: asyncio.Task[None]) -> None:
        if opening.cancelled():
            self._end(None)

    async def _open(self, begin: Callable[[], Awaitable[Session]]) -> None:
        try:
            session = await begin()
        except LockstepError as error:
            self._end(error)
        else:
            self._opened(session)

    def _opened(self, session: Session) -> None:
        self._session = session
        session.changed = self._on_change
        if self._has_lost or session.acked < session.next:
            self._break(session)
        self._on_change()

    def _break(self, session: Session) -> None:
        """Who has asked by now is told from where to resend; those that follow start there, and find all there is."""
        self._is_broken, self._resent, self.ends = True, session.acked, False
        self._ways.clear()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        early, self._early = self._early, deque()
        for request, reply in early:
            if request.timestep is None:
                self._tell_resend(session, request, reply)
            else:
                self._early.append((request, reply))

    def _tell_resend(self, session: Session, request: Request, reply: Reply) -> None:
        if request.asker_lost is not None:
            self._ways.add(request.asker_lost)  # should this be lost, the next is told again
        error = StartMismatch(
            f"{self._name} has lost its way in, and which of its last answers have arrived is not known: resend from "
            f"timestep {session.acked}, those that have run are answered as they were; or start again",
            expected=session.acked,
        )
        reply(error)

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
        if request.asker_lost is not None and request.asker_lost.is_set():
            self.ends = self.ends and not request.end
            reply(Unavailable(f"a request of {self._name} was not run: the ingress that it came by is gone"))
            return
        known = self._resent if request.timestep is None else request.timestep
        self._counts = request.timestep is not None
        if self._outlives and (known is None or known <= session.next):  # else it is refused, and says nothing
            self._ack(session, self._answered if known is None else min(self._answered, known))
        if request.asker_lost is not None:
            self._ways.add(request.asker_lost)
        try:
            start = session.next if known is None else known
            if start < session.acked:
                raise StartMismatch(
                    f"a request of {self._name} starts at timestep {start}, whose answer was sent and is gone: go on "
                    f"from {session.next}",
                    expected=session.next,
                )
            end = session.submit(request.x, known) if len(request.x) or not request.end else start
            if request.end and end != session.next:
                raise StartMismatch(
                    f"{self._name} was to end at timestep {end}, {session.next} were sent: end it there",
                    expected=session.next,
                )
            self._asked.append(_Asked(request, reply, start, end))
            if request.end and not self._outlives:
                session.close()
        except WindowFull:
            raise
        except LockstepError as error:
            self.ends = self.ends and not request.end
            if isinstance(error, StartMismatch):
                self._resent = None  # it says so
            reply(error)
        else:
            self.ends, self._is_broken = self.ends or request.end, False
            self._resent = end if end < session.next else None
            if end <= session.progress:
                self._on_change()

    def _on_change(self) -> None:
        session = self._session
        assert session is not None
        why: LockstepError | None = None
        try:
            session.check()
        except LockstepError as error:
            why = error
            if session.end_reason == ADOPTED:
                why = NotOwner(f"{self._name} goes on by another way in, and this request may have run: try again")
            self._resent = None
            self._fail(why)
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
        timing, session.timing = session.timing, Timing()
        while asked and asked[0].end <= progress:
            _, reply, start, end = asked.popleft()
            self._answered = max(self._answered, end)
            reply(Result(session.between(start, end), timing, session.spec.name))
        if not self._outlives:
            session.ack(min(end, progress))
        elif self._sending is None:
            self._send_by(session, end)

    def _send_by(self, session: Session, end: int) -> None:
        after_s = SENT_BY_ANOTHER_AFTER_S if self._ways else SENT_AFTER_S
        self._sending = asyncio.get_running_loop().call_later(after_s, self._sent, session, end)

    @property
    def _is_due(self) -> bool:
        """Whether there are requests that have had no answer, or the last of the sequence has just had it."""
        return bool(self._early or self._asked or self.ends)

    @property
    def _has_closed(self) -> bool:
        """Whether all is answered that there will be."""
        return self.ends and not self._early and not self._asked

    def _sent(self, session: Session, end: int) -> None:
        """The answers for the timesteps below have been sent for certain, unless the way back was lost since."""
        self._sending = None
        if self._lost_an_answer:
            self.ends = False  # the next request is told
            return
        if self._counts and not self._has_closed:
            return  # the next request says what has arrived
        self._ack(session, end)
        if end < self._answered:
            self._send_by(session, self._answered)
        elif self._has_closed:
            session.close()

    def _ack(self, session: Session, timestep: int) -> None:
        """Keep no answer below, unless somebody asks for it again."""
        session.ack(min([timestep, *(each.start for each in self._asked)]))
        if session.acked == session.next:
            self._ways.clear()

    def _fail(self, error: LockstepError) -> None:
        asked, self._asked = self._asked, deque()
        for each in asked:
            each.reply(error)
            if each.request.end:
                self.ends = False  # to be sent again

    def _refuse(self, error: LockstepError) -> None:
        """All that has had no answer."""
        self._fail(error)
        early, self._early = self._early, deque()
        for _, reply in early:
            reply(error)

    def _end(self, error: LockstepError | None) -> None:
        """The session is over, or there is none."""
        why = error or SessionEnded(f"{self._name} has ended: start a new one")
        notice = None if self.ends else self.notice
        self._refuse(why)
        if notice is not None:
            notice(why)
        if self._session is not None:
            self._hub.has_ended(self._session.owner, self._session.epoch)
        self._finish()

    def _finish(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
        self._is_over.set_result(None)
        if self._session is not None:
            self._session.changed = None
        self.over()
        self.over = _nothing  # it has this one, so that both would be kept until there is a look for garbage
        self._make_room()
