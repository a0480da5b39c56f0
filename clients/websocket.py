"""Sessions over a WebSocket to an ingress: one connection each, in msgpack. Needs neither Ray nor torch."""

import asyncio
import random
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.parse import urlencode

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.typing import Subprotocol

from clients import http
from serve_app.directory import USUAL, Turn
from serve_app.errors import InvalidInput, LockstepError, Unavailable, UnknownSession, from_wire
from serve_app.frame import ABORT, NO_CLOSE
from serve_app.ingress.codec import MSGPACK, Message, read_model, read_session, read_timing
from serve_app.segment import Run
from serve_app.session import Entry, Exported, Session
from serve_app.spec import ModelSpec

SUBPROTOCOL = Subprotocol("lockstep.msgpack")
RETRY_DELAY_S, MAX_RETRY_DELAY_S = 0.05, 0.5
"""The first and the longest; many clients that lose their ingress at once must not keep the next from starting."""
CONNECT_WITHIN_S = 10.0
RECONNECT_WITHIN_S, RESUMED_WITHIN_S = 2.0, 5.0
"""One that stands still takes connections all the same, and does nothing with them: then another address is tried."""
SILENT_S, LOOK_S = 0.75, 0.25
"""After so long without a message, where some are due, it is asked whether anybody is there; how often we look."""
ALIVE_WITHIN_S = 1.0
MAX_PATIENCE, CALM_S = 8, 10.0
"""The times above double with each way that has said nothing, so that one which is only slow gets done what it is asked
for; until a connection has lasted for so long."""
PING = MSGPACK.encode({"type": "ping"})
RESUME_WITHIN_S = 30.0
"""A session whose connection is gone is lost when there is none again within that time."""
TAKEN_OVER = 4409
FINAL = (1000, 1011, *range(4000, 5000))
"""Codes of a connection that is closed for good: with TAKEN_OVER another client has the session."""
UNSURE_S = 60.0
"""So long it may be this client that takes it over, by a connection of which it has heard nothing and given up."""


class WebSocketTransport:
    """See client.Transport. `address` is one like ws://host:8000, or several with commas between.

    Sessions start at each in turn, and go on at the next when theirs is gone.
    """

    def __init__(self, address: str, resume_within_s: float | None = None) -> None:
        self._addresses = deque(address.split(","))
        self._resume_within_s = resume_within_s
        self._carriers: weakref.WeakSet[WebSocketCarrier] = weakref.WeakSet()

    async def open(
        self,
        session: str | None,
        model: str | None,
        initial_state: Sequence[np.ndarray] | None,
        checkpoint: bytes | None,
        turn: Turn,
    ) -> Session:
        """See Transport."""
        self._addresses.rotate(-1)
        opened = await open_websocket(
            ",".join(self._addresses), session=session, model=model, initial_state=initial_state,
            checkpoint=checkpoint, resume_within_s=self._resume_within_s, turn=turn,
        )  # fmt: skip
        if isinstance(opened.carrier, WebSocketCarrier):
            self._carriers.add(opened.carrier)
        return opened

    async def models(self) -> dict[str, ModelSpec]:
        """See Transport."""
        answer = await http.call(",".join(self._addresses), "GET", "/v1/models")
        models = [read_model(Message(described)) for described in answer.values.get("models", [])]
        return {spec.name: spec for spec in models}

    async def stop(self) -> None:
        """See Transport."""
        await asyncio.gather(*(carrier.stop() for carrier in list(self._carriers)))


async def open_websocket(
    address: str,
    *,
    session: str | None = None,
    model: str | None = None,
    initial_state: Sequence[np.ndarray] | None = None,
    checkpoint: bytes | None = None,
    resume_within_s: float | None = None,
    turn: Turn = USUAL,
) -> Session:
    """Open a session at an address like ws://host:8000, with a path where the ingress has one.

    The connection is the session's: it ends when the session does. One that breaks, or brings nothing though something
    is due, is made again, maybe to another ingress, and the session goes on: inputs are kept until their outputs are
    here and the ingress says that they are safe. It is tried for `resume_within_s` (None: RESUME_WITHIN_S). Several
    addresses, with commas between, are tried in turn. Raises Unavailable when there is no connection, else what the
    ingress refuses with.
    """
    addresses = deque(each.strip().rstrip("/") for each in address.split(","))
    first: dict[str, Any] = {}
    if initial_state is not None:
        first["initial_state"] = [np.asarray(array) for array in initial_state]
    if checkpoint is not None:
        first["checkpoint"] = checkpoint
    asked = {"priority": str(turn.priority), "max_wait_s": str(turn.max_wait_s)} if turn != USUAL else {}
    websocket, opened = await _connect(
        addresses, first, session=session, model=model, resumable="true", **asked, **dict.fromkeys(first, "true")
    )
    name, spec, limits = read_session(opened)
    carrier = WebSocketCarrier(websocket, addresses, resume_within_s)
    opened_session = Session(name, spec, limits, carrier, keeps_unanswered=True)
    opened_session.begin_at(opened.number("next") or 0)
    opened_session.kept = opened.number("kept")
    carrier.start(opened_session)
    return opened_session


