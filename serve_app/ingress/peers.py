"""Sessions whose way in is another ingress: who it is, and how it is asked to do what came here.

An ingress whose sender name has an address (`sender_at`) can be asked there. Who has a session, the directory knows;
that is remembered, and asked again where it is so no longer.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import uuid4

from serve_app.errors import NotOwner, SessionEnded, UnknownSession
from serve_app.ingress.hub import Hub

MAX_REMEMBERED = 65536
MAX_TRIES = 3
Q = TypeVar("Q")


class Gone(Exception):
    """The way in of a session is there no more, or has let go of it. `was_asked`: maybe it has done it before."""

    def __init__(self, sender: str, was_asked: bool) -> None:
        super().__init__(f"the ingress {sender} has this session no more")
        self.sender = sender
        self.was_asked = was_asked


class NotReached(Exception):
    """Whoever listens at an address, if anybody does, has not got the question."""


class Asked(NamedTuple):
    """A question of a session, and which ingress it is for: another may have its port by now."""

    sender: str
    session: str
    question: Any


class AreYouThere(NamedTuple):
    """A question that is answered at once, by a process that does not stand still."""


class Calls(Protocol):
    """How other ingresses are reached."""

    async def call(self, address: str, asked: Asked) -> Any:
        """What `Peers.answer` returns there. Raises what it raises; NotReached, OSError (was it asked? maybe)."""
        ...


class _NoCalls:
    """See Calls."""

    async def call(self, address: str, asked: Asked) -> Any:
        """See Calls."""
        raise NotReached


class NotHere(NamedTuple):
    """The answer of an ingress that does not have the session (any more), or is another. has_ended: it did there."""

    has_ended: bool = False


NOT_HERE = NotHere()


def sender_at(address: str) -> str:
    """A name for the hub of an ingress that answers at that address."""
    return f"{uuid4().hex}@{address}"


class Peers:
    """The other ingresses, as this one sees them. Without `calls` all others are gone."""

    def __init__(self, hub: Hub, calls: Calls | None = None) -> None:
        self._hub = hub
        self._calls = calls or _NoCalls()
        self._senders: OrderedDict[str, str] = OrderedDict()  # of sessions, those that were used last
        self._handlers: dict[type, Callable[[Any, asyncio.Event], Awaitable[Any]]] = {}

    def on(self, kind: type[Q], handle: Callable[[Q, asyncio.Event], Awaitable[Any]]) -> None:
        """Have questions of that kind answered here; NOT_HERE is the answer where the session is not. See `answer`."""
        self._handlers[kind] = handle

    async def answer(self, asked: Asked, asker_lost: asyncio.Event) -> Any:
        """What another ingress asks. asker_lost: is set should that die. Raises LockstepError."""
        if isinstance(asked.question, AreYouThere):
            return None
        if asked.sender != self._hub.sender:
            return NOT_HERE
        reply = await self._handlers[type(asked.question)](asked.question, asker_lost)
        return self._not_here(asked.session) if isinstance(reply, NotHere) else reply

    async def ask(self, session: str, question: Any) -> Any:
        """What the ingress answers that has the session. Raises UnknownSession, LockstepErrors of its own, Gone.

        UnknownSession too for one that has ended at `sender` (in its details), and for one of a sender that cannot be
        asked: a client with a handle, say.
        """
        tried = self._hub.sender
        reply: Any = self._not_here(session)
        for _ in range(MAX_TRIES):
            sender = await self.sender_of(session)
            _, _, address = sender.partition("@")
            if sender == tried:
                self.forget(session)
                if reply.has_ended:
                    raise UnknownSession(f"session {session!r} has ended", sender=sender)
                raise Gone(sender, was_asked=False)
            if not address:
                raise UnknownSession(f"session {session!r} has a way in of its own, which cannot be asked from here")
            try:
                reply = await self._calls.call(address, Asked(sender, session, question))
            except NotReached:
                reply = NOT_HERE
            except OSError as error:
                self.forget(session)
                raise Gone(sender, was_asked=True) from error
            if not isinstance(reply, NotHere):
                return reply
            tried = sender
            self.forget(session)
        raise NotOwner(f"session {session!r} goes from one way in to another: try again in a moment")

    async def sender_of(self, session: str) -> str:
        """Who has it, for all that is known here. Raises UnknownSession."""
        sender = self._senders.get(session) or (await self._hub.describe(session)).sender
        self._senders[session] = sender
        self._senders.move_to_end(session)
        if len(self._senders) > MAX_REMEMBERED:
            self._senders.popitem(last=False)
        return sender

    def forget(self, session: str) -> None:
        """Do not go by what is remembered of it."""
        self._senders.pop(session, None)

    def _not_here(self, session: str) -> NotHere:
        try:
            held = self._hub.find(session)
        except SessionEnded:
            return NotHere(has_ended=True)
        return NotHere(has_ended=held is not None and held.end_reason is not None)
