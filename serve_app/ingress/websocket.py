"""A session as a conversation on a WebSocket, in either encoding; docs/protocol.md has the messages."""

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.websockets import WebSocket, WebSocketDisconnect

from serve_app.errors import InvalidInput, LockstepError, NotOwner, Rewound, SessionEnded, Unavailable
from serve_app.frame import ADOPTED
from serve_app.ingress.codec import (
    JSON,
    MSGPACK,
    Message,
    describe_outputs,
    describe_session,
    max_body,
)
from serve_app.ingress.hub import Hub
from serve_app.session import Session

logger = logging.getLogger(__name__)
T = TypeVar("T")

SUBPROTOCOL = "lockstep.msgpack"
NORMAL, RESTART, TAKEN_OVER = 1000, 1012, 4409
"""Close codes: as agreed; this way in stops, resume by another; the client has come by another connection."""
RESUME_WITHIN_S = 30.0
"""A session whose connection has broken is kept for so long."""
HANG_UP_WITHIN_S = 2.0
"""So long it is waited for a client that can resume to hang up when it has been told of the end: then it has all."""
MAX_EARLY = 16
"""So many messages are taken in from a client that waits for a place; the next are not read until it has one."""
MAX_DIGITS = 18
MAX_UNREADABLE = 8
"""After so many messages in a row that cannot be decoded, the other side speaks something else."""


