"""Where sessions start: opens them with the directory, keeps an outbox for each owner. Knows neither Ray nor torch."""

import asyncio
import contextvars
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import numpy as np

from serve_app.checkpoint import decode_checkpoint
from serve_app.directory import NEW, USUAL, Ahead, Ask, Claim, Described, Grant, Owner, SessionStatistics, Slab, Turn
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    NotOwner,
    SessionEnded,
    StateLost,
    TooManySessions,
    Unavailable,
    UnknownSession,
)
from serve_app.frame import ABORT, ADOPTED, MOVE, UNKNOWN, Frame, Notice, Open
from serve_app.ingress.grants_ahead import GrantsAhead
from serve_app.ingress.keeper import Keeper
from serve_app.ingress.outbox import Channel, Outbox
from serve_app.session import Session, State
from serve_app.spec import ModelSpec

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
STOPPED = "this sender was stopped: open the session by another"
MOVE_WITHIN_S = 60.0
"""A session whose owner is gone waits so long for another one."""
RETRY_MOVE_S = 0.1
GIVE_BACK_WITHIN_S = 2.0
"""So long a sender that stops waits for grants that nobody wants any more, to give them back."""
WATCH_S = 0.15
"""So often it is looked whether owners are late: oftener than the margin of a lease is long (see Directory.tick)."""


class Nowhere:
    """See session.Carrier: of a session that has no owner. Whatever it has to send goes when it has one again."""

    def notify(self, session: Session) -> None:
        """See Carrier."""

    notify_later = notify_ack = want_state = notify


NOWHERE = Nowhere()


