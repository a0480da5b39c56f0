"""Calls between processes of the cluster over TCP, straight to a port of the process that answers.

A message is its number, its length and bytes; the answer to a message has its number. A call through Ray takes longer:
it puts what is larger than 100 KB into the object store, and changes threads several times on either side; one through
gRPC's own server for Python costs 300 µs on each. Who may call is who has Ray's token, which the first message is, over
TLS where Ray uses it. How to get these is no public interface: the version of Ray is pinned.
"""

import asyncio
import contextvars
import logging
import os
import pickle
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from struct import Struct
from typing import Any, Generic, TypeVar, cast

import numpy as np
from ray._common.network_utils import build_address, parse_address  # type: ignore[attr-defined]
from ray._private.authentication.authentication_utils import is_token_auth_enabled, validate_request_token
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from serve_app.errors import LockstepError
from serve_app.wire import Parts

logger = logging.getLogger(__name__)
Q = TypeVar("Q")
A = TypeVar("A")

ANSWER_WITHIN_S = 60.0
CONNECT_WITHIN_S = 10.0
STOP_WITHIN_S = 1.0
ARRIVE_WITHIN_S = 4.0
"""The last answers of a server that stops; they may be large."""
PROBE_S = 0.5
LOST_AFTER_S = 15
"""Without a sign of life from the other machine."""
MAX_BYTES = 2**31
"""Of a message. Frames are cut where they are made."""
MAX_TOKEN_BYTES = 65536
BUFFER_BYTES = 256 * 1024
HEADER = Struct("<QQ")
CALLER_LOST: contextvars.ContextVar[asyncio.Event] = contextvars.ContextVar("caller_lost")
"""For whatever answers a call: is set when the connection is lost that the call has come by."""
TOKEN = 0
"""The number of the first message."""


async def is_listening(address: str) -> bool:
    """Whether the process may live that was to be reached there: False only when its machine says that it does not."""
    host, port = parse_address(address)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), PROBE_S)
    except ConnectionRefusedError:
        return False
    except (OSError, TimeoutError):
        return True
    writer.close()
    return True


@dataclass(frozen=True, slots=True)
class Codec(Generic[Q, A]):
    """Questions and answers ↔ bytes, in parts that are sent one after the other; what is read is the reader's."""

    encode: Callable[[Q], Parts]
    decode: Callable[[memoryview], Q]
    encode_reply: Callable[[A | LockstepError], Parts]
    decode_reply: Callable[[memoryview], A | LockstepError]


def _pickled(message: object) -> Parts:
    return [pickle.dumps(message)]


PICKLED: Codec[Any, Any] = Codec(_pickled, pickle.loads, _pickled, pickle.loads)
"""Of two ends of one application, whose messages are small."""


class CallServer(Generic[Q, A]):
    """A port where `answer` takes what is asked; what it raises, the caller is told."""

    def __init__(self, codec: Codec[Q, A], answer: Callable[[Q], Awaitable[A]]) -> None:
        self._codec = codec
        self._answer = answer
        self._server: asyncio.Server | None = None
        self._callers: set[_Caller[Q, A]] = set()

    async def start(self, host: str) -> str:
        """Take calls from now on, at a free port; returns the address."""
        loop = asyncio.get_running_loop()
        caller = partial(_Caller, self._codec, self._answer, self._callers)
        self._server = await loop.create_server(caller, host, ssl=_server_tls())
        address: str = build_address(host, self._server.sockets[0].getsockname()[1])
        return address

    async def stop(self) -> None:
        """Let the calls that are open be answered, and the answers arrive; take no more."""
        if self._server is None:
            return
        self._server.close()
        if calls := [call for caller in self._callers for call in caller.calls]:
            await asyncio.wait(calls, timeout=STOP_WITHIN_S)
        callers = list(self._callers)
        for caller in callers:
            caller.end()
        with suppress(TimeoutError):
            async with asyncio.timeout(ARRIVE_WITHIN_S):
                for caller in callers:
                    await caller.lost.wait()
        for caller in callers:
            caller.close()


