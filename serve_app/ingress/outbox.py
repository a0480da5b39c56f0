"""All sessions of one sender at one owner: what they have to send goes in few calls, each as full as there is need."""

import asyncio
import contextvars
import logging
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from typing import Protocol

import numpy as np

from serve_app.errors import LockstepError, StateLost, Unavailable, from_wire
from serve_app.frame import COLUMNS, Answer, Frame, Notice, Open
from serve_app.segment import Run
from serve_app.session import Entry, Session
from serve_app.spec import ModelSpec

logger = logging.getLogger(__name__)

MAX_FRAMES = 2
MIN_SHARE = 32
"""Sessions that are not worth two frames."""
MIN_SECOND = 24
"""Sessions that are worth a second frame while the first is on its way: fewer than MIN_SHARE, since halves are not
equal for long where sessions begin and end, and what waits for the other half then goes with it ever after."""
MIN_TIMESTEPS = 64
"""So many are worth a second frame, of however few sessions: to run them takes longer than all that a frame costs."""
FEW = 8
"""So few gain nothing by going together: each goes at once."""
RETRY_DELAY_S = 0.02
MAX_ACKS = 4096
ACK_AFTER_S = 0.05
"""An acknowledgement waits so long for inputs of its session: most go with those."""
STOP_WITHIN_S = 2.0
LATE_S = 1.2
"""A call with nothing to tell is answered before that, unless a step takes so long."""
UNUSED_S = 60.0
KEEP_ENDED_S = 300.0
"""So long the outputs of a closed session wait for its client when its owner is gone: as they do at an idle owner (see
session.idle_timeout_s)."""


class Channel(Protocol):
    """The way to one owner."""

    async def call(self, frame: Frame) -> Answer:
        """Bring a frame there. Raises what the owner refuses it with, StateLost when that is gone."""
        ...

    async def close(self) -> None:
        """Nothing is sent any more. May be called twice."""
        ...


