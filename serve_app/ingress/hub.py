"""Where sessions start: opens them with the directory, keeps an outbox for each owner. Knows neither Ray nor torch."""

import asyncio
import contextvars
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Protocol
from uuid import uuid4

import numpy as np

from serve_app.directory import Grant, Owner
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    SessionEnded,
    StateLost,
    TooManySessions,
    Unavailable,
    UnknownSession,
)
from serve_app.frame import Open
from serve_app.ingress.outbox import Channel, Outbox
from serve_app.session import Session
from serve_app.spec import ModelSpec

MAX_REMEMBERED = 4096
MOVE_WITHIN_S = 60.0
"""A session whose owner is gone waits so long for another one."""
RETRY_MOVE_S = 0.1


class Nowhere:
    """See session.Carrier: of a session that has no owner. Whatever it has to send goes when it has one again."""

    def notify(self, session: Session) -> None:
        """See Carrier."""

    notify_later = notify_ack = notify


NOWHERE = Nowhere()


class DirectoryClient(Protocol):
    """The directory, as seen from here."""

    async def open(self, session: str, sender: str, model: str | None, ended: dict[str, list[int]]) -> Grant:
        """A grant for a new session. `ended`: epochs, by owner, that this side has seen end."""
        ...

    async def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        """A new grant for a session that is open, to be sent from here; and the epoch of the one before."""
        ...

    async def lost(self, owner: str) -> None:
        """The owner does not answer any more."""
        ...

    async def models(self) -> dict[str, ModelSpec]:
        """The models that are served."""
        ...

    def connect(self, owner: Owner) -> Channel:
        """The way to an owner."""
        ...


