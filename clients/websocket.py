"""Sessions over a WebSocket to an ingress: one connection each, in msgpack. Needs neither Ray nor torch."""

import asyncio
import weakref
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.typing import Subprotocol

from serve_app.errors import InvalidInput, Unavailable, from_wire
from serve_app.frame import ABORT, NO_CLOSE
from serve_app.ingress.codec import JSON, MSGPACK, Message, read_model, read_session
from serve_app.segment import Run
from serve_app.session import Entry, Session
from serve_app.spec import ModelSpec

SUBPROTOCOL = Subprotocol("lockstep.msgpack")
RETRY_DELAY_S = 0.05


class WebSocketTransport:
    """See client.Transport. `address` is one like ws://host:8000."""

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._carriers: weakref.WeakSet[WebSocketCarrier] = weakref.WeakSet()

    async def open(self, session: str | None, model: str | None, initial_state: Sequence[np.ndarray] | None) -> Session:
        """See Transport."""
        opened = await open_websocket(self._address, session=session, model=model, initial_state=initial_state)
        if isinstance(opened.carrier, WebSocketCarrier):
            self._carriers.add(opened.carrier)
        return opened

    async def models(self) -> dict[str, ModelSpec]:
        """See Transport."""
        url = f"http{self._address.removeprefix('ws')}/v1/models"
        try:
            async with httpx.AsyncClient() as http:
                answer = JSON.decode((await http.get(url)).content)
        except httpx.HTTPError as error:
            raise Unavailable(f"no answer from {url}: {str(error) or type(error).__name__}") from error
        if "error" in answer.values:
            raise from_wire(answer.mapping("error").values)
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
) -> Session:
    """Open a session at an address like ws://host:8000, with a path where the ingress has one.

    The connection is the session's: it ends when the session does, and a session whose connection breaks is lost.
    Raises Unavailable when there is no connection, else what the ingress refuses with.
    """
    query = {"session": session, "model": model, "initial_state": None if initial_state is None else "true"}
    parameters = urlencode({key: value for key, value in query.items() if value is not None})
    try:
        websocket = await connect(
            f"{address.rstrip('/')}/v1/session?{parameters}",
            subprotocols=[SUBPROTOCOL],
            compression=None,
            max_size=None,
        )
    except InvalidURI as error:
        raise InvalidInput(f"{address!r} is no address, expected one like ws://host:8000 ({error})") from error
    except (OSError, InvalidHandshake) as error:  # a TimeoutError is an OSError
        raise Unavailable(f"no connection to {address}: {str(error) or type(error).__name__}") from error
    try:
        if initial_state is not None:
            state = [np.asarray(array) for array in initial_state]
            await websocket.send(MSGPACK.encode({"type": "open", "initial_state": state}))
        opened = MSGPACK.decode(await websocket.recv())
        if "error" in opened.values:
            raise from_wire(opened.mapping("error").values)
        name, spec, limits = read_session(opened)
    except ConnectionClosed as error:
        raise Unavailable(f"{address} closed the connection: {error}") from error
    except BaseException:
        await websocket.close()
        raise
    carrier = WebSocketCarrier(websocket, address)
    opened_session = Session(name, spec, limits, carrier)
    carrier.start(opened_session)
    return opened_session


class WebSocketCarrier:
    """Carries one session. TCP keeps the order, so a message need not wait for what became of the last."""

    def __init__(self, websocket: ClientConnection, address: str) -> None:
        self._websocket = websocket
        self._address = address
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, session: Session) -> None:
        """Begin to send and to receive."""
        self._task = asyncio.create_task(self._receive(session))

    async def stop(self) -> None:
        """Give the session up if it is open, and wait until the connection is closed."""
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

    async def _receive(self, session: Session) -> None:
        """Take what comes until the session has ended, or the connection; nobody is left waiting."""
        sending = asyncio.create_task(self._send(session))
        why = "it was closed"
        try:
            async for data in self._websocket:
                _take(session, MSGPACK.decode(data))
                if session.end_reason is not None:
                    break
        except Exception as error:
            why = str(error) or type(error).__name__
        finally:
            session.fail(
                Unavailable(f"the connection to {self._address} is gone ({why}), and its session: open a new one")
            )
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

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
        session.deliver(message.number("next") or 0, message.number("rewind") or 0, outputs)
    elif kind == "ended" and "error" not in message.values:
        session.notice("ended", None, message.text("reason") or kind, message.number("progress") or 0)
    elif kind == "ended":
        session.fail(from_wire(message.mapping("error").values))
    elif kind == "error":
        session.notice("refused", message.mapping("error").values, "", 0)
