"""Which owner holds which session: the one place that knows. Pure; an actor wraps it.

Asked when a session opens or ends, never per segment. Every grant has an epoch of its own, higher than all before.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from serve_app.errors import SessionExists, TooManySessions, Unavailable, UnknownModel, UnknownSession
from serve_app.policy.placement import choose_owner
from serve_app.spec import ModelSpec, SessionLimits


@dataclass(frozen=True, slots=True)
class Owner:
    """A replica that takes sessions. `address` is how senders reach it, `max_bytes` what a frame to it may hold.

    checkpoints: it sends states with its outputs, from which a session can go on elsewhere.
    """

    name: str
    address: str
    spec: ModelSpec
    limits: SessionLimits
    max_sessions: int
    max_bytes: int
    checkpoints: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """A session's owner, and the epoch under which it owns it."""

    session: str
    epoch: int
    owner: Owner


@dataclass(frozen=True, slots=True)
class Record:
    """What the directory knows of a session: who holds it, who sends to it."""

    epoch: int
    owner: str
    sender: str


class Directory:
    """Owners by name, sessions by id. Epochs start at `incarnation` << 24: a later directory grants higher ones."""

    def __init__(self, incarnation: int) -> None:
        self._last_epoch = incarnation << 24
        self._owners: dict[str, Owner] = {}
        self._sessions: dict[str, Record] = {}
        self._held: dict[str, dict[int, str]] = {}  # by owner: epoch -> session

    def register(self, owner: Owner) -> None:
        """Take a new owner in."""
        self._owners[owner.name] = owner
        self._held.setdefault(owner.name, {})

    def knows(self, owner: str) -> bool:
        """Whether the owner is registered."""
        return owner in self._owners

    def unregister(self, owner: str) -> int:
        """The owner is gone, and its sessions with it; returns their number."""
        self._owners.pop(owner, None)
        lost = self._held.pop(owner, {})
        for session in lost.values():
            del self._sessions[session]
        return len(lost)

    def open(self, session: str, sender: str, model: str | None = None) -> Grant:
        """Place a new session. Raises SessionExists, UnknownModel, TooManySessions, Unavailable (no owner yet)."""
        if record := self._sessions.get(session):
            raise SessionExists(
                f"session {session!r} is open already at {record.owner!r}: close it, or choose another id"
            )
        if not self._owners:
            raise Unavailable("no replica is ready: try again in a moment")
        serving = {name: owner for name, owner in self._owners.items() if model in (None, owner.spec.name)}
        if not serving:
            models = sorted({owner.spec.name for owner in self._owners.values()})
            raise UnknownModel(f"model {model!r} is not served here: {', '.join(models)}")
        load = {name: len(self._held[name]) for name in serving}
        chosen = choose_owner(load, {name: owner.max_sessions for name, owner in serving.items()})
        if chosen is None:
            raise TooManySessions(
                f"{sum(load.values())} sessions are open, all that the replicas take: try again later, or raise "
                "session.max_sessions or replicas"
            )
        self._last_epoch += 1
        self._sessions[session] = Record(self._last_epoch, chosen, sender)
        self._held[chosen][self._last_epoch] = session
        return Grant(session, self._last_epoch, serving[chosen])

    def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        """Let a sender go on with a session, under a new epoch; and the old one. Raises UnknownSession.

        The sender that has it already keeps its epoch.
        """
        record = self.lookup(session)
        if record.sender == sender:
            return Grant(session, record.epoch, self._owners[record.owner]), record.epoch
        self._last_epoch += 1
        self._sessions[session] = Record(self._last_epoch, record.owner, sender)
        del self._held[record.owner][record.epoch]
        self._held[record.owner][self._last_epoch] = session
        return Grant(session, self._last_epoch, self._owners[record.owner]), record.epoch

    def lookup(self, session: str) -> Record:
        """Who holds a session. Raises UnknownSession."""
        if session not in self._sessions:
            raise UnknownSession(f"session {session!r} is not open: open it first")
        return self._sessions[session]

    def ended(self, owner: str, epochs: Iterable[int]) -> None:
        """These sessions are over; what is not known (any more) is no error."""
        held = self._held.get(owner, {})
        for epoch in epochs:
            if (session := held.pop(epoch, None)) is not None:
                del self._sessions[session]

    def models(self) -> dict[str, ModelSpec]:
        """The models that are served, by name."""
        return {owner.spec.name: owner.spec for owner in self._owners.values()}

    def num_sessions(self) -> dict[str, int]:
        """Sessions of each owner."""
        return {owner: len(held) for owner, held in self._held.items()}