class CallChannel(Generic[Q, A]):
    """The way to the CallServer at an address. Once it is lost, or closed, it stays so."""

    def __init__(self, codec: Codec[Q, A], address: str, answer_within_s: float | None = ANSWER_WITHIN_S) -> None:
        self._codec = codec
        self._address = address
        self._answer_within_s = answer_within_s
        self._connecting: asyncio.Task[_Answerer[Q, A]] | None = None
        self._is_closed = False

    async def connect(self) -> None:
        """Be connected. Raises OSError; nothing has been asked then."""
        await self._connected()

    async def call(self, question: Q) -> A:
        """The answer. Raises what the other side does, OSError where it cannot be reached (TimeoutError is one)."""
        answerer = await self._connected()
        async with asyncio.timeout(self._answer_within_s):
            reply = await answerer.call(question)
        if isinstance(reply, LockstepError):
            raise reply
        return reply

    async def _connected(self) -> "_Answerer[Q, A]":
        if self._is_closed:
            raise ConnectionError("the connection was closed here")
        if self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect(), context=contextvars.Context())
        return await asyncio.shield(self._connecting)

    @property
    def is_lost(self) -> bool:
        """Whether nothing can be asked here any more."""
        tried = self._connecting
        if self._is_closed or tried is None or not tried.done():
            return self._is_closed
        return tried.cancelled() or tried.exception() is not None or tried.result().is_closed

    async def close(self) -> None:
        """Ask nothing any more. May be called twice."""
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            (answerer,) = await asyncio.gather(self._connecting, return_exceptions=True)
            if isinstance(answerer, _Answerer):
                answerer.close()
                await answerer.lost.wait()  # or its socket would outlive an event loop that ends now

    async def _connect(self) -> "_Answerer[Q, A]":
        host, port = parse_address(self._address)
        loop, answerer = asyncio.get_running_loop(), partial(_Answerer, self._codec)
        async with asyncio.timeout(CONNECT_WITHIN_S):
            _, connected = await loop.create_connection(answerer, host, int(port), ssl=_client_tls())
        connected.send(TOKEN, [_token().encode()])
        return connected


