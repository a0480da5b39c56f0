"""Which owner holds which session: the one place that knows. Pure; an actor wraps it.

Asked when a session opens or ends, never per segment. Every grant has an epoch of its own, higher than all before.
Of resumable sessions it knows too of which a checkpoint is kept: those outlive their owner, and whoever sends to it.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from serve_app.checkpoint_store import key_of
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    NotOwner,
    SessionExists,
    StateLost,
    TimedOut,
    TooManySessions,
    Unavailable,
    UnknownModel,
    UnknownSession,
)
from serve_app.lease import LEASE_S, MARGIN_S
from serve_app.policy.autoscaling import IDLE, Demand, Load, Scaling, wanted_replicas
from serve_app.policy.placement import choose_owner, moves_of
from serve_app.policy.session_queue import ASK_AGAIN_S, NO_QUEUE, QueueLimits, SessionQueue, retry_after_s
from serve_app.spec import ModelSpec, SessionLimits, newest_first, split_name

FREED_KEPT = 64
SETTLED_S = 2.0
"""After an owner has come its sessions come: with others that start at the same time, or they would move twice."""
REFUSED_WITHIN_S = 10.0
"""So long it counts that a session was refused since all owners were full."""
TAKEN_WITHIN_S = 60.0
"""An owner has said by then that it has taken a session in, or never will."""
ARRIVE_WITHIN_S = 5.0
"""Sessions that an owner was to give back have gone on elsewhere by then, or never will."""
MIN_FREE = 256
"""None is granted ahead where fewer places are free: sessions that come at once might find none."""
UNUSED_WITHIN_S = 3.0
"""A sender that lives has given back by then what it was granted ahead, and has not used."""
GONE_KEPT = 256
"""So many owners that were given up last may come again, with all that has ended at them: it is counted once."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A replica that takes sessions. `address` is how senders reach it, `max_bytes` what a frame to it may hold.

    checkpoints: it sends states with its outputs, from which a session can go on elsewhere. models: all that its
    application serves, whether their replicas run or not. queue: of sessions of its model that find no place.
    moves_per_s: so many of its model's go on elsewhere at most, where owners have unequal numbers (0: none).
    scaling: how many owners there should be; None where that is fixed.
    """

    name: str
    address: str
    spec: ModelSpec
    limits: SessionLimits
    max_sessions: int
    max_bytes: int
    checkpoints: bool = False
    models: tuple[str, ...] = ()
    queue: QueueLimits = NO_QUEUE
    moves_per_s: int = 0
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """A session's owner, and the epoch under which it owns it."""

    session: str
    epoch: int
    owner: Owner


@dataclass(frozen=True, slots=True)
class Record:
    """What the directory knows of a session: who holds it, who sends to it, whether another sender may go on with it.

    owner: None when that is gone, and the session waits for whoever comes back for it. since: of which
    epoch it was certain that it was the session's last; one of an earlier directory may not have been. before: the
    epoch that this one follows, by the same sender.
    """

    epoch: int
    owner: str | None
    sender: str
    since: int
    resumable: bool = False
    before: int = -1


class Described(NamedTuple):
    """A session, for whoever looks after the application. model, owner: None while it waits to be resumed."""

    session: str
    model: str | None
    owner: str | None
    sender: str
    epoch: int
    resumable: bool


NEW = -1
AHEAD = ""
"""The session of a grant that has yet to get one."""


class Claim(NamedTuple):
    """Someone who goes on with a session: the last epoch that it knows of; NEW for a session that begins with a state.

    fingerprint: of the model of a checkpoint, for a client that has come back; "" for a sender that had it all along.
    """

    epoch: int
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """What a new session says for the case that no place is free. Raises InvalidInput.

    `priority`: from 1, the highest (0: the model's default). `max_wait_s`: if that is less than what the model allows.
    """

    priority: int = 0
    max_wait_s: float = math.inf

    def __post_init__(self) -> None:
        if self.priority < 0 or not self.max_wait_s >= 0:
            raise InvalidInput(
                f"priority is {self.priority} and max_wait_s {self.max_wait_s}, expected a whole number from 1 on, the "
                "highest, and seconds from 0 on"
            )


USUAL = Turn()


class Ask(NamedTuple):
    """What `Directory.open` is asked. `ended`: epochs, by owner, that the sender has seen end before.

    turn, waited_s: of a new session; what it says for the case that no place is free, and how long it has waited.
    lost: the owner that the session was at, where the sender cannot reach it any more.
    """

    session: str
    sender: str
    model: str | None
    ended: Mapping[str, Collection[int]]
    resumable: bool = False
    claim: Claim | None = None
    turn: Turn = USUAL
    waited_s: float = 0.0
    lost: str = ""


