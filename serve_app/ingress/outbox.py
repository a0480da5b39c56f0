"""All sessions of one sender at one owner: what they have to send goes in few calls, each as full as there is need."""

import asyncio
import contextvars
import logging
from collections.abc import Callable
from typing import Protocol

import numpy as np

from serve_app.errors import LockstepError, StateLost, from_wire
from serve_app.frame import Answer, Frame, Open
from serve_app.segment import Outputs
from serve_app.session import Entry, Session
from serve_app.spec import ModelSpec

logger = logging.getLogger(__name__)

MAX_CALLS = 2
RETRY_DELAY_S = 0.02
MAX_ACKS = 4096
STOP_WITHIN_S = 2.0


class Channel(Protocol):
    """The way to one owner."""

    async def call(self, frame: Frame) -> Answer:
        """Bring a frame there. Raises what the owner refuses it with, StateLost when that is gone."""
        ...

    async def close(self) -> None:
        """Nothing is sent any more. May be called twice."""
        ...


class Outbox:
    """At most two calls in flight; whatever is pending when one returns goes into the next, so there is no timer.

    While there are sessions one call is always on its way, for outputs and notices to come back with. A frame takes all
    that is pending: smaller ones, one at work while another travels, were slower (a call costs more than the overlap
    gains). Calls run in a context of their own: a Serve call dies with the request in whose context it was made.
    `forgotten` hears of each session that is over.
    """

    def __init__(
        self,
        owner: str,
        sender: str,
        spec: ModelSpec,
        max_bytes: int,
        channel: Channel,
        forgotten: Callable[[Session], None],
    ) -> None:
        self._owner = owner
        self._sender = sender
        self._spec = spec
        self._max_timesteps = max(1, max_bytes // max(1, spec.input.nbytes))
        self._channel = channel
        self._forgotten = forgotten
        self._sessions: dict[int, Session] = {}
        self._opening: dict[int, asyncio.Future[None]] = {}
        self._opens: list[Open] = []
        self._pending: dict[int, Session] = {}  # an ordered set
        self._acks: dict[int, Session] = {}
        self._calls: set[asyncio.Task[None]] = set()
        self._pump_due = False
        self._error: LockstepError | None = None

    async def open(self, session: Session, ask: Open) -> None:
        """Let the owner take the session in. Raises what it refuses with, StateLost when it is gone."""
        if self._error is not None:
            raise self._error
        self._sessions[session.epoch] = session
        opened = self._opening[session.epoch] = asyncio.get_running_loop().create_future()
        self._opens.append(ask)
        self._schedule()
        try:
            await opened
        except asyncio.CancelledError:
            session.abort()
            raise
        finally:
            self._opening.pop(session.epoch, None)

    def notify(self, session: Session) -> None:
        """See Carrier."""
        if self._error is not None:
            session.fail(self._error)
            return
        self._pending[session.epoch] = session
        self._schedule()

    def notify_later(self, session: Session) -> None:
        """See Carrier."""
        asyncio.get_running_loop().call_later(RETRY_DELAY_S, session.offer)

    def notify_ack(self, session: Session) -> None:
        """See Carrier."""
        self._acks[session.epoch] = session

    async def stop(self) -> None:
        """Abort what is open, and give up the calls in flight once the owner knows, or does not say so in time."""
        live = [session for session in self._sessions.values() if session.end_reason is None]
        for session in live:
            session.abort()
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await asyncio.gather(*(session.closed() for session in live), return_exceptions=True)
        except TimeoutError:
            logger.warning("owner %r has not confirmed the end of %d sessions", self._owner, len(live))
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._channel.close()

    @property
    def failed(self) -> bool:
        """Whether the owner was lost."""
        return self._error is not None

    def _schedule(self) -> None:
        """Pump once this turn of the event loop is over, so that all it brings goes together."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_due = False
        while self._error is None and len(self._calls) < MAX_CALLS and self._has_reason():
            sent: list[tuple[Session, int]] = []
            frame = self._next_frame(sent)
            task = asyncio.get_running_loop().create_task(self._run(frame, sent), context=contextvars.Context())
            self._calls.add(task)

    def _has_reason(self) -> bool:
        return bool(self._opens or self._pending or (self._sessions and not self._calls))

    def _next_frame(self, sent: list[tuple[Session, int]]) -> Frame:
        """All that is pending, up to the frame's size; `sent` gets the sessions with inputs in it, and up to where."""
        opens, self._opens = self._opens, []
        entries: list[tuple[int, Entry]] = []
        room = self._max_timesteps
        while self._pending and room > 0:
            epoch, session = next(iter(self._pending.items()))
            del self._pending[epoch]
            entry = session.take(room)
            room -= len(entry.x)
            entries.append((epoch, entry))
            sent.append((session, session.handed))
        taken = {epoch for epoch, _ in entries}
        for epoch in list(self._acks)[:MAX_ACKS]:
            session = self._acks[epoch]
            if session.in_flight and epoch not in taken:
                continue  # with a later frame: this one could overtake
            del self._acks[epoch]
            if epoch not in taken and session.acked > session.acked_told and not session.sendable:
                entries.append((epoch, session.take(0)))
                self._forget_if_done(session)
        columns = np.array(
            [(epoch, e.start, len(e.x), e.acked, e.rewind, e.close) for epoch, e in entries], np.int64
        ).reshape(-1, 6).T  # fmt: skip
        empty = np.empty((0, *self._spec.input.shape), self._spec.input.dtype)
        x = np.concatenate([empty, *(entry.x for _, entry in entries)])
        epochs, start, length, acked, rewind, close = np.ascontiguousarray(columns)
        return Frame(self._owner, self._sender, epochs, start, length, acked, rewind, close, x, tuple(opens))

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
            self._take_answer(answer)
            for session, handed in sent:
                session.arrived(handed)
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._calls.discard(task)
            self._schedule()

    def _take_answer(self, answer: Answer) -> None:
        at = 0
        columns = (answer.epoch, answer.next, answer.rewind, answer.start, answer.length)
        for epoch, accepted, rewind, start, length in zip(*(column.tolist() for column in columns), strict=True):
            if session := self._sessions.get(epoch):
                values = {name: value[at : at + length] for name, value in answer.outputs.items()}
                session.deliver(accepted, rewind, Outputs(start, values) if length else None)
                self._forget_if_done(session)
            at += length
        for notice in answer.notices:
            opening = self._opening.get(notice.epoch)
            session = self._sessions.get(notice.epoch)
            if opening is not None and not opening.done() and notice.kind in ("opened", "refused"):
                self._opened(notice.epoch, opening, notice.error)
            elif session is not None and session.end_reason is not None:
                self._forget(session)  # the owner has given its outputs up
            elif session is not None:
                session.notice(
                    notice.kind, dict(notice.error) if notice.error else None, notice.reason, notice.progress
                )
                self._forget_if_done(session)

    def _opened(self, epoch: int, opening: asyncio.Future[None], error: object) -> None:
        if error is None:
            opening.set_result(None)
        else:
            del self._sessions[epoch]
            opening.set_exception(from_wire(dict(error)))  # type: ignore[call-overload]

    def _forget_if_done(self, session: Session) -> None:
        if session.done:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        if self._sessions.pop(session.epoch, None) is not None:
            self._forgotten(session)

    def _fail(self, error: LockstepError) -> None:
        """The owner is gone: so are its sessions."""
        if self._error is None:
            self._error = error
        for opening in self._opening.values():
            if not opening.done():
                opening.set_exception(error)
        for session in list(self._sessions.values()):
            session.fail(error)
            self._forget(session)
        self._pending.clear()
        self._acks.clear()