class Hub:
    """The sessions of one sender: of an ingress for its clients (`ack_on_receipt=False`), or of a handle client."""

    def __init__(self, directory: DirectoryClient, *, ack_on_receipt: bool, sender: str | None = None) -> None:
        self.sender = sender or uuid4().hex
        self._directory = directory
        self._ack_on_receipt = ack_on_receipt
        self._outboxes: dict[str, Outbox] = {}
        self._sessions: dict[str, Session] = {}
        self._ended: dict[str, list[int]] = {}
        self._moves: set[asyncio.Task[None]] = set()
        self._past: OrderedDict[str, str] = OrderedDict()  # why sessions ended, for those who ask late

    async def open(
        self, session: str | None = None, model: str | None = None, initial_state: Sequence[np.ndarray] | None = None
    ) -> Session:
        """Open a session: `session` is its id (None: a new one), `initial_state` its tensors in the model's order.

        Raises SessionExists, UnknownModel, TooManySessions, InvalidInput, Unavailable.
        """
        name = session or uuid4().hex
        while True:
            ended, self._ended = self._ended, {}
            grant = await self._directory.open(name, self.sender, model, ended)
            try:
                return await self._open_at(grant, initial_state)
            except StateLost:
                self._ended.setdefault(grant.owner.name, []).append(grant.epoch)
                await self._directory.lost(grant.owner.name)  # and it places the session elsewhere, or says it cannot
            except LockstepError:
                self._ended.setdefault(grant.owner.name, []).append(grant.epoch)
                raise

    async def resume(self, name: str, acked: int) -> Session:
        """Go on with a session whose client has lost its way in, this one or another; it has the outputs below `acked`.

        Raises InvalidInput for one that was not opened for that, UnknownSession, NotOwner, StateLost, Unavailable.
        """
        held = self._sessions.get(name)
        if held is not None and not held.stays:
            raise InvalidInput(f"session {name!r} was not opened to be resumed: open it with resumable=true")
        if held is None or held.carrier is not NOWHERE:  # else it is here, and looks for another owner
            grant, before = await self._directory.attach(name, self.sender)
            if held is None or held.epoch != grant.epoch:
                return await self._adopt(grant, before, acked)
        if held.leave is not None:
            held.leave()
        held.ack(min(acked, held.progress))
        held.read_again(acked)
        return held

    async def _adopt(self, grant: Grant, before: int, acked: int) -> Session:
        """Take over from another sender, which has it under the epoch `before`."""
        owner = grant.owner
        outbox = await self._outbox(owner)
        session = Session(
            grant.session, owner.spec, owner.limits, outbox, epoch=grant.epoch, ack_on_receipt=self._ack_on_receipt,
            retains=owner.checkpoints,
        )  # fmt: skip
        session.adopt(acked)
        opened = await outbox.open(session, Open(grant.epoch, grant.session, None, acked, before))
        session.adopted(opened.progress, opened.rewind)
        self._sessions[grant.session] = session
        return session

    def get(self, name: str) -> Session:
        """An open session, or a closed one with outputs not acknowledged. Raises UnknownSession, SessionEnded."""
        if name in self._sessions:
            return self._sessions[name]
        if name in self._past:
            raise SessionEnded(
                f"session {name!r} has ended ({self._past[name]}): open a new one", reason=self._past[name]
            )
        raise UnknownSession(f"session {name!r} is not open here: open it first")

    async def models(self) -> dict[str, ModelSpec]:
        """The models that can be asked for."""
        return await self._directory.models()

    @property
    def num_sessions(self) -> int:
        """Sessions that this side holds."""
        return len(self._sessions)

    async def stop(self) -> None:
        """Give everything up; sessions that are still open fail."""
        for move in list(self._moves):
            move.cancel()
        await asyncio.gather(*self._moves, return_exceptions=True)
        for outbox in list(self._outboxes.values()):
            await outbox.stop()

    async def _open_at(self, grant: Grant, initial_state: Sequence[np.ndarray] | None) -> Session:
        owner = grant.owner
        outbox = await self._outbox(owner)
        state = None if initial_state is None else tuple(np.asarray(array) for array in initial_state)
        session = Session(
            grant.session, owner.spec, owner.limits, outbox, epoch=grant.epoch, ack_on_receipt=self._ack_on_receipt,
            initial_state=state, retains=owner.checkpoints,
        )  # fmt: skip
        await outbox.open(session, Open(grant.epoch, grant.session, state))
        self._sessions[session.name] = session
        return session

    async def _outbox(self, owner: Owner) -> Outbox:
        outbox = self._outboxes.get(owner.name)
        if outbox is None or outbox.failed:
            if outbox is not None:
                await outbox.stop()
            channel = self._directory.connect(owner)
            forget, lost = partial(self._forget, owner.name), partial(self._lost, owner.name)
            outbox = Outbox(owner.name, self.sender, owner.spec, owner.max_bytes, channel, forget, lost)
            self._outboxes[owner.name] = outbox
        return outbox

    def _lost(self, owner: str, session: Session, error: LockstepError) -> None:
        """The owner is gone, or going: let the session go on elsewhere, or fail."""
        if not session.can_move or not isinstance(error, StateLost | Unavailable):
            session.fail(error)
            self._forget(owner, session)
            return
        move = asyncio.get_running_loop().create_task(self._move(owner, session, error), context=contextvars.Context())
        self._moves.add(move)
        move.add_done_callback(self._moves.discard)

    async def _move(self, owner: str, session: Session, error: LockstepError) -> None:
        """Open the session at another owner, from its last checkpoint on; wait for one while there is none."""
        session.carrier = NOWHERE
        deadline, name = time.monotonic() + MOVE_WITHIN_S, owner
        is_lost, ended = True, {owner: [session.epoch]}
        try:
            while session.can_move:
                try:
                    if is_lost:
                        await self._directory.lost(name)
                        is_lost = False
                    grant = await self._directory.open(session.name, self.sender, session.spec.name, ended)
                    name = grant.owner.name
                    ended = {name: [grant.epoch]}
                    outbox = await self._outbox(grant.owner)
                    session.epoch = grant.epoch
                    at, state = session.restore_point()
                    await outbox.open(session, Open(grant.epoch, session.name, state, at, rewind=session.rewind))
                except StateLost:
                    is_lost = True
                except (Unavailable, TooManySessions):  # for now: replicas and the directory start again
                    if time.monotonic() > deadline:
                        break
                    await asyncio.sleep(RETRY_MOVE_S)
                else:
                    session.moved(outbox, at)
                    return
            session.fail(error)
        except LockstepError as failure:
            session.fail(failure)
        except asyncio.CancelledError:
            session.fail(error)
            raise
        self._forget(name, session)

    def has_ended(self, session: Session) -> None:
        """Let the directory know, with the next session that opens, so that the name is free again."""
        for owner, outbox in self._outboxes.items():
            if outbox is session.carrier:
                self._ended.setdefault(owner, []).append(session.epoch)

    def _forget(self, owner: str, session: Session) -> None:
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
            self._past[session.name] = session.end_reason or "unknown"
            if len(self._past) > MAX_REMEMBERED:
                self._past.popitem(last=False)
        self._ended.setdefault(owner, []).append(session.epoch)