class Ahead(NamedTuple):
    """What `Directory.open_ahead` is asked. `ended`: see Ask.

    unused: epochs, by owner, of places granted ahead in which no session has begun, nor will.
    """

    sender: str
    model: str | None
    places: int
    unused: Mapping[str, Collection[int]]
    ended: Mapping[str, Collection[int]]


class SessionStatistics(NamedTuple):
    """Of the sessions of a model: how many are open, and wait to be, now; the others since the directory started.

    refused: by error, those that found no place; ended: by reason, as owners say it.
    """

    open: int
    waiting: int
    opened: int
    refused: Mapping[str, int]
    ended: Mapping[str, int]


class Held(NamedTuple):
    """A session that a sender wants a checkpoint kept of: at which owner, under which epoch."""

    epoch: int
    owner: str


Slab = Mapping[str, tuple[Held, bytes]]
"""Checkpoints of many sessions, as `serve_app.checkpoint` encodes them."""


@dataclass(slots=True)
class _Tally:
    """Of a model. freed: when places for sessions last became free; ends: by reason, of each owner there is and of
    the last GONE_KEPT that are gone; ended: of those gone before.

    may_move: sessions that may be moved, as of `moves_at`; refused_at: when one last found no place; joined_at: when
    the last owner came.
    """

    queue: SessionQueue = field(default_factory=SessionQueue)
    freed: deque[float] = field(default_factory=lambda: deque(maxlen=FREED_KEPT))
    opened: int = 0
    moved: int = 0
    may_move: float = 0.0
    moves_at: float = -math.inf
    refused_at: float = -math.inf
    joined_at: float = -math.inf
    refused: Counter[str] = field(default_factory=Counter)
    ends: dict[str, Mapping[str, int]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)