class Conversation:
    """Messages over one WebSocket. Any task may send; a client that does not read holds up its own connection only."""

    def __init__(self, websocket: WebSocket) -> None:
        self.websocket = websocket
        self.encoding = MSGPACK if SUBPROTOCOL in websocket.scope.get("subprotocols", ()) else JSON
        self._sending = asyncio.Lock()
        self._coming: deque[asyncio.Future[Any]] = deque()  # what was listened for before its turn
        #: With which the client has hung up, or its connection broken; None: it is there.
        self.close_code: int | None = None

    async def send(self, kind: str, **values: Any) -> None:
        """Send one message. Raises WebSocketDisconnect."""
        data = self.encoding.encode({"type": kind, **values})
        async with self._sending:
            if self.encoding is MSGPACK:
                await self.websocket.send_bytes(data)
            else:
                await self.websocket.send_text(data.decode())

    async def receive(self, max_bytes: int) -> Message:
        """The next message. Raises WebSocketDisconnect, and InvalidInput for one that cannot be decoded."""
        event = await (self._coming.popleft() if self._coming else self._read())
        content: str | bytes = event["bytes"] if event.get("text") is None else event["text"]
        if isinstance(content, str) != (self.encoding is JSON):
            raise InvalidInput(
                f"a {'text' if isinstance(content, str) else 'binary'} message arrived in a conversation in "
                f"{self.encoding.name}: msgpack is binary, and chosen by the subprotocol {SUBPROTOCOL!r}; JSON is text"
            )
        if len(content) > max_bytes:
            raise InvalidInput(f"a message of {len(content)} bytes arrived, the limit is {max_bytes}: send it in parts")
        return self.encoding.decode(content)

    async def while_there(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is cancelled when the client hangs up. Raises WebSocketDisconnect then.

        Whoever says something meanwhile is there: it is taken up by `receive`.
        """
        working = asyncio.ensure_future(work)
        try:
            while not working.done() and len(self._coming) < MAX_EARLY:
                coming = self._read_ahead()
                await asyncio.wait((working, coming), return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    coming.result()
            return await working
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def catch_up(self) -> None:
        """Read what has come: Serve cancels what serves a client that hangs up, whether that has been read or not."""
        with suppress(WebSocketDisconnect):
            while self.close_code is None:
                coming = self._read_ahead()
                await asyncio.sleep(0)
                if not coming.done():
                    return
                coming.result()

    async def stop(self) -> None:
        """Listen no more."""
        for coming in self._coming:
            coming.cancel()
        await asyncio.gather(*self._coming, return_exceptions=True)

    def _read_ahead(self) -> "asyncio.Future[Any]":
        """The newest that is listened for before its turn."""
        if not self._coming or self._coming[-1].done():
            self._coming.append(asyncio.ensure_future(self._read()))
        return self._coming[-1]

    async def _read(self) -> Any:
        event = await self.websocket.receive()
        if event["type"] == "websocket.disconnect":
            self.close_code = code = event.get("code", 1005)
            raise WebSocketDisconnect(code)
        return event


async def converse(websocket: WebSocket, hub: Hub) -> None:
    """Serve one connection: open a session, and end it with the connection.

    One whose client says that it can resume it is kept for a while after its connection has broken.
    """
    talk = Conversation(websocket)
    try:
        await websocket.accept(SUBPROTOCOL if talk.encoding is MSGPACK else None)
        try:
            session = await _open(talk, hub)
        except LockstepError as error:
            await talk.send("error", error=error.to_wire())
            await websocket.close(4000 + error.http)
            return
        left = asyncio.Event()
        session.leave = leave = left.set
        try:
            await talk.send("opened", **describe_session(session))
            code = await _first(_listen(talk, session), _speak(talk, session), _wait(left))
        except (asyncio.CancelledError, WebSocketDisconnect):
            await talk.catch_up()
            raise
        finally:
            if session.stays and talk.close_code != NORMAL:
                _keep(session, leave)
            elif not left.is_set():  # nobody will ask for the session again
                _give_up(session, leave)
        await websocket.close(code)
    except WebSocketDisconnect:
        pass
    except Exception:
        logger.exception("a conversation failed")
        with suppress(RuntimeError, WebSocketDisconnect):  # it may be the connection that is broken
            await talk.send("error", error=LockstepError("an unexpected error: the server's log has it").to_wire())
            await websocket.close(1011)
    finally:
        await talk.stop()


async def _open(talk: Conversation, hub: Hub) -> Session:
    query = Message(dict(talk.websocket.query_params))
    query.only(
        "session", "model", "initial_state", "checkpoint", "resumable", "resume", "rewind", "priority", "max_wait_s"
    )
    for key, kind in (("priority", int), ("max_wait_s", float)):
        with suppress(KeyError, ValueError):
            query.values[key] = kind(query.values[key])
    if "resume" in query.values:
        name, acked = query.text("session"), _whole(query, "resume")
        if name is None:
            raise InvalidInput(f"resume is {acked}, expected a session's id with it: session=ID")
        return await _resume(hub, name, acked, _whole(query, "rewind"))
    state = checkpoint = None
    brings = [key for key in ("initial_state", "checkpoint") if query.values.get(key, "false") != "false"]
    if brings:
        models = await hub.models()
        message = await talk.receive(max_body(max((spec.state_bytes for spec in models.values()), default=0)))
        message.only("type", *brings)
        if message.text("type") != "open":
            raise InvalidInput(f"the first message has to be of type 'open' and bring the {' and the '.join(brings)}")
        state = message.arrays("initial_state")
        checkpoint = message.blob("checkpoint") if "checkpoint" in brings else None
    resumable = query.values.get("resumable", "false") != "false"
    name, model = query.text("session"), query.text("model")
    opening = hub.open(name, model, state, resumable=resumable, checkpoint=checkpoint, turn=query.turn())
    return await talk.while_there(opening)


async def _resume(hub: Hub, name: str, acked: int, rewind: int) -> Session:
    """Once begun it is done, though the client hangs up and this is cancelled: it may just change hands."""
    resuming = asyncio.get_running_loop().create_task(hub.resume(name, acked, rewind), context=contextvars.Context())
    try:
        return await asyncio.shield(resuming)
    except asyncio.CancelledError:
        resuming.add_done_callback(_nobody_came)
        raise


def _nobody_came(resuming: "asyncio.Task[Session]") -> None:
    """The client has gone before its session was here."""
    if not resuming.cancelled() and resuming.exception() is None:
        session = resuming.result()
        session.leave = asyncio.Event().set
        _keep(session, session.leave)


def _whole(query: Message, key: str) -> int:
    """A whole number of the query; 0 without the key."""
    text = query.values.get(key, "0")
    if not (text.isdecimal() and len(text) <= MAX_DIGITS):
        raise InvalidInput(f"{key} is {text!r:.80}, expected a whole number from 0 on")
    return int(text)


def _keep(session: Session, leave: Callable[[], None]) -> None:
    """Its client may come back for a while."""
    asyncio.get_running_loop().call_later(RESUME_WITHIN_S, _give_up, session, leave)


def _give_up(session: Session, leave: Callable[[], None]) -> None:
    """End a session whose connection is gone, unless another has taken it over."""
    if session.leave is leave:
        session.abort()
        session.ack(session.progress)


async def _wait(left: asyncio.Event) -> int:
    await left.wait()
    return TAKEN_OVER


async def _listen(talk: Conversation, session: Session) -> int:
    """Do what the client says, until nothing that it says can be decoded; returns the code to close with."""
    max_bytes = max_body(session.limits.max_segment * session.spec.input.nbytes)
    unreadable = 0
    async with _Exports(talk, session) as exports:
        while unreadable < MAX_UNREADABLE:
            try:
                message = await talk.receive(max_bytes)
            except InvalidInput as error:
                unreadable += 1
                await talk.send("error", error=error.to_wire())
                continue
            unreadable = 0
            try:
                if message.text("type") == "export":
                    exports.start(message)
                elif message.text("type") == "ping":
                    message.only("type")
                    await talk.send("pong")
                else:
                    _obey(message, session)
            except LockstepError as error:
                if session.end_reason is None:  # else `_speak` says it all
                    await talk.send("error", error=error.to_wire())
    return 4000 + InvalidInput.http


class _Exports:
    """Sends a session's checkpoints as they are asked for, one after another, beside everything else."""

    def __init__(self, talk: Conversation, session: Session) -> None:
        self._talk, self._session = talk, session
        self._task: asyncio.Task[None] | None = None
        self._is_due = False

    def start(self, message: Message) -> None:
        """The client wants one; those that are asked for while it is on its way are one."""
        message.only("type")
        if self._talk.encoding is not MSGPACK:
            raise InvalidInput(f"a checkpoint is bytes, which JSON has not: take the subprotocol {SUBPROTOCOL!r}")
        self._is_due = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    async def _send(self) -> None:
        with suppress(LockstepError, WebSocketDisconnect):  # the session has ended, as `_speak` says; nobody listens
            while self._is_due:
                self._is_due = False
                found = await self._session.export()
                await self._talk.send("checkpoint", at=found.at, checkpoint=found.record)

    async def __aenter__(self) -> "_Exports":
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _obey(message: Message, session: Session) -> None:
    kind = message.text("type")
    if kind == "segment":
        message.only("type", "x", "start", "acked", "rewind")
        x = message.array("x", session.spec.input)
        session.ack(message.number("acked") or 0)
        _check_rewind(message, session)
        session.submit(x, message.number("start"))
    elif kind == "ack":
        message.only("type", "acked")
        session.ack(message.number("acked") or 0)
    elif kind == "close":
        message.only("type", "start", "rewind", "abort")
        if message.flag("abort"):
            session.abort()
        else:
            _check_rewind(message, session)
            session.close(message.number("start"))
    else:
        raise InvalidInput(f"a message of type {kind!r} arrived, expected segment, ack, export, ping or close")


def _check_rewind(message: Message, session: Session) -> None:
    """Raise Rewound for what was sent before the client could know of a failed step."""
    rewind = message.number("rewind")
    if rewind not in (None, session.rewind):
        raise Rewound(
            f"session {session.name!r} was rewound to timestep {session.next} by a failed step: resend from there",
            expected=session.next,
            rewind=session.rewind,
        )


async def _speak(talk: Conversation, session: Session) -> int:
    """Send outputs and failures as they come, and how the session ended; returns the code to close with."""
    while True:
        try:
            if not await session.available():
                break
        except LockstepError as error:
            if session.stays and isinstance(error, Unavailable):
                return RESTART
            if session.stays and (isinstance(error, NotOwner) or session.end_reason == ADOPTED):
                return RESTART if session.is_unconfirmed else TAKEN_OVER  # by its own client, maybe
            if session.end_reason is not None:
                return await _tell_end(talk, session, error)
            await talk.send("error", error=error.to_wire())
        if outputs := session.read():
            for part in talk.encoding.cut(outputs, session.spec):
                await talk.send("outputs", **describe_outputs(session, part))
    return await _tell_end(talk, session, None)


async def _tell_end(talk: Conversation, session: Session, error: LockstepError | None) -> int:
    told = {"error": error.to_wire()} if error is not None and not isinstance(error, SessionEnded) else {}
    await talk.send("ended", reason=session.end_reason, progress=session.progress, **told)
    if session.stays:
        await asyncio.sleep(HANG_UP_WITHIN_S)  # one that has not hung up by then may come back for what was sent
    return 1000 if error is None or session.end_reason == "aborted" else 4000 + error.http


async def _first(*coroutines: Coroutine[Any, Any, int]) -> int:
    """The result of the one that ends first; the others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