async def _connect(
    addresses: deque[str], first: dict[str, Any] | None = None, **query: str | None
) -> tuple[ClientConnection, Message]:
    """A connection, and the first message that comes by it. Raises Unavailable, or what the ingress refuses with.

    Where there is none the next address is tried, which is the first of them from then on. first: what the session is
    to begin with.
    """
    for address in list(addresses)[:-1]:
        try:
            return await _connect_to(address, first or {}, query)
        except Unavailable:
            addresses.rotate(-1)
    return await _connect_to(addresses[0], first or {}, query)


async def _connect_to(
    address: str, first: dict[str, Any], query: Mapping[str, str | None], patience: int = 1
) -> tuple[ClientConnection, Message]:
    parameters = urlencode({key: value for key, value in query.items() if value is not None})
    resumes = "resume" in query  # another opening may wait for its turn
    try:
        websocket = await connect(
            f"{address}/v1/session?{parameters}",
            subprotocols=[SUBPROTOCOL],
            compression=None,
            max_size=None,
            open_timeout=patience * RECONNECT_WITHIN_S if resumes else CONNECT_WITHIN_S,
        )
    except InvalidURI as error:
        raise InvalidInput(f"{address!r} is no address, expected one like ws://host:8000 ({error})") from error
    except (OSError, InvalidHandshake, ConnectionClosed) as error:  # a TimeoutError is an OSError
        raise Unavailable(f"no connection to {address}: {str(error) or type(error).__name__}") from error
    try:
        if first:
            await websocket.send(MSGPACK.encode({"type": "open", **first}))
        async with asyncio.timeout(patience * RESUMED_WITHIN_S if resumes else None):
            opened = MSGPACK.decode(await websocket.recv())
        if "error" in opened.values:
            raise from_wire(opened.mapping("error").values)
    except ConnectionClosed as error:
        raise Unavailable(f"{address} closed the connection: {error}") from error
    except TimeoutError as error:
        websocket.transport.abort()
        raise Unavailable(f"{address} takes a connection, and does not say how the session goes on") from error
    except BaseException:
        await websocket.close()
        raise
    return websocket, opened