class Directory:
    """Owners by name, sessions by id. Epochs start at `incarnation` << 24: a later directory grants higher ones.

    Owners work under leases (see serve_app.lease): one that has not been heard of for longer is given up.

    `kept`: under which keys checkpoints are there from before. One that no owner's session has is given up after
    `keep_s`.
    """

    def __init__(self, incarnation: int, now: float = 0.0) -> None:
        self.incarnation = incarnation
        self._first_epoch = self._last_epoch = incarnation << 24
        self._owners: dict[str, Owner] = {}
        self._heard: dict[str, float] = {}  # when of each owner
        self._targets: dict[str, str] = {}  # where sessions are to move
        self._loads: dict[str, Load] = {}  # what owners say of themselves
        self._leaving: dict[str, tuple[int, float]] = {}  # how many an owner was to give back, when it was last told
        self._suspects: set[str] = set()  # owners that somebody cannot reach, until they are heard of
        self._retiring: set[str] = set()  # owners that are about to leave
        self._asked_at = self._awake_since = -math.inf
        self._unloaded: dict[str, bool] = {}  # models, and whether their owners are gone
        self._tallies: dict[str, _Tally] = {}  # by model
        self._sessions: dict[str, Record] = {}
        self._held: dict[str | None, dict[int, str]] = {None: {}}  # by owner: epoch -> session
        self._ahead: dict[str, dict[int, str]] = {}  # places granted ahead, by owner: epoch -> sender
        self._kept: set[str] = set()  # keys
        self._waiting: dict[str, float] = {}  # since when no owner has the session, by key: some of those kept
        self._untaken: dict[int, tuple[str, float]] = {}  # by epoch, in order: since when no owner has said it has it
        self._unkept: set[int] = set()  # epochs that waited for an owner at the last look, without a checkpoint
        self._keep_s = self._expire_at = math.inf
        self._now = self._started_at = now  # as it was told last

    def register(self, owner: Owner) -> None:
        """Take a new owner in. The first of a model that has none loads it."""
        if all(other.spec.name != owner.spec.name for other in self._owners.values()):
            self.load(owner.spec.name)
        self._owners[owner.name] = owner
        self._tallies.setdefault(owner.spec.name, _Tally()).joined_at = self._now
        self._held.setdefault(owner.name, {})
        self._ahead.setdefault(owner.name, {})
        self._retiring.discard(owner.name)
        self.heard(owner.name)

    def knows(self, owner: str) -> bool:
        """Whether the owner is registered."""
        return owner in self._owners

    def heard(self, owner: str) -> bool:
        """An owner is alive; False when it has to register (again)."""
        if owner not in self._owners:
            return False
        self._heard[owner] = self._now
        self._suspects.discard(owner)
        return True

    def address_of(self, owner: str) -> str | None:
        """Where an owner can be reached; None when it is not registered."""
        return self._owners[owner].address if owner in self._owners else None

    def suspect(self, owner: str) -> None:
        """Somebody cannot reach the owner: nothing is placed there until it is heard of."""
        if owner in self._owners:
            self._suspects.add(owner)

    def retire(self, owner: str) -> bool:
        """Place nothing at the owner any more, which is about to leave; whether others can take its sessions."""
        if (one := self._owners.get(owner)) is None:
            return False
        self._retiring.add(owner)
        others = (name for name, other in self._owners.items() if _alike(one, other))
        return one.checkpoints and any(map(self._is_free, others))

    def _is_free(self, owner: str) -> bool:
        return owner not in self._suspects and owner not in self._retiring

    def tick(self, now: float) -> None:
        """It is as late as that: give up the owners whose leases are over, and sessions that no owner has taken in.

        None when this directory itself may have stood still, and what owners have said meanwhile waits to be heard.
        """
        if now - self._asked_at > MARGIN_S:
            self._awake_since = now
        self._asked_at = self._now = now
        if now - self._awake_since > MARGIN_S:
            for owner in [owner for owner, heard in self._heard.items() if now - heard > LEASE_S + MARGIN_S]:
                self.unregister(owner)
            self._give_up_untaken()

    def gone(self, owners: Iterable[str]) -> list[str]:
        """Which of these have no lease any more. A directory that has just started cannot tell."""
        if self._has_just_started:
            return []
        return [owner for owner in owners if owner not in self._owners]

    @property
    def _has_just_started(self) -> bool:
        return self._now - self._started_at <= LEASE_S + MARGIN_S

    def unregister(self, owner: str) -> int:
        """The owner is gone, and with it its sessions that are not resumable; returns how many it had."""
        if (one := self._owners.pop(owner, None)) is not None:
            self._fold_ends(owner, self._tallies[one.spec.name])
        self._heard.pop(owner, None)
        self._suspects.discard(owner)
        self._retiring.discard(owner)
        self._leaving.pop(owner, None)
        self._loads.pop(owner, None)
        self._ahead.pop(owner, None)
        lost = self._held.pop(owner, {})
        for session in lost.values():
            self._orphan(session)
        return len(lost)

    def _fold_ends(self, owner: str, tally: _Tally) -> None:
        """Of an owner that is gone now."""
        tally.ends[owner] = tally.ends.pop(owner, {})  # the last of those
        gone = [name for name in tally.ends if name not in self._owners]
        for name in gone[:-GONE_KEPT]:
            tally.ended.update(tally.ends.pop(name))

    def open(
        self,
        session: str,
        sender: str,
        model: str | None = None,
        *,
        resumable: bool = False,
        claim: Claim | None = None,
        turn: Turn = USUAL,
        waited_s: float = 0.0,
    ) -> Grant:
        """Place a new session, or one that goes on elsewhere: whose `claim` is of the last epoch there is.

        Raises SessionExists, NotOwner (another has gone on with it), UnknownModel, InvalidInput (there are several
        models, and none is named), StateLost (no replica has the model that the claim's state is of), Unavailable (no
        owner yet), TooManySessions (details: ask_again_s where a new session may wait: to be asked for again after
        that; else retry_after_s), TimedOut (it has waited too long).
        """
        record = self._sessions.get(session)
        is_new = claim is None or claim.epoch == NEW
        if claim is not None and not is_new and record is not None:
            asks_again = record.sender == sender and record.before == claim.epoch  # it has not heard of its grant
            if not (asks_again or self._may_go_on(record, claim.epoch)):
                raise NotOwner(f"session {session!r} has gone on elsewhere under epoch {record.epoch}: resume it there")
        if is_new and record is not None and record.owner is not None:
            raise SessionExists(
                f"session {session!r} is open already at {record.owner!r}: close it, or choose another id"
            )
        if is_new and key_of(session) in self._kept:
            raise SessionExists(f"session {session!r} waits to be resumed: do that, or choose another id")
        before = None if record is None else record.owner
        serving = self._serving(session, model, claim)
        if before in self._owners:
            serving = {name: one for name, one in serving.items() if _alike(one, self._owners[before])} or serving
        if is_new and (unloaded := {owner.spec.name for owner in serving.values()} & self._unloaded.keys()):
            raise Unavailable(f"model {unloaded.pop()!r} is unloaded: load it before a session starts")
        load, limits = self._filled(serving)
        if is_new:
            self._line_up(
                (session, sender), serving, sum(max(0, limits[name] - load[name]) for name in load), turn, waited_s
            )
        if before in load:
            load[before] -= 1  # its own place
        elsewhere = {name: count for name, count in load.items() if name != before}
        target = self._targets.pop(session, "")
        if elsewhere.get(target, math.inf) < limits.get(target, 0):
            chosen: str | None = target
        else:
            chosen = choose_owner(elsewhere, limits) or choose_owner(load, limits)
        if chosen is None:
            raise TooManySessions(
                f"{sum(load.values())} sessions are open, all that the replicas take: try again later, or raise "
                "session.max_sessions or replicas"
            )
        epoch = since = self._next_epoch(session)
        if claim is not None and not claim.fingerprint:
            since = record.since if record is not None and record.epoch == claim.epoch else claim.epoch
        followed = NEW if claim is None else claim.epoch
        self._put(session, Record(epoch, chosen, sender, since, resumable, followed))
        if record is None and claim is not None:
            for each in self._ahead:
                self._begun_ahead(each, claim.epoch)  # and it moves before its owner has said so
        tally = self._tallies[serving[chosen].spec.name]
        tally.opened += is_new
        if before in self._owners and before != chosen:
            tally.moved += 1
            self._leaving[before] = max(0, self._num_leaving(before) - 1), self._now
        return Grant(session, epoch, serving[chosen])

    def open_ahead(self, sender: str, model: str | None, places: int) -> list[Grant]:
        """Places for sessions that may begin at any moment, under names that nobody else has.

        As many as that, while half of all places are free, MIN_FREE at least, and nobody waits for one. A session
        counts as open from when its owner has taken it in (see `taken`). Raises as `open` does for other reasons.
        """
        serving = self._serving("", model, None)
        served_as = next(iter(serving.values())).spec.name
        queue = self._tallies[served_as].queue
        queue.forget_gone(self._now)
        if len(queue) or served_as in self._unloaded:
            return []
        load, limits = self._filled(serving)
        num_all = sum(limits.values())
        num_free = num_all - sum(load.values())
        grants: list[Grant] = []
        while len(grants) < min(places, num_free - max(MIN_FREE, num_all // 2)):
            chosen = choose_owner(load, limits)
            assert chosen is not None
            load[chosen] += 1
            epoch = self._next_epoch(AHEAD)
            self._ahead[chosen][epoch] = sender
            grants.append(Grant(AHEAD, epoch, serving[chosen]))
        return grants

    def unused(self, epochs: Mapping[str, Collection[int]]) -> None:
        """No session has begun, or will, in these places that were granted ahead; by owner."""
        for owner, some in epochs.items():
            for epoch in some:
                self._ahead.get(owner, {}).pop(epoch, None)

    def _filled(self, serving: Mapping[str, Owner]) -> tuple[dict[str, int], dict[str, int]]:
        """Of each owner, how many sessions it has, or may have in a moment, and how many it takes."""
        load = {name: len(self._held[name]) + len(self._ahead[name]) for name in serving}
        return load, {name: owner.max_sessions for name, owner in serving.items()}

    def _next_epoch(self, session: str) -> int:
        """Of a grant, which an owner is to take up."""
        self._last_epoch += 1
        self._untaken[self._last_epoch] = session, self._now
        return self._last_epoch

    def _line_up(
        self, who: tuple[str, str], serving: Mapping[str, Owner], num_free: int, turn: Turn, waited_s: float
    ) -> None:
        """See `open`: raises unless one of the free places is for this session."""
        one = next(iter(serving.values()))
        limits, tally = one.queue, self._tallies[one.spec.name]
        ahead = tally.queue.ask(who, turn.priority or limits.default_priority, waited_s, self._now) - num_free
        if ahead < 0:
            tally.queue.leave(who)
            return
        max_wait_s = min(limits.max_wait_s, turn.max_wait_s)
        num_open = sum(len(self._held[name]) for name in serving)
        num_ahead = sum(len(self._ahead[name]) for name in serving)
        promised = f" and {num_ahead} about to be" if num_ahead else ""
        text = f"{num_open} sessions are open{promised}, all that the replicas take"
        wait_s, max_waiting = max_wait_s, limits.max_waiting
        if ahead < num_ahead:  # it finds a place unless they are used
            wait_s, max_waiting = min(turn.max_wait_s, max(max_wait_s, UNUSED_WITHIN_S)), num_ahead
        if waited_s < wait_s and ahead < max_waiting:
            ask_again_s = min(ASK_AGAIN_S, wait_s - waited_s)
            raise TooManySessions(f"{text}, and {ahead} wait before this one", ask_again_s=ask_again_s)
        tally.queue.leave(who)
        error: type[LockstepError] = TooManySessions
        if waited_s >= max_wait_s > 0:
            error, text = TimedOut, f"the session has waited {waited_s:.1f} s for a place, and {text}"
        elif max_wait_s > 0:
            text += f", and {limits.max_waiting} wait, all that session.max_waiting allows"
        tally.refused[error.code] += 1
        tally.refused_at = self._now
        raise error(
            f"{text}: try again later, or raise session.max_sessions or replicas",
            retry_after_s=retry_after_s(tally.freed, ahead, self._now),
        )

    def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        """Let a sender go on with a session at its owner, under a new epoch; and the old one.

        The sender that has it already keeps its epoch. Raises UnknownSession, with the epoch of one that waits for an
        owner; InvalidInput for one that was not opened to be resumed.
        """
        record = self._sessions.get(session)
        if record is None or record.owner is None:
            epoch = 0 if record is None else record.epoch
            raise UnknownSession(f"session {session!r} has no owner: open it first", epoch=epoch)
        if not record.resumable:
            raise InvalidInput(f"session {session!r} was not opened to be resumed: open it with resumable=true")
        owner, epoch = self._owners[record.owner], record.epoch
        if record.sender != sender:
            epoch = self._next_epoch(session)
            self._put(session, replace(record, epoch=epoch, sender=sender, before=NEW))
        return Grant(session, epoch, owner), record.epoch

    def release(self, session: str, epoch: int) -> None:
        """A grant has come to nothing: the session waits for whoever goes on with it. No error for an earlier one."""
        record = self._sessions.get(session)
        if record is not None and record.epoch == epoch:
            if key_of(session) in self._kept:
                self._orphan(session)
            else:
                self._forget(session)  # only who had it before can go on with it

    def taken(self, owner: str, sessions: Iterable[tuple[int, str]]) -> None:
        """An owner has taken these sessions in: their epochs, and names. Of a place granted ahead that is news."""
        for epoch, session in sessions:
            self._untaken.pop(epoch, None)
            sender = self._begun_ahead(owner, epoch)
            if sender is not None and session not in self._sessions:
                self._put(session, Record(epoch, owner, sender, epoch))

    def _begun_ahead(self, owner: str, epoch: int) -> str | None:
        """A session has begun, in a place granted ahead to the sender that is returned; None if it was none."""
        sender = self._ahead.get(owner, {}).pop(epoch, None)
        if sender is not None:
            self._tallies[self._owners[owner].spec.name].opened += 1
        return sender

    def _give_up_untaken(self) -> None:
        """Their senders have died before they said anything of them, or could not be answered."""
        while self._untaken:
            epoch, (session, granted_at) = next(iter(self._untaken.items()))
            if self._now - granted_at <= TAKEN_WITHIN_S:
                return
            del self._untaken[epoch]
            if session == AHEAD:
                self.unused({owner: [epoch] for owner in self._ahead})
            elif session in self._sessions and self._sessions[session].owner is not None:
                self.release(session, epoch)

    def lookup(self, session: str) -> Record:
        """What is known of a session. Raises UnknownSession."""
        if session not in self._sessions:
            raise UnknownSession(f"session {session!r} is not open: open it first")
        return self._sessions[session]

    def describe(self, session: str) -> Described:
        """What is known of a session. Raises UnknownSession."""
        record = self.lookup(session)
        owner = None if record.owner is None else self._owners.get(record.owner)
        model = None if owner is None else owner.spec.name
        return Described(session, model, record.owner, record.sender, record.epoch, record.resumable)

    def sessions(self, after: str, limit: int) -> list[Described]:
        """So many of them at most, by name, from the first that comes after `after` on."""
        names = (session for session in self._sessions if session > after)
        return [self.describe(session) for session in heapq.nsmallest(limit, names)]

    def migrate(self, session: str, to: str | None) -> Grant:
        """The grant of a session that its owner is to give back: it then goes to `to`, or where there is most room.

        Raises UnknownSession, NotOwner (it waits to be resumed), InvalidInput (it cannot go there, or nowhere at all),
        Unavailable (there is no other owner).
        """
        grant = self.grant_of(session)
        if grant is None:
            raise NotOwner(f"session {session!r} waits to be resumed: it is nowhere now")
        spec = grant.owner.spec
        if not grant.owner.checkpoints:
            raise InvalidInput(f"session {session!r} cannot move: set session.checkpoint_timesteps, which is 0")
        others = sorted(
            self._serving(session, spec.name, Claim(grant.epoch, spec.fingerprint)).keys() - {grant.owner.name}
        )
        if not others:
            raise Unavailable(f"no other replica of model {spec.name!r} is ready: try again, or raise replicas")
        if to is not None and to not in others:
            raise InvalidInput(f"session {session!r} cannot go to {to!r}, choose one of: {', '.join(others)}")
        if to is not None:
            self._targets[session] = to
        return grant

    def grant_of(self, session: str) -> Grant | None:
        """The grant that a session runs under, None while it waits to be resumed. Raises UnknownSession."""
        record = self.lookup(session)
        return None if record.owner is None else Grant(session, record.epoch, self._owners[record.owner])

    def ended(self, owner: str, epochs: Iterable[int]) -> list[str]:
        """These sessions are over, what is not known (any more) is no error; keys of checkpoints to drop.

        One that waits under a grant of an earlier directory stays: it may have gone on under a later one since.
        """
        dropped = []
        for epoch in epochs:
            self._begun_ahead(owner, epoch)  # and it has ended before its owner has said so
            session = self._held.get(owner, {}).get(epoch)
            if session is None and epoch >= self._first_epoch:
                session = self._held[None].get(epoch)
            if session is not None:
                if self._sessions[session].resumable and (key := key_of(session)) in self._kept:
                    dropped.append(key)
                self._forget(session)
        return dropped

    def drop_waiting(self, session: str) -> list[str]:
        """A session that waits is over, whichever directory has granted it; keys of checkpoints to drop."""
        key = key_of(session)
        dropped = [key] if key in self._kept else []
        self._forget(session)
        return dropped

    # Checkpoints that are kept.

    def found(self, keys: Iterable[str], keep_s: float, now: float) -> None:
        """A store has been opened, with these checkpoints in it."""
        self._waiting = dict.fromkeys(keys, now)
        self._kept = set(self._waiting)
        self._keep_s, self._expire_at, self._now = keep_s, now, now

    def keep(self, sender: str, sessions: Mapping[str, Held]) -> dict[str, LockstepError]:
        """Whose checkpoints are not to be kept, and why: another goes on with the session (NotOwner), or it is over.

        What an earlier directory has granted, and this one does not know or only an earlier grant of, it knows from now
        on.
        """
        refused: dict[str, LockstepError] = {}
        for session, (epoch, owner) in sessions.items():
            self._untaken.pop(epoch, None)
            record = self._sessions.get(session)
            if record is None and epoch >= self._first_epoch:
                refused[session] = UnknownSession(f"session {session!r} is over")
            elif record is not None and not self._may_go_on(record, epoch):
                refused[session] = NotOwner(f"session {session!r} has gone on elsewhere under epoch {record.epoch}")
            elif record is None or record.owner is None or record.epoch != epoch:
                since = record.since if record is not None and record.epoch == epoch else epoch
                known = owner if owner in self._owners else None
                self._put(session, Record(epoch, known, sender, since, resumable=True))
        return refused

    def has_kept(self, sessions: Mapping[str, Held], now: float) -> list[str]:
        """These checkpoints are in the store now; keys of those that are to be dropped again, since all is over."""
        over = []
        self._now = now
        for session, (epoch, _) in sessions.items():
            record, key = self._sessions.get(session), key_of(session)
            if record is None or record.epoch < epoch:
                over.append(key)
                continue
            self._kept.add(key)
            if record.owner is None:
                self._waiting[key] = now
        return over

    def unknown(self, sessions: Iterable[str]) -> list[str]:
        """Of which of these sessions a checkpoint is kept, and nothing else is known: `recall` them."""
        return [session for session in sessions if session not in self._sessions and key_of(session) in self._kept]

    def recall(self, session: str, epoch: int) -> None:
        """The checkpoint that is kept of a session was written under that epoch."""
        if self.unknown([session]):
            self._put(session, Record(epoch, None, "", epoch, resumable=True))

    def restorable(self, session: str) -> int:
        """The epoch to go on from with a session that has no owner. Raises UnknownSession, Unavailable, NotOwner."""
        if not self._owners:
            raise Unavailable("no replica is ready: try again in a moment")
        record = self._sessions.get(session)
        if record is not None and record.owner is not None:
            raise NotOwner(
                f"session {session!r} is held by {record.owner!r} under epoch {record.epoch}: resume it there"
            )
        if key_of(session) not in self._kept:
            raise UnknownSession(f"session {session!r} is not open, and no checkpoint of it is kept: open it first")
        return 0 if record is None else record.epoch

    def expire(self, now: float) -> Collection[str]:
        """Keys of checkpoints to drop: nobody has come back for their sessions. Looks at most every tenth of keep_s."""
        self._now = now
        if now < self._expire_at:
            return ()
        self._expire_at = now + self._keep_s / 10
        old = {key for key, since in self._waiting.items() if since < now - self._keep_s}
        for key in old:
            del self._waiting[key]
        self._kept -= old
        waiting = self._held[None]
        unkept = {epoch for epoch, session in waiting.items() if key_of(session) not in self._kept}
        for epoch in unkept & self._unkept:  # others may be kept in a moment
            self._forget(waiting[epoch])
        self._unkept = unkept
        return old

    def models(self) -> dict[str, ModelSpec]:
        """The models that are served, by name."""
        return {owner.spec.name: owner.spec for owner in self._owners.values()}

    def unloaded(self) -> dict[str, bool]:
        """The models of which no new session is placed, and whether their owners are gone."""
        return dict(self._unloaded)

    def load(self, model: str) -> None:
        """Place sessions of the model (again)."""
        self._unloaded.pop(model, None)

    def unload(self, model: str, *, gone: bool = False) -> None:
        """Place no new session of the model; `gone`: it has no owner any more."""
        self._unloaded[model] = gone

    def give_back(self, owner: str) -> int:
        """How many of its sessions the owner is to give back now, so that all of its model have as many as they can."""
        one = self._owners.get(owner)
        if one is None or not (one.checkpoints and one.moves_per_s) or not self._is_settled(one.spec.name):
            return 0
        tally = self._tallies[one.spec.name]
        tally.may_move = min(one.moves_per_s, tally.may_move + one.moves_per_s * (self._now - tally.moves_at))
        tally.moves_at = self._now
        count = self._moves(one, int(tally.may_move))[owner]
        if count:
            tally.may_move -= count
            self._leaving[owner] = self._num_leaving(owner) + count, self._now
        return count

    def _is_settled(self, model: str) -> bool:
        """Whether the last owner has been there for a while: others may be starting, at the cost of those that run."""
        return self._now - self._tallies[model].joined_at >= SETTLED_S

    def _moves(self, one: Owner, limit: int) -> Mapping[str, int]:
        """How many sessions each of the owners that are as that one is to give back; see placement."""
        names = [name for name, other in self._owners.items() if _alike(one, other) and self._is_free(name)]
        return moves_of(
            {name: len(self._held[name]) for name in names},
            {name: self._owners[name].max_sessions for name in names},
            {name: self._num_leaving(name) for name in names},
            limit,
        )

    def wanted_replicas(self, model: str, target: int) -> int:
        """How many owners a model should have, where `target` are meant to be by now; see autoscaling.

        As many as are meant to be where there is none yet, or they are not to be scaled; not fewer while some may not
        have registered again.
        """
        owners = [owner for owner in self._owners.values() if owner.spec.name == model]
        if not owners or (scaling := owners[-1].scaling) is None:
            return target
        one, tally = owners[-1], self._tallies[model]
        tally.queue.forget_gone(self._now)
        loads = []
        for owner in owners:
            load, held = self._loads.get(owner.name, IDLE), len(self._held[owner.name])
            loads.append(load._replace(sessions=max(load.sessions, held)))  # some may be older than this directory
        is_refusing = self._now - tally.refused_at <= REFUSED_WITHIN_S
        is_level = self._is_settled(model) and not self._moves(one, 1)
        demand = Demand(loads, one.max_sessions, len(tally.queue), is_refusing, is_level)
        wanted = wanted_replicas(demand, scaling, target)
        return max(wanted, target) if self._has_just_started else wanted

    def _num_leaving(self, owner: str) -> int:
        count, told_at = self._leaving.get(owner, (0, -math.inf))
        return count if self._now - told_at <= ARRIVE_WITHIN_S else 0

    def tell(self, owner: str, ends: Mapping[str, int], load: Load) -> None:
        """So many sessions have ended at an owner since it started, by reason; and how much it has to do."""
        if owner in self._owners:
            self._tallies[self._owners[owner].spec.name].ends[owner] = ends
            self._loads[owner] = load

    def statistics(self) -> dict[str, SessionStatistics]:
        """Of each model that has, or had, an owner."""
        found = {}
        for model, tally in self._tallies.items():
            tally.queue.forget_gone(self._now)
            num_open = sum(len(self._held[owner.name]) for owner in self._owners.values() if owner.spec.name == model)
            ended = sum(map(Counter, tally.ends.values()), tally.ended)
            found[model] = SessionStatistics(num_open, len(tally.queue), tally.opened, dict(tally.refused), dict(ended))
        return found

    def num_moved(self) -> dict[str, int]:
        """Sessions that have gone from an owner that lives to another, by model."""
        return {model: tally.moved for model, tally in self._tallies.items()}

    def num_sessions(self) -> dict[str, int]:
        """Sessions of each owner."""
        return {owner: len(held) for owner, held in self._held.items() if owner is not None}

    def _serving(self, session: str, model: str | None, claim: Claim | None) -> dict[str, Owner]:
        """The owners that a session can be placed at."""
        if not self._owners:
            raise Unavailable("no replica is ready: try again in a moment")
        served_as = sorted(self._served_as(model), key=self._unloaded.__contains__)
        model = model or served_as[0]
        ready: dict[str, dict[str, Owner]] = {each: {} for each in served_as}
        for name, owner in self._owners.items():
            if owner.spec.name in ready and self._is_free(name):
                ready[owner.spec.name][name] = owner
        serving = [owners for owners in ready.values() if owners]
        if not serving:
            if served_as[0] in self._unloaded:
                raise Unavailable(f"model {model!r} is unloaded: load it before a session starts")
            raise Unavailable(f"no replica of model {model!r} is ready: try again in a moment")
        if claim is None or not claim.fingerprint:
            return serving[0]
        for owners in serving:
            same = {name: owner for name, owner in owners.items() if owner.spec.fingerprint == claim.fingerprint}
            if same:
                return same
        found = sorted({owner.spec.fingerprint for owners in serving for owner in owners.values()})
        raise StateLost(
            f"the checkpoint of session {session!r} is of model {model!r} with fingerprint {claim.fingerprint}, "
            f"the one that is served has {', '.join(found)} (other weights, options or dtype): open a new session"
        )

    def _served_as(self, model: str | None) -> list[str]:
        """What a model is served as that is asked for: its versions, the newest first, where none is said."""
        names = sorted({name for owner in self._owners.values() for name in (owner.spec.name, *owner.models)})
        if model is None:
            models = {split_name(name)[0] for name in names}
            if len(models) > 1:
                raise InvalidInput(f"{len(models)} models are served here, say which one: {', '.join(names)}")
            (model,) = models
        found = [model] if model in names else newest_first(model, names)
        if not found:
            raise UnknownModel(f"model {model!r} is not served here: {', '.join(names)}")
        return found

    def _may_go_on(self, record: Record, epoch: int) -> bool:
        """Whether who has the session under `epoch` has the last there is: this directory may have started after it."""
        return epoch == record.epoch or record.since < epoch < self._first_epoch

    def _put(self, session: str, record: Record) -> None:
        if before := self._sessions.get(session):
            del self._held[before.owner][before.epoch]
        self._sessions[session] = record
        self._held[record.owner][record.epoch] = session
        if record.resumable and (key := key_of(session)) in self._kept:
            if record.owner is None:
                self._waiting.setdefault(key, self._now)
            else:
                self._waiting.pop(key, None)

    def _orphan(self, session: str) -> None:
        """Its owner is gone. Of a resumable one it is remembered who may go on with it, even if nothing is kept yet."""
        record = self._sessions[session]
        self._held.get(record.owner, {}).pop(record.epoch, None)
        del self._sessions[session]
        if record.resumable:
            self._put(session, replace(record, owner=None))
        else:
            self._targets.pop(session, None)

    def _forget(self, session: str) -> None:
        record = self._sessions.pop(session)
        self._targets.pop(session, None)
        del self._held[record.owner][record.epoch]
        if record.owner in self._owners:
            self._tallies[self._owners[record.owner].spec.name].freed.append(self._now)
        self._kept.discard(key := key_of(session))
        self._waiting.pop(key, None)


def _alike(one: Owner, other: Owner) -> bool:
    """Whether a session can go from one to the other."""
    return (one.spec.name, one.spec.fingerprint) == (other.spec.name, other.spec.fingerprint)