class DirectoryClient(Protocol):
    """The directory, as seen from here."""

    def open(self, ask: Ask) -> Awaitable[Grant]:
        """A grant for a session."""
        ...

    async def open_ahead(self, ask: Ahead) -> Sequence[Grant]:
        """Grants for sessions that may begin; fewer than are asked for where places are few."""
        ...

    async def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        """A new grant for a session that is open, to be sent from here; and the epoch of the one before."""
        ...

    async def release(self, session: str, epoch: int) -> None:
        """A grant has come to nothing."""
        ...

    async def keep(self, sender: str, slab: Slab) -> dict[str, LockstepError]:
        """Keep checkpoints; of which sessions none was, and why."""
        ...

    async def fetch(self, session: str) -> tuple[int, bytes]:
        """The checkpoint of a session without an owner, and the epoch to claim it by."""
        ...

    async def lost(self, owner: str) -> None:
        """The owner cannot be reached any more."""
        ...

    async def gone(self, owners: Sequence[str]) -> list[str]:
        """Which of these have been given up, and answer nobody any more."""
        ...

    async def describe(self, session: str) -> Described:
        """What is known of a session."""
        ...

    async def sessions(self, after: str, limit: int) -> list[Described]:
        """Sessions of all senders, by name."""
        ...

    async def drop(self, session: str) -> Grant | None:
        """The grant under which an owner is to end a session; None where that is all."""
        ...

    async def migrate(self, session: str, to: str | None) -> Grant:
        """The grant under which an owner is to give a session back, for another."""
        ...

    async def models(self) -> dict[str, ModelSpec]:
        """The models that are served."""
        ...

    async def statistics(self) -> dict[str, SessionStatistics]:
        """Of the sessions of each model."""
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
        self._num_outboxes = 0
        self._stopped = False
        self._sessions: dict[str, Session] = {}
        self._ended: dict[str, list[int]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._giving_back: set[asyncio.Task[None]] = set()
        self._watching: asyncio.Task[None] | None = None
        self._resuming: set[str] = set()
        self._keeper = Keeper(directory, self.sender, self._superseded)
        self._ahead = GrantsAhead(self._open_ahead)
        self._past: OrderedDict[str, str] = OrderedDict()  # why sessions ended, for those who ask late

    async def open(
        self,
        session: str | None = None,
        model: str | None = None,
        initial_state: Sequence[np.ndarray] | None = None,
        *,
        resumable: bool = False,
        keep: bool = True,
        checkpoint: bytes | None = None,
        turn: Turn = USUAL,
    ) -> Session:
        """Open a session: `session` is its id (None: a new one), `initial_state` its tensors in the model's order.

        resumable: its client can come back for it, here or elsewhere; its checkpoints go to the directory, for the case
        that its owner is gone then too (keep=False: they do not). checkpoint: what `Session.export` gave, of a session
        that this one goes on from. turn: whether and how it waits where no place is free; cancelled, it waits
        no more. Raises SessionExists, UnknownModel, TooManySessions, TimedOut (it has waited too long), InvalidInput
        (also where several models are served, and none is named), Unavailable, StateLost (a checkpoint that is damaged,
        or of a model that is not served).
        """
        name = session or uuid4().hex
        at, claim = 0, None
        state = None if initial_state is None else tuple(np.asarray(array) for array in initial_state)
        _check_sendable(name, state)
        if checkpoint is not None:
            if state is not None:
                raise InvalidInput("an initial_state and a checkpoint were given: a session begins with one of them")
            found = decode_checkpoint(checkpoint)
            at, state, model = found.at, found.state, model or found.model
            claim = Claim(NEW, found.fingerprint)
        while True:
            grant = await self._place(Ask(name, self.sender, model, {}, resumable, claim, turn))
            try:
                return await self._open_at(grant, state, resumable, at, keep)
            except StateLost:
                self._ended.setdefault(grant.owner.name, []).append(grant.epoch)
                await self._directory.lost(grant.owner.name)  # and it places the session elsewhere, or says it cannot
            except LockstepError:
                self._ended.setdefault(grant.owner.name, []).append(grant.epoch)
                raise

    async def begin(self, name: str, model: str | None, turn: Turn = USUAL, *, resumable: bool = False) -> Session:
        """As `open`, without waiting for the owner: what is submitted goes there with the opening. None is kept.

        What the owner refuses it with ends the session. Raises what the directory refuses it with.
        """
        grant = await self._place(Ask(name, self.sender, model, {}, resumable, turn=turn))
        session, outbox = await self._session_at(grant)
        self._begin_at(session, outbox, resumable=resumable)
        return session

    def begin_ahead(self, name: str, model: str | None) -> Session | None:
        """As `begin`, under a name that nobody else has, nor asks for, and at once; None where it cannot be."""
        if self._stopped or (grant := self._ahead.take(model)) is None:
            return None
        outbox = self._outboxes.get(grant.owner.name) or self._add_outbox(grant.owner)
        if outbox.failed:
            self._ahead.give_back(grant)
            self._ahead.drop(grant.owner.name)
            return None
        session = self._session(replace(grant, session=name), outbox)
        self._begin_at(session, outbox, resumable=False)
        return session

    def _begin_at(self, session: Session, outbox: Outbox, *, resumable: bool) -> None:
        session.begin_at(0)
        self._take_in(session, resumable=resumable)
        self._start(self._confirm(session, outbox.open(session, Open(session.epoch, session.name))))

    async def _place(self, ask: Ask) -> Grant:
        """The grant of a new session, when it is its turn. If this is cancelled then no place is taken."""
        began = time.monotonic()
        while True:
            if self._stopped:
                raise Unavailable(STOPPED)
            ended, self._ended = self._ended, {}
            ask = ask._replace(ended=ended, waited_s=time.monotonic() - began)
            asking = asyncio.ensure_future(self._directory.open(ask))
            try:
                return await asyncio.shield(asking)
            except asyncio.CancelledError:
                giving_back = asyncio.create_task(self._give_back(asking), context=contextvars.Context())
                self._giving_back.add(giving_back)
                giving_back.add_done_callback(self._giving_back.discard)
                raise
            except Unavailable:  # who knows whether it has heard
                self._have_ended(ended)
                raise
            except TooManySessions as error:
                if "ask_again_s" not in error.details:
                    raise
                ask_again_s = error.details["ask_again_s"]
            await asyncio.sleep(ask_again_s)

    async def _open_ahead(self, model: str | None, places: int, unused: dict[str, list[int]]) -> Sequence[Grant]:
        """See GrantsAhead."""
        ended, self._ended = self._ended, {}
        try:
            return await self._directory.open_ahead(Ahead(self.sender, model, places, unused, ended))
        except Unavailable:
            self._have_ended(ended)
            raise

    async def _give_back(self, asking: Awaitable[Grant]) -> None:
        with suppress(LockstepError):
            grant = await asking
            await self._directory.release(grant.session, grant.epoch)

    async def _confirm(self, session: Session, opening: Awaitable[Notice]) -> None:
        try:
            await opening
        except LockstepError as error:
            session.is_unopened = True
            self._lost(session.owner, session, error)

    async def resume(self, name: str, acked: int, rewind: int = 0, *, keep: bool = True) -> Session:
        """Go on with a session whose client has lost its way in, this one or another.

        The client has the outputs below `acked` (UNKNOWN: those that it has acknowledged), and knows of `rewind` failed
        steps. Where the owner is gone too, the session is restored from the checkpoint that is kept of it. Raises
        InvalidInput for one that was not opened for that, UnknownSession, NotOwner (another resumes it, too),
        StateLost, Unavailable. keep: see `open`. Once begun it is done, though this is cancelled: the session may just
        change hands.
        """
        if not (UNKNOWN <= acked < 2**63 and 0 <= rewind < 2**63):
            raise InvalidInput(f"session {name!r} is resumed from {acked} after {rewind} failed steps: no such numbers")
        if self._stopped:
            raise Unavailable(STOPPED)  # before its owner is told to give it to this side
        if name in self._resuming:
            raise NotOwner(f"session {name!r} is just being resumed: try again in a moment")
        self._resuming.add(name)
        resuming = self._start(self._resume(name, acked, rewind, keep))
        resuming.add_done_callback(lambda _: self._resuming.discard(name))
        try:
            return await asyncio.shield(resuming)
        except asyncio.CancelledError:
            if resuming.cancelled():
                raise Unavailable(STOPPED) from None
            raise

    async def _resume(self, name: str, acked: int, rewind: int, keep: bool) -> Session:
        held = self._sessions.get(name)
        if held is not None and not held.stays:
            raise InvalidInput(f"session {name!r} was not opened to be resumed: open it with resumable=true")
        try:
            grant, before = await self._directory.attach(name, self.sender)
        except UnknownSession as error:
            if held is None or held.epoch < error.details.get("epoch", 0) or held.next < acked:  # it went on elsewhere
                return await self._restore(name, acked, rewind)
            held.is_unconfirmed = True
        else:
            if held is None or before != grant.epoch:  # another sender has had it since
                return await self._adopt_or_restore(grant, before, acked, rewind, keep)
            held.is_unconfirmed = False
        if held.leave is not None:
            held.leave()
        held.returned(acked)
        return held

    async def _adopt_or_restore(self, grant: Grant, before: int, acked: int, rewind: int, keep: bool) -> Session:
        """Take over from another sender; if the owner does not answer, or has it not, from the kept checkpoint."""
        try:
            return await self._adopt(grant, before, acked, keep)
        except LockstepError as error:
            await self._let_go(grant, error)
        return await self._restore(grant.session, acked, rewind)

    async def _let_go(self, grant: Grant, error: LockstepError) -> None:
        """Tell the directory that nothing has come of a grant, and if the owner is gone."""
        if isinstance(error, StateLost):
            await self._directory.lost(grant.owner.name)
        await self._directory.release(grant.session, grant.epoch)

    async def _restore(self, name: str, acked: int, rewind: int) -> Session:
        """Open a session anew from the checkpoint that is kept of it."""
        epoch, record = await self._directory.fetch(name)
        kept = decode_checkpoint(record, name)
        if acked == UNKNOWN:
            acked = kept.at
        if acked < kept.at:
            raise InvalidInput(
                f"session {name!r} goes on from timestep {kept.at}: its outputs from {acked} on were acknowledged, and "
                "are gone"
            )
        claim = Claim(epoch, kept.fingerprint)
        while True:
            grant = await self._directory.open(Ask(name, self.sender, kept.model, {}, resumable=True, claim=claim))
            try:
                return await self._restore_at(grant, kept.at, kept.state, acked, rewind)
            except LockstepError as error:
                await self._let_go(grant, error)
                if not isinstance(error, StateLost):
                    raise
                claim = Claim(grant.epoch, kept.fingerprint)

    async def _restore_at(self, grant: Grant, at: int, state: State, acked: int, rewind: int) -> Session:
        session, outbox = await self._session_at(grant, state)
        session.restore(at, acked, rewind)
        session.stays = True
        await outbox.open(session, Open(grant.epoch, session.name, state, at, rewind=rewind, acked=acked))
        self._take_in(session, resumable=True)
        self._keep(session, grant.owner, at)
        return session

    async def _adopt(self, grant: Grant, before: int, acked: int, keep: bool) -> Session:
        """Take over from another sender, which has it under the epoch `before`."""
        session, outbox = await self._session_at(grant)
        session.adopt(max(0, acked))
        session.stays = True
        opened = await outbox.open(session, Open(grant.epoch, grant.session, adopts=before, acked=acked))
        session.adopted(opened.progress, opened.rewind, opened.acked)
        self._take_in(session, resumable=True)
        if keep:
            self._keep(session, grant.owner, 0)
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

    def find(self, name: str) -> Session | None:
        """See `get`; None for a session of another sender, or of none. Raises SessionEnded."""
        try:
            return self.get(name)
        except UnknownSession:
            return None

    async def describe(self, name: str) -> Described:
        """A session of whatever sender. Raises UnknownSession."""
        return await self._directory.describe(name)

    async def sessions(self, after: str, limit: int) -> list[Described]:
        """Sessions of all senders: `limit` at most, by name, from the first that comes after `after` on."""
        return await self._directory.sessions(after, limit)

    async def drop(self, name: str) -> None:
        """Abort a session of whatever sender, which hears of it.

        Raises UnknownSession, NotOwner while it is being opened, or moves.
        """
        grant = await self._directory.drop(name)
        if grant is not None:
            await self._tell_owner(grant, ABORT)

    async def discard(self, name: str, sender: str) -> None:
        """End what is left of a session whose sender is gone, that one: its name is free for a session from here.

        Raises NotOwner where it was about to move, which nobody does any more: the next call ends it.
        """
        with suppress(UnknownSession):
            described = await self._directory.describe(name)
            if described.sender != sender:
                return
            grant = await self._directory.drop(name)
            if grant is not None and grant.epoch == described.epoch:
                try:
                    await self._tell_owner(grant, ABORT)
                except (StateLost, NotOwner) as error:  # its owner does not have it any more
                    if "moving" in error.details:  # and its sender may live, and have it go on
                        await self._directory.attach(name, self.sender)
                        raise
                self.has_ended(grant.owner.name, grant.epoch)

    async def migrate(self, name: str, to: str | None = None) -> str:
        """Have a session of whatever sender go on at another owner, `to` or any; returns at which it was.

        It moves with its state, in a moment: nothing runs again. Raises UnknownSession, NotOwner (it moves already, or
        waits to be resumed), InvalidInput where it cannot go, Unavailable.
        """
        grant = await self._directory.migrate(name, to)
        await self._tell_owner(grant, MOVE)
        return grant.owner.name

    async def _tell_owner(self, grant: Grant, close: int) -> None:
        """Ask an owner for something, beside whoever sends to the session.

        Raises NotOwner; with `moving` in its details where the owner has given back what it was to end.
        """
        channel = self._directory.connect(grant.owner)
        columns = np.array([[0], [grant.epoch], [0], [0], [close], [0]], np.int64)
        none = np.empty((0, *grant.owner.spec.input.shape), grant.owner.spec.input.dtype)
        try:
            answer = await channel.call(Frame(grant.owner.name, uuid4().hex, columns, none))
        finally:
            await channel.close()
        for notice in answer.notices:
            if notice.kind == "moving" and close == ABORT:
                raise NotOwner(
                    f"session {grant.session!r} is just moving from {grant.owner.name!r}: try again in a moment",
                    moving=True,
                )
            if notice.error is not None and notice.error["code"] == NotOwner.code:
                raise NotOwner(
                    f"session {grant.session!r} is being opened at {grant.owner.name!r}, or moved there: try again in "
                    f"a moment; if nothing comes of it the name is free within a minute ({notice.error['message']})"
                )

    async def models(self) -> dict[str, ModelSpec]:
        """The models that can be asked for."""
        return await self._directory.models()

    async def statistics(self) -> dict[str, SessionStatistics]:
        """Of the sessions of each model, of all senders."""
        return await self._directory.statistics()

    @property
    def num_sessions(self) -> int:
        """Sessions that this side holds."""
        return len(self._sessions)

    async def stop(self) -> None:
        """Give everything up; sessions that are still open fail, and no other is opened."""
        self._stopped = True
        await self._keeper.stop()
        await self._ahead.stop()
        tasks = [*self._tasks, *filter(None, [self._watching])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for outbox in list(self._outboxes.values()):
            await outbox.stop()
        if self._giving_back:
            await asyncio.wait(self._giving_back, timeout=GIVE_BACK_WITHIN_S)

    async def _open_at(self, grant: Grant, state: State, resumable: bool, at: int, keep: bool) -> Session:
        session, outbox = await self._session_at(grant, state)
        session.begin_at(at)
        await outbox.open(session, Open(grant.epoch, grant.session, state, at, acked=at))
        self._take_in(session, resumable)
        if resumable and keep:
            self._keep(session, grant.owner, at)
        if session.kept is not None:
            self._keeper.keep(session, at, state)
        return session

    async def _session_at(self, grant: Grant, state: State = None) -> tuple[Session, Outbox]:
        """This side of a session that its owner has yet to take in, and the way there."""
        owner = grant.owner
        try:
            outbox = await self._outbox(owner)
        except Unavailable:  # stopped since, and nobody else tells of the grant
            await self._directory.release(grant.session, grant.epoch)
            raise
        except asyncio.CancelledError:
            self.has_ended(owner.name, grant.epoch)
            raise
        return self._session(grant, outbox, state), outbox

    def _session(self, grant: Grant, outbox: Outbox, state: State = None) -> Session:
        owner = grant.owner
        session = Session(
            grant.session, owner.spec, owner.limits, outbox, epoch=grant.epoch, ack_on_receipt=self._ack_on_receipt,
            initial_state=state, retains=owner.checkpoints,
        )  # fmt: skip
        session.owner = owner.name
        return session

    def _take_in(self, session: Session, resumable: bool) -> None:
        """Its owner has it: see to it from now on."""
        self._sessions[session.name] = session
        session.stays = resumable

    def _keep(self, session: Session, owner: Owner, kept: int) -> None:
        if owner.checkpoints:
            session.keep_with(self._keeper.keep, kept)

    async def _outbox(self, owner: Owner) -> Outbox:
        while (outbox := self._outboxes.get(owner.name)) is not None and outbox.failed:
            await outbox.stop()
            if self._outboxes.get(owner.name) is outbox:  # others wait for the same
                del self._outboxes[owner.name]
        if self._stopped:
            raise Unavailable(STOPPED)
        return self._add_outbox(owner) if outbox is None else outbox

    def _add_outbox(self, owner: Owner) -> Outbox:
        channel = self._directory.connect(owner)
        forget, lost = partial(self._forget, owner.name), partial(self._lost, owner.name)
        self._num_outboxes += 1  # an owner that was given up may live, and answer calls that nobody hears
        sender = f"{self.sender}/{self._num_outboxes}"
        outbox = Outbox(owner.name, sender, owner.spec, owner.max_bytes, channel, forget, lost)
        self._outboxes[owner.name] = outbox
        if self._watching is None:
            watching = asyncio.get_running_loop().create_task(self._watch(), context=contextvars.Context())
            self._watching = watching
        return outbox

    async def _watch(self) -> None:
        """Ask after owners that are late: one that stands still has its connections, and says nothing.

        Let go of the ways to owners that nobody needs: each load of a model brings owners of other names.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self._look_after()
            except Unavailable:
                pass  # the directory starts again
            except Exception:
                logger.exception("the ways to owners cannot be looked after, trying again")

    async def _look_after(self) -> None:
        unused = [owner for owner, outbox in self._outboxes.items() if outbox.is_unused]
        for outbox in [self._outboxes.pop(owner) for owner in unused]:  # all at once: one may be used meanwhile
            await outbox.stop()
        late = {owner: outbox for owner, outbox in self._outboxes.items() if outbox.is_late}
        for owner in await self._directory.gone([*late]) if late else []:
            late[owner].fail(StateLost(f"owner {owner!r} has not been heard of: its lease is over"))

    def _lost(self, owner: str, session: Session, error: LockstepError) -> None:
        """The owner is gone, or going: let the session go on elsewhere, or fail."""
        if session.end_reason is None:
            self._ahead.drop(owner)
        if not session.can_move or not isinstance(error, StateLost | Unavailable):
            self._give_up(owner, session, error)
            return
        self._start(self._move(owner, session, error))

    def _start(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        """In a context of its own: it must not die with the request that it is begun in."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _move(self, owner: str, session: Session, error: LockstepError) -> None:
        """Open the session at another owner, from its last checkpoint on; wait for one while there is none."""
        session.carrier = NOWHERE
        deadline, name = time.monotonic() + MOVE_WITHIN_S, owner
        is_lost = isinstance(error, StateLost)  # else it has given the session back
        try:
            while session.can_move:
                try:
                    ask = Ask(
                        session.name, self.sender, session.spec.name, {}, session.stays, Claim(session.epoch),
                        lost=name if is_lost else "",
                    )  # fmt: skip
                    grant = await self._directory.open(ask)
                    is_lost, name = False, grant.owner.name
                    session.epoch, session.owner = grant.epoch, name
                    outbox = await self._outbox(grant.owner)
                    at, state = session.restore_point()
                    opening = Open(grant.epoch, session.name, state, at, rewind=session.rewind, acked=session.acked)
                    await outbox.open(session, opening)
                except StateLost:
                    is_lost = True
                except (Unavailable, TooManySessions):  # for now: replicas and the directory start again
                    if time.monotonic() > deadline:
                        break
                    await asyncio.sleep(RETRY_MOVE_S)
                else:
                    session.moved(outbox, at)
                    return
            self._give_up(name, session, error)
        except LockstepError as failure:
            self._give_up(name, session, failure)
        except Exception:
            logger.exception("session %r cannot go on at another owner", session.name)
            self._give_up(name, session, error)
        except asyncio.CancelledError:
            self._give_up(name, session, error)
            raise

    def _give_up(self, owner: str, session: Session, error: LockstepError) -> None:
        """It cannot go on here. Its client may have it from the checkpoint that is kept."""
        if session.can_return and isinstance(error, StateLost | Unavailable):
            session.fail(Unavailable(f"the session cannot go on here, resume it: {error}"))
            self._remember(session)
        else:
            session.fail(error)
            self._forget(owner, session)

    def _superseded(self, session: Session, epoch: int) -> None:
        """Another sender has gone on with the session since that epoch: what is here of it is over.

        One that moves meanwhile hears of it from the directory.
        """
        if session.epoch == epoch and session.carrier is not NOWHERE and session.end_reason is None:
            if session.leave is not None:
                session.leave()
            session.abort()

    def has_ended(self, owner: str, epoch: int) -> None:
        """Let the directory know, with the next session that opens, so that the name is free again."""
        self._ended.setdefault(owner, []).append(epoch)

    def _have_ended(self, ended: dict[str, list[int]]) -> None:
        """As `has_ended`, of some that the directory was not told of."""
        for owner, epochs in ended.items():
            self._ended.setdefault(owner, []).extend(epochs)

    def _forget(self, owner: str, session: Session) -> None:
        """It is over."""
        self._remember(session)
        self._ended.setdefault(owner, []).append(session.epoch)

    def _remember(self, session: Session) -> None:
        """It is here no longer; say so to those who ask late."""
        if self._sessions.get(session.name) is session:
            del self._sessions[session.name]
            if session.end_reason != ADOPTED:
                self._past[session.name] = session.end_reason or "unknown"
            if len(self._past) > MAX_REMEMBERED:
                self._past.popitem(last=False)


def _check_sendable(name: str, state: State) -> None:
    """What cannot be written into a frame would end all sessions that share it. Raises InvalidInput."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"session {name!r} is no text that UTF-8 has: {error}") from error
    for i, array in enumerate(state or ()):
        if array.dtype.hasobject:
            raise InvalidInput(f"initial_state[{i}] holds objects, expected numbers: give it the dtype of the model's")