class Outbox:
    """At most two frames on their way; what is pending when one has landed goes into the next, so there is no timer.

    A frame is on its way until the owner is known to have its inputs, mostly by their outputs. It takes half of the
    sessions that have something to send or on its way: the owner runs one half while the other one travels. Where that
    would be less than a step is worth, the rest waits until the first frame has landed: its step costs less a session,
    and so does all that is done for a frame on both sides. While there
    are sessions one call is always waiting, for outputs and notices to come back with; which call brings what does not
    matter. Calls run in a context of their own: they must not die with the request in whose context they were made.
    `forgotten` hears of each session that is over, `lost` of each that was running when the owner was lost.
    """

    def __init__(
        self,
        owner: str,
        sender: str,
        spec: ModelSpec,
        max_bytes: int,
        channel: Channel,
        forgotten: Callable[[Session], None],
        lost: Callable[[Session, LockstepError], None],
    ) -> None:
        self._owner = owner
        self._sender = sender
        self._spec = spec
        self._max_timesteps = max(1, max_bytes // max(1, spec.input.nbytes))
        self._channel = channel
        self._forgotten = forgotten
        self._lost = lost
        self._sessions: dict[int, Session] = {}
        self._opening: dict[int, asyncio.Future[Notice]] = {}
        self._opens: dict[int, Open] = {}
        self._pending: dict[int, Session] = {}  # an ordered set
        self._acks: dict[int, tuple[Session, float]] = {}  # and when one goes alone
        self._exports: set[int] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._last_frame = 0
        self._frame_of: dict[int, int] = {}  # of each session that is in flight
        self._frames: Counter[int] = Counter()  # those on their way: their sessions in flight
        self._pump_due = False
        self._heard_at = 0.0
        self._error: LockstepError | None = None

    def open(self, session: Session, ask: Open) -> Coroutine[None, None, Notice]:
        """Let the owner take the session in; what it says. Raises what it refuses with, StateLost when it is gone.

        What is submitted before this is awaited goes with the opening.
        """
        if self._error is not None:
            raise self._error
        self._sessions[session.epoch] = session
        opened = self._opening[session.epoch] = asyncio.get_running_loop().create_future()
        self._opens[session.epoch] = ask
        self._schedule()
        return self._confirm(session, opened)

    async def _confirm(self, session: Session, opened: asyncio.Future[Notice]) -> Notice:
        try:
            notice = await opened
            if session.epoch not in self._sessions:  # lost since that was said, and nobody else sees to it
                raise StateLost(f"owner {self._owner!r} is gone, or stopping")
        except asyncio.CancelledError:
            self._opening.pop(session.epoch, None)
            if session.stays:
                self._sessions.pop(session.epoch, None)  # its client resumes it elsewhere
            else:
                session.abort()
            raise
        finally:
            self._opening.pop(session.epoch, None)
        session.offer()
        return notice

    def notify(self, session: Session) -> None:
        """See Carrier."""
        if self._error is not None:
            return  # it was lost, and whoever heard of that sees to it
        if session.epoch in self._opening and session.epoch not in self._opens:
            return  # what did not go with the opening waits until that has arrived
        self._pending[session.epoch] = session
        self._schedule()

    def notify_later(self, session: Session) -> None:
        """See Carrier."""
        asyncio.get_running_loop().call_later(RETRY_DELAY_S, session.offer)

    def notify_ack(self, session: Session) -> None:
        """See Carrier."""
        if session.epoch not in self._acks:
            self._acks[session.epoch] = session, asyncio.get_running_loop().time() + ACK_AFTER_S
        if self._error is not None and session.has_all_acked:
            self._forget(session)

    def want_state(self, session: Session) -> None:
        """See Carrier."""
        self._exports.add(session.epoch)
        self._schedule()

    async def stop(self) -> None:
        """Abort what is open, let go of outputs. The owner then answers all calls; if not in time, they are given up.

        They are not cancelled at once: what gRPC has to say of a cancelled call may come when its event loop is closed.
        """
        for epoch, session in list(self._sessions.items()):
            if session.stays and session.end_reason is None:
                del self._sessions[epoch]
                session.fail(Unavailable("this way in is stopping: resume the session by another"))
                self._forgotten(session)
        live = [session for session in self._sessions.values() if session.end_reason is None]
        for session in list(self._sessions.values()):
            session.abort()
            if session.end_reason is not None and self._error is None:
                session.ack(session.progress)
        if self._sessions and self._error is None:
            self._send()
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await asyncio.gather(*(session.closed() for session in live), return_exceptions=True)
                while self._calls:
                    await asyncio.wait(self._calls)
        except TimeoutError:
            logger.warning("owner %r has not confirmed the end of %d sessions", self._owner, len(live))
        finally:
            calls = list(self._calls)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await self._channel.close()

    @property
    def failed(self) -> bool:
        """Whether the owner was lost."""
        return self._error is not None

    @property
    def is_late(self) -> bool:
        """Whether the owner should have answered a call by now."""
        waits = bool(self._calls) and self._error is None
        return waits and asyncio.get_running_loop().time() - self._heard_at > LATE_S

    @property
    def is_unused(self) -> bool:
        """Whether there has been no session for some time: the owner may be gone, and nobody would be told."""
        in_use = self._sessions or self._opening or self._calls or self._pump_due
        return not in_use and asyncio.get_running_loop().time() - self._heard_at > UNUSED_S

    def fail(self, error: LockstepError) -> None:
        """The owner is gone, and nothing that it may still say counts."""
        self._fail(error)
        for call in self._calls:
            call.cancel()

    def _schedule(self) -> None:
        """Pump once this turn of the event loop is over, so that all it brings goes together."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        while self._error is None and self._has_reason():
            self._send()

    def _send(self) -> None:
        sent: list[tuple[Session, int]] = []
        frame = self._next_frame(sent)
        loop = asyncio.get_running_loop()
        if not self._calls:
            self._heard_at = loop.time()
        self._calls.add(loop.create_task(self._run(frame, sent), context=contextvars.Context()))

    def _has_reason(self) -> bool:
        return self._may_send or bool(self._exports or (self._sessions and not self._calls))

    @property
    def _may_send(self) -> bool:
        """Whether what waits is worth a frame now."""
        num_waiting = len(self._pending) + sum(epoch not in self._pending for epoch in self._opens)
        if not num_waiting or not self._frames:
            return num_waiting > 0
        if len(self._frames) >= MAX_FRAMES:
            return False
        if num_waiting >= MIN_SECOND or num_waiting + len(self._frame_of) <= FEW:
            return True
        return sum(session.next - session.handed for session in self._pending.values()) >= MIN_TIMESTEPS

    def _next_frame(self, sent: list[tuple[Session, int]]) -> Frame:
        """A share of what is pending, up to the frame's size; `sent` gets the sessions with inputs, and up to where."""
        opens, self._opens = self._opens, {}
        first = deque(epoch for epoch in opens if epoch in self._pending)
        exports, self._exports = self._exports, set()
        entries: list[tuple[int, Entry]] = []
        room = self._max_timesteps
        share = max(MIN_SHARE, -(-(len(self._frame_of) + len(self._pending)) // MAX_FRAMES))
        self._last_frame += 1
        while self._pending and room > 0 and (first or len(entries) < share):
            epoch = first.popleft() if first else next(iter(self._pending))
            session = self._pending.pop(epoch)
            entry = session.take(room)
            room -= len(entry.x)
            entries.append((epoch, entry))
            sent.append((session, session.handed))
            if session.in_flight:
                self._land(session)  # an abort does not wait for what went before
                self._frame_of[epoch] = self._last_frame
                self._frames[self._last_frame] += 1
        for epoch in first:
            del self._pending[epoch]  # no room: see `notify`
        self._take_acks(entries)
        columns = np.array(
            [(len(e.x), epoch, e.start, e.rewind, e.close, e.acked) for epoch, e in entries], np.int64
        ).reshape(-1, len(COLUMNS)).T  # fmt: skip
        empty = np.empty((0, *self._spec.input.shape), self._spec.input.dtype)
        x = np.concatenate([empty, *(entry.x for _, entry in entries)])
        return Frame(self._owner, self._sender, np.ascontiguousarray(columns), x, tuple(opens.values()), tuple(exports))

    def _take_acks(self, entries: list[tuple[int, Entry]]) -> None:
        """Add what is to be acknowledged without inputs, of sessions that have no entry yet."""
        taken, now = {epoch for epoch, _ in entries}, asyncio.get_running_loop().time()
        for epoch, (session, due) in list(self._acks.items())[:MAX_ACKS]:
            if epoch in taken:
                del self._acks[epoch]
            elif not session.in_flight and (due <= now or session.end_reason is not None):
                # One that is in flight could be overtaken.
                del self._acks[epoch]
                if session.acked > session.acked_told and not session.sendable:
                    entries.append((epoch, session.take(0)))
                    self._settle(session)

    async def _run(self, frame: Frame, sent: list[tuple[Session, int]]) -> None:
        try:
            answer = await self._channel.call(frame)
        except asyncio.CancelledError:
            self._fail(StateLost(f"the sender of owner {self._owner!r} was stopped"))
            raise
        except LockstepError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("a call to owner %r failed", self._owner)
            self._fail(StateLost(f"owner {self._owner!r} does not answer ({error}): its sessions are lost"))
        else:
            self._heard_at = asyncio.get_running_loop().time()
            self._take_answer(answer)
            for session, handed in sent:
                if session.in_flight:  # most are not: their outputs have come
                    session.arrived(handed)
                    self._settle(session)
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._calls.discard(task)
            live = any(session.end_reason is None for session in self._sessions.values())
            if live or self._acks or self._calls or not self._sessions:
                self._schedule()
            else:  # all is said but what clients will acknowledge, and the owner may answer at once
                asyncio.get_running_loop().call_later(RETRY_DELAY_S, self._schedule)

    def _take_answer(self, answer: Answer) -> None:
        at = 0
        columns = (answer.epoch, answer.next, answer.rewind, answer.start, answer.length, *answer.timing)
        for epoch, accepted, rewind, start, length, *timing in zip(*(c.tolist() for c in columns), strict=True):
            if session := self._sessions.get(epoch):
                run = Run(start, start + length, answer.outputs, at) if length else None
                session.timing.add(*timing)
                session.deliver(accepted, rewind, run)
                self._settle(session)
            at += length
        if answer.checkpoints is not None:
            kept = answer.checkpoints
            for i, (epoch, timestep) in enumerate(zip(kept.epoch.tolist(), kept.at.tolist(), strict=True)):
                if session := self._sessions.get(epoch):
                    session.checkpoint(timestep, tuple(leaf[i].copy() for leaf in kept.state))
        for notice in answer.notices:
            opening = self._opening.get(notice.epoch)
            session = self._sessions.get(notice.epoch)
            if opening is not None and not opening.done() and notice.kind in ("opened", "refused"):
                self._opened(notice, opening)
            elif session is not None and session.end_reason is not None:
                if notice.kind != "moving" or session.has_all_acked:
                    self._forget(session)  # the owner has given its outputs up
                else:
                    self._forget_later(session)
            elif session is not None and notice.kind == "moving":
                for each in (self._sessions, self._pending, self._acks):
                    each.pop(notice.epoch, None)
                self._land(session)
                if opening is None:
                    self._lost(session, Unavailable(f"owner {self._owner!r} is stopping"))
            elif session is not None:
                session.notice(
                    notice.kind, dict(notice.error) if notice.error else None, notice.reason, notice.progress
                )
                self._settle(session)

    def _opened(self, notice: Notice, opening: asyncio.Future[Notice]) -> None:
        if notice.error is None:
            opening.set_result(notice)
            return
        if (refused := self._sessions.pop(notice.epoch, None)) is not None:  # or it was said before that it is moving
            self._land(refused)
        opening.set_exception(from_wire(dict(notice.error)))

    def _settle(self, session: Session) -> None:
        """Something has happened to the session: it may have landed, or be over."""
        if not session.in_flight:
            self._land(session)
        if session.done:
            self._forget(session)

    def _land(self, session: Session) -> None:
        frame = self._frame_of.pop(session.epoch, None)
        if frame is not None:
            self._frames[frame] -= 1
            if not self._frames[frame]:
                del self._frames[frame]
                self._schedule()

    def _forget(self, session: Session) -> None:
        self._land(session)
        if self._sessions.pop(session.epoch, None) is not None:
            self._forgotten(session)

    def _forget_later(self, session: Session) -> None:
        """It has closed, and no owner will say that its client does not come for its outputs."""
        asyncio.get_running_loop().call_later(KEEP_ENDED_S, self._forget, session)

    def _fail(self, error: LockstepError) -> None:
        """The owner is gone: so are its sessions."""
        if self._error is None:
            self._error = error
        for opening in self._opening.values():
            if not opening.done():
                opening.set_exception(error)
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            self._land(session)
            if session.epoch in self._opening:
                continue  # whoever opens it hears of the error
            if session.end_reason is None:
                self._lost(session, error)
            elif session.has_all_acked:
                self._forgotten(session)
            else:  # its outputs are here; should they be lost before its client has them, another gets them again
                self._sessions[session.epoch] = session
                self._forget_later(session)
        self._pending.clear()
        self._acks.clear()
        self._exports.clear()