class WebSocketCarrier:
    """Carries one session. TCP keeps the order, so a message need not wait for what became of the last."""

    def __init__(
        self, websocket: ClientConnection, addresses: deque[str], resume_within_s: float | None = None
    ) -> None:
        """addresses: the first is that of the connection."""
        self._websocket = websocket
        self._resume_within_s = RESUME_WITHIN_S if resume_within_s is None else resume_within_s
        self._addresses = addresses
        self._patience = 1
        self._heard_at = 0.0
        self._heard = asyncio.Event()
        self._unsure_until = 0.0
        self._due = asyncio.Event()
        self._wants_state = False
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def start(self, session: Session) -> None:
        """Begin to send and to receive."""
        self._task = asyncio.create_task(self._receive(session))

    async def stop(self) -> None:
        """Give the session up if it is open, and wait until the connection is closed."""
        self._stopped = True
        await self._websocket.close()
        if self._task is not None:
            await asyncio.wait([self._task])

    def notify(self, session: Session) -> None:
        """See Carrier."""
        self._due.set()

    def notify_later(self, session: Session) -> None:
        """See Carrier."""
        asyncio.get_running_loop().call_later(RETRY_DELAY_S, session.offer)

    def notify_ack(self, session: Session) -> None:
        """See Carrier."""
        if _owes_ack(session):
            self._due.set()

    def want_state(self, session: Session) -> None:
        """See Carrier."""
        self._wants_state = True
        self._due.set()

    async def _receive(self, session: Session) -> None:
        """Take what comes until the session has ended; nobody is left waiting."""
        why = "it was closed"
        try:
            while not self._stopped:
                began = time.monotonic()
                why = await self._converse(session)
                if time.monotonic() > began + CALM_S:
                    self._patience = 1
                code = self._websocket.close_code
                is_own = code == TAKEN_OVER and time.monotonic() < self._unsure_until
                if session.end_reason is not None or (code in FINAL and not is_own):
                    break
                await self._resume(session)
        except Exception as error:
            why = f"{why}, then {error}"
        finally:
            session.fail(
                Unavailable(f"the connection to {self._addresses[0]} is gone ({why}), and its session: open a new one")
            )
            await self._websocket.close()

    async def _converse(self, session: Session) -> str:
        """Send and receive until the session or the connection has ended; returns how that was."""
        beside = [asyncio.create_task(self._send(session)), asyncio.create_task(self._watch(session))]
        try:
            async for data in self._websocket:
                self._heard_at = time.monotonic()
                self._heard.set()
                _take(session, MSGPACK.decode(data))
                if session.end_reason is not None:
                    break
        except ConnectionClosed as error:
            return str(error)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        return "it was closed"

    async def _watch(self, session: Session) -> None:
        """Give the connection up when nobody is there: a way in that stands still keeps it, and says nothing.

        A proxy that ends WebSockets, as Serve's does, answers their own pings itself, whoever is behind it.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            if not session.is_due or time.monotonic() < self._heard_at + SILENT_S:
                continue
            self._heard.clear()
            try:
                async with asyncio.timeout(self._patience * ALIVE_WITHIN_S):
                    await self._websocket.send(PING)
                    await self._heard.wait()
            except TimeoutError:
                self._give_up_way(is_slow=True)
                self._websocket.transport.abort()
                return

    async def _resume(self, session: Session) -> None:
        """Connect again, and go on. Raises what the session cannot be had again for, Unavailable after a while."""
        deadline = time.monotonic() + self._resume_within_s
        delay_s = RETRY_DELAY_S
        while not self._stopped:
            try:
                where = {"session": session.name, "resume": str(session.progress), "rewind": str(session.rewind)}
                self._websocket, opened = await _connect_to(self._addresses[0], {}, where, self._patience)
            except LockstepError as error:
                if isinstance(error, Unavailable):
                    self._give_up_way(is_slow=isinstance(error.__cause__, TimeoutError))
                    self._unsure_until = time.monotonic() + UNSURE_S
                if isinstance(error, UnknownSession) and session.has_all:
                    session.notice("ended", None, "closed", session.progress)  # which nobody was left to tell
                    return
                passes = error.retry or isinstance(error, UnknownSession)  # it may be moving
                if not passes or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(delay_s * random.uniform(0.5, 1))
                delay_s = min(2 * delay_s, MAX_RETRY_DELAY_S)
            else:
                session.epoch += 1
                session.resumed(opened.number("next") or 0, opened.number("rewind") or 0)
                return

    def _give_up_way(self, *, is_slow: bool) -> None:
        self._addresses.rotate(-1)
        if is_slow:
            self._patience = min(2 * self._patience, MAX_PATIENCE)

    async def _send(self, session: Session) -> None:
        """Send what is due until cancelled; without a sender the connection is of no use."""
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                while session.sendable or _owes_ack(session):
                    for message in _messages(session.take(session.limits.max_segment)):
                        await self._websocket.send(MSGPACK.encode(message))
                    session.arrived(session.handed)
                if self._wants_state:
                    self._wants_state = False
                    await self._websocket.send(MSGPACK.encode({"type": "export"}))
        finally:
            await self._websocket.close()


def _owes_ack(session: Session) -> bool:
    """Whether so much is acknowledged and not told that it cannot wait for the next segment."""
    return session.end_reason is None and 4 * (session.acked - session.acked_told) > session.limits.max_window


def _messages(entry: Entry) -> Iterator[dict[str, Any]]:
    if len(entry.x):
        yield {"type": "segment", "x": entry.x, "start": entry.start, "acked": entry.acked, "rewind": entry.rewind}
    else:
        yield {"type": "ack", "acked": entry.acked}
    if entry.close == ABORT:
        yield {"type": "close", "abort": True}
    elif entry.close != NO_CLOSE:
        yield {"type": "close", "start": entry.close, "rewind": entry.rewind}


def _take(session: Session, message: Message) -> None:
    """Tell the session what the ingress says."""
    kind = message.text("type")
    if kind == "outputs":
        arrays = message.mapping("outputs")
        values = {name: arrays.array(name, spec) for name, spec in session.spec.outputs.items()}
        start = message.number("start") or 0
        outputs = Run(start, start + len(next(iter(values.values()))), values)
        session.timing.add(**asdict(read_timing(message)))
        if (kept := message.number("kept")) is not None:
            session.kept = max(session.kept or 0, kept)
        session.deliver(message.number("next") or 0, message.number("rewind") or 0, outputs)
    elif kind == "checkpoint":
        session.exported(Exported(message.number("at") or 0, message.blob("checkpoint")))
    elif kind == "ended" and "error" not in message.values:
        session.notice("ended", None, message.text("reason") or kind, message.number("progress") or 0)
    elif kind == "ended":
        session.fail(from_wire(message.mapping("error").values))
    elif kind == "error":
        session.notice("refused", message.mapping("error").values, "", 0)