class _Messages(asyncio.BufferedProtocol):
    """Numbered messages in both directions; `take` gets those that have come."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._end = 0
        self._large: tuple[int, memoryview] | None = None  # a message that the buffer does not hold, and its number
        self._may_be_large = False  # the next, as the last was: then its length comes first, and the rest to its place
        #: There is no connection any more.
        self.lost = asyncio.Event()
        #: Of a message that comes.
        self.max_bytes = MAX_BYTES

    def take(self, number: int, data: memoryview) -> None:
        """The next message."""
        raise NotImplementedError

    def send(self, number: int, parts: Parts) -> None:
        """Send a message, if there still is a connection."""
        if self._transport is not None:
            self._transport.writelines((HEADER.pack(number, sum(map(len, parts))), *parts))

    @property
    def is_closed(self) -> bool:
        """Whether there is no connection (any more)."""
        return self._transport is None

    def close(self) -> None:
        """Nothing is sent or taken any more."""
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def refuse(self, reason: str) -> None:
        """The other side is not what it should be."""
        logger.warning("a connection is closed: %s", reason)
        self.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not instances of it

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.lost.set()

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._large is not None:
            return self._large[1][self._end :]
        is_header = self._may_be_large and self._end < HEADER.size
        return self._buffer[self._end : HEADER.size if is_header else None]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        if self._large is not None:
            number, whole = self._large
            if self._end == len(whole):
                self._large, self._end, self._may_be_large = None, 0, True
                self.take(number, whole)
            return
        begin = 0
        while self._end - begin >= HEADER.size and self._transport is not None:
            number, length = HEADER.unpack_from(self._buffer, begin)
            if length > self.max_bytes:
                self.refuse(f"a message of {length} bytes, where the limit is {self.max_bytes}")
                return
            first, end = begin + HEADER.size, begin + HEADER.size + length
            if end > self._end:
                if HEADER.size + length > len(self._buffer):
                    self._large = number, np.empty(length, np.uint8).data
                    self._to_front(first, self._large[1])
                    return
                break
            self._may_be_large = False
            self.take(number, memoryview(bytes(self._buffer[first:end])))
            begin = end
        if begin > 0:
            self._to_front(begin, self._buffer)

    def _to_front(self, begin: int, of: memoryview) -> None:
        """What has come since `begin` is the first there."""
        rest = bytes(self._buffer[begin : self._end])
        of[: len(rest)] = rest
        self._end = len(rest)


class _Caller(_Messages, Generic[Q, A]):
    """One who calls, as the server sees it."""

    def __init__(self, codec: Codec[Q, A], answer: Callable[[Q], Awaitable[A]], callers: "set[_Caller[Q, A]]") -> None:
        super().__init__()
        self._codec = codec
        self._answer = answer
        self._callers = callers
        self._is_known, self.max_bytes = False, MAX_TOKEN_BYTES
        self._has_ended = False
        self.calls: set[asyncio.Task[None]] = set()

    def end(self) -> None:
        """Say no more. The caller closes the connection when it has read all; what it still asks is not taken.

        Closed here while there is something to read, it would be reset, and what is on its way be lost.
        """
        self._has_ended = True
        for call in self.calls:
            call.cancel()
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        elif self._transport is not None:  # TLS has no end of its own
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._callers.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._callers.discard(self)
        for call in self.calls:
            call.cancel()

    def take(self, number: int, data: memoryview) -> None:
        if self._has_ended:
            return
        if self._is_known:
            call = asyncio.get_running_loop().create_task(self._run(number, self._codec.decode(data)))
            self.calls.add(call)
            call.add_done_callback(self.calls.discard)
        elif number == TOKEN and _is_token(bytes(data).decode(errors="replace")):
            self._is_known, self.max_bytes = True, MAX_BYTES
        else:
            self.refuse("its first message is not Ray's token")

    async def _run(self, number: int, question: Q) -> None:
        CALLER_LOST.set(self.lost)
        try:
            reply: A | LockstepError = await self._answer(question)
        except LockstepError as error:
            reply = error
        except Exception:
            logger.exception("a call failed")
            reply = LockstepError("an unexpected error: the server's log has it")
        self.send(number, self._codec.encode_reply(reply))


class _Answerer(_Messages, Generic[Q, A]):
    """Who answers, as callers see it."""

    def __init__(self, codec: Codec[Q, A]) -> None:
        super().__init__()
        self._codec = codec
        self._numbers = count(TOKEN + 1)
        self._waiting: dict[int, asyncio.Future[A | LockstepError]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_AFTER_S // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_AFTER_S // 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_AFTER_S * 1000)

    async def call(self, question: Q) -> A | LockstepError:
        """What is answered. Raises ConnectionError."""
        if self._transport is None:
            raise ConnectionError("the connection is lost")
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self.send(number, self._codec.encode(question))
        try:
            reply: A | LockstepError = await waiting
            return reply
        finally:
            del self._waiting[number]

    def take(self, number: int, data: memoryview) -> None:
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(self._codec.decode_reply(data))

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError(f"the connection is lost: {error or 'it was closed'}"))


def _token() -> str:
    """Ray's, as a header has it; empty where it has none."""
    if not is_token_auth_enabled():
        return ""
    return str(next(iter(AuthenticationTokenLoader.instance().get_token_for_http_header().values()), ""))


def _is_token(said: str) -> bool:
    return bool(not is_token_auth_enabled() or (said and validate_request_token(said)))


def _server_tls() -> ssl.SSLContext | None:
    """Where Ray uses TLS, with its certificates: both sides have to have them."""
    tls = _tls(ssl.PROTOCOL_TLS_SERVER)
    if tls is not None:
        tls.verify_mode = ssl.CERT_REQUIRED
    return tls


def _client_tls() -> ssl.SSLContext | None:
    return _tls(ssl.PROTOCOL_TLS_CLIENT)


def _tls(protocol: "ssl._SSLMethod") -> ssl.SSLContext | None:
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    context = ssl.SSLContext(protocol)
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    context.load_verify_locations(os.environ["RAY_TLS_CA_CERT"])
    return context
