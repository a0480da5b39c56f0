"""gRPC services at a port of this process: HTTP/2 by ngh2 (nghttp2), calls as its protocol has them.

gRPC's own server for Python costs several times what a small message is worth: each one is handed between its threads
and the event loop, and wakes a task. Here all that a connection has brought is taken in one turn of the loop, and all
that is to go to it leaves in one write. The wire protocol: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

import asyncio
import contextvars
import logging
import re
import socket
import zlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, cast
from urllib.parse import quote

import grpc
import ngh2
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 * 2**20
MAX_OUTSTANDING_BYTES = MAX_MESSAGE_BYTES
"""Of a stream, once unpacked: a few bytes may unpack to many."""
MAX_STREAMS = 4096
"""Calls of a connection at a time; the client keeps others back."""
STREAM_WINDOW = 2**20
CONNECTION_WINDOW = 16 * 2**20
MAX_UNSENT_BYTES = 4 * 2**20
"""Of replies that a client does not read: no more is taken from that call meanwhile."""
MAX_DETAILS = 4096
"""Characters of what is said of an error: headers have a limit too."""
LOST_AFTER_S = 60
"""A client whose machine answers nothing is gone then."""
PREFIX_BYTES = 5
_TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])")
_SECONDS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_ENCODINGS = {b"gzip": 31, b"deflate": 15}  # window bits of zlib
_HEADERS = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-accept-encoding", b"gzip,deflate")]


class Requests(Protocol):
    """The server's side of a call that streams in both directions."""

    #: Messages that were taken, and are not answered; and the bytes that are kept of them.
    outstanding: int
    outstanding_bytes: int

    def take(self, data: bytes) -> None:
        """The next message of the client. Raises DecodeError where it is none."""
        ...

    def replied(self) -> None:
        """A reply goes out."""
        ...

    def leave(self) -> None:
        """The call is over."""
        ...


class Method(NamedTuple):
    """A unary one has `call(message, context)`; one that streams both ways begins with `open(metadata, send)`."""

    request: type[Message]
    call: Callable[[Any, "Context"], Coroutine[Any, Any, Message]] | None
    open: Callable[[Mapping[str, str], Callable[[bytes], None]], Requests] | None


def methods(
    service: ServiceDescriptor, of: object, streams: Mapping[str, Callable[..., Requests]]
) -> dict[str, Method]:
    """The methods of a service by path: `of` has the unary ones by name, `streams` the others."""
    found = {}
    for method in service.methods:
        unary = None if method.name in streams else getattr(of, method.name)
        path = f"/{service.full_name}/{method.name}"
        found[path] = Method(GetMessageClass(method.input_type), unary, streams.get(method.name))
    return found


@dataclass(slots=True)
class Context:
    """Of a unary call, as grpc.ServicerContext has it."""

    metadata: Mapping[str, str]
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailing: Sequence[tuple[str, str]] = ()

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """What came with the call."""
        return tuple(self.metadata.items())

    def set_code(self, code: grpc.StatusCode) -> None:
        """How it ends."""
        self.code = code

    def set_details(self, details: str) -> None:
        """Why."""
        self.details = details

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """What else there is to say."""
        self.trailing = metadata


class GrpcServer:
    """Serves methods at a port, which processes of one machine may share: each connection goes to one of them."""

    def __init__(self, methods: Mapping[str, Method], max_outstanding: int) -> None:
        """max_outstanding: messages of a stream that are not answered; no more are taken meanwhile."""
        self.methods = methods
        self.max_outstanding = max_outstanding
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen there (port 0: at any that is free); returns the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(partial(_Connection, self), host, port, reuse_port=True, backlog=1024)
        return int(self._server.sockets[0].getsockname()[1])

    def refuse(self) -> None:
        """Take no more connections and calls; those that run go on."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.refuse()

    def stop(self) -> None:
        """End all calls and connections."""
        self.refuse()
        for connection in list(self.connections):
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection of a client: its calls, by stream."""

    def __init__(self, server: GrpcServer) -> None:
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.http = ngh2.Connection(ngh2.Role.SERVER, ngh2.Configuration(auto_window_update=False))
        self.calls: dict[int, _Call] = {}
        #: Calls that take nothing for now.
        self.held: set[_Call] = set()
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._flush_due = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not instances of it
        self.server.connections.add(self)
        client = transport.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, LOST_AFTER_S // 3)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_AFTER_S // 3)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        self.http.initiate_connection(
            {ngh2.Setting.MAX_CONCURRENT_STREAMS: MAX_STREAMS, ngh2.Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW}
        )
        self.http.set_local_window_size(CONNECTION_WINDOW)
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            self.http.receive_data(data)
        except ngh2.ProtocolError as error:
            logger.info("a connection is closed, its client breaks the protocol: %s", error)
            self._flush()
            self.close()
            return
        events = list(self.http.events())
        gone = {event.stream_id for event in events if isinstance(event, ngh2.StreamReset)}
        for stream in gone & self.calls.keys():
            self.calls[stream].leave()  # what came before that cannot be answered any more
        for event in events:
            if isinstance(event, ngh2.DataReceived):
                self._data(event.stream_id, event.data)
                if event.end_stream and (call := self.calls.get(event.stream_id)):
                    call.end()
            elif isinstance(event, ngh2.RequestReceived):
                if event.stream_id not in gone:
                    self._request(event)
            elif isinstance(event, ngh2.TrailersReceived):
                if call := self.calls.get(event.stream_id):
                    call.end()
            elif isinstance(event, ngh2.StreamClosed) and (call := self.calls.get(event.stream_id)):
                call.leave()
        self._flush()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self.server.connections.discard(self)
        for call in list(self.calls.values()):
            call.leave()

    @property
    def is_open(self) -> bool:
        """Whether anything can still be sent."""
        return self._transport is not None

    def refuse(self) -> None:
        """The client is to open no more calls here."""
        if self._transport is not None:
            self.http.send_goaway()
            self._flush()

    def close(self) -> None:
        """It is over."""
        if self._transport is not None:
            self._transport.close()

    def flush_soon(self) -> None:
        """Send what there is to send when this turn of the event loop is over."""
        if not self._flush_due:
            self._flush_due = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        if self._transport is None or self._is_paused:
            return
        if data := self.http.data_to_send():
            self._transport.write(data)
        for call in list(self.held):
            call.go_on()
        if not self.http.want_read and not self.http.want_write:
            self._transport.close()

    def _data(self, stream: int, data: bytes) -> None:
        if call := self.calls.get(stream):
            call.data(data)
        else:
            self.http.acknowledge_received_data(len(data), stream)  # of a call that is over

    def _request(self, event: ngh2.RequestReceived) -> None:
        headers = dict(event.headers)
        kind = headers.get(b"content-type", b"")
        if headers.get(b":method") != b"POST" or not kind.startswith(b"application/grpc"):
            self.http.send_response(event.stream_id, [(b":status", b"415")], end_stream=True)
            return
        call = self.calls[event.stream_id] = _Call(self, event.stream_id, headers)
        call.begin()
        if event.end_stream:
            call.end()


class _Call:
    """One call: messages in, messages and a status out."""

    def __init__(self, connection: _Connection, stream: int, headers: Mapping[bytes, bytes]) -> None:
        self._connection = connection
        self._http = connection.http
        self._stream = stream
        self._headers = headers
        self._metadata: Mapping[str, str] = {}
        self._method: Method | None = None
        self._requests: Requests | None = None
        self._running: asyncio.Task[None] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._buffer = bytearray()  # messages that are not taken, the last one maybe not all here
        self._message: Message | None = None  # of a unary call
        self._num_unacknowledged = 0
        self._has_ended = False  # the client sends no more
        self._has_begun = False  # headers are out
        self._is_over = False

    def begin(self) -> None:
        """Find out what is called."""
        path = self._headers.get(b":path", b"").decode(errors="replace")
        self._metadata = metadata = {
            name.decode(): value.decode(errors="replace") for name, value in self._headers.items() if name[:1] != b":"
        }
        self._method = self._connection.server.methods.get(path)
        if self._method is None:
            self.finish(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {path} here")
            return
        if (timeout := metadata.get("grpc-timeout")) is not None and (found := _TIMEOUT.fullmatch(timeout)):
            seconds = int(found[1]) * _SECONDS[found[2]]
            text = f"the call has taken longer than its {seconds:g} s"
            self._deadline = self._connection.loop.call_later(
                seconds, self.finish, grpc.StatusCode.DEADLINE_EXCEEDED, text
            )
        if self._method.open is not None:
            self._requests = self._method.open(metadata, self.send)

    def data(self, data: bytes) -> None:
        """More of the client's messages."""
        self._num_unacknowledged += len(data)
        if not self._buffer and len(data) == PREFIX_BYTES + int.from_bytes(data[1:PREFIX_BYTES]) and self._may_take():
            self._take(data[0], data[PREFIX_BYTES:])
        else:
            self._buffer += data
        self.go_on()

    def end(self) -> None:
        """The client sends no more."""
        self._has_ended = True
        self.go_on()

    def go_on(self) -> None:
        """Take what is here, as far as it may be taken; more may come if all of it was."""
        while len(self._buffer) >= PREFIX_BYTES and self._may_take():
            end = PREFIX_BYTES + int.from_bytes(self._buffer[1:PREFIX_BYTES])
            if end > PREFIX_BYTES + MAX_MESSAGE_BYTES:
                text = f"a message of {end - PREFIX_BYTES} bytes, the limit is {MAX_MESSAGE_BYTES}: send less at once"
                self.finish(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            elif len(self._buffer) < end:
                break
            else:
                self._take(self._buffer[0], bytes(self._buffer[PREFIX_BYTES:end]))
                del self._buffer[:end]
        if self._may_take() or self._is_over:
            self._connection.held.discard(self)
            self._acknowledge()
            if self._has_ended and not self._is_over:
                self._all_taken()
        else:
            self._connection.held.add(self)

    def send(self, message: bytes) -> None:
        """The next reply of a stream, as it is on the wire."""
        if self._is_over:
            return
        assert self._requests is not None
        self._requests.replied()
        self._write(message)
        if self._has_ended and not self._buffer and not self._requests.outstanding:
            self.finish(grpc.StatusCode.OK)

    def finish(self, code: grpc.StatusCode, details: str = "", trailing: Sequence[tuple[str, str]] = ()) -> None:
        """The call ends with that status."""
        if self._is_over:
            return
        status = [(b"grpc-status", str(code.value[0]).encode())]
        if details:
            status.append((b"grpc-message", quote(details[:MAX_DETAILS], safe=" !\"#$&'()*+,/:;<=>?@[]^`{|}").encode()))
        status += [(name.encode(), value.encode()) for name, value in trailing]
        if self._has_begun:
            self._http.send_trailers(self._stream, status)
        else:
            self._http.send_response(self._stream, [*_HEADERS, *status], end_stream=True)
        self._connection.flush_soon()
        self.leave()

    def leave(self) -> None:
        """It is over: nobody sends or waits any more."""
        if self._is_over:
            return
        self._is_over = True
        del self._connection.calls[self._stream]
        self._connection.held.discard(self)
        self._buffer.clear()
        self._acknowledge()
        if self._deadline is not None:
            self._deadline.cancel()
        if self._requests is not None:
            self._requests.leave()
        if self._running is not None:
            self._running.cancel()

    def _may_take(self) -> bool:
        if self._is_over:
            return False
        if self._requests is None:
            return True
        return (
            self._requests.outstanding < self._connection.server.max_outstanding
            and self._requests.outstanding_bytes <= MAX_OUTSTANDING_BYTES
            and self._http.queued_body_size(self._stream) < MAX_UNSENT_BYTES
        )

    def _acknowledge(self) -> None:
        """Let the client send as much again."""
        if self._num_unacknowledged and self._connection.is_open:
            self._http.acknowledge_received_data(self._num_unacknowledged, self._stream)
        self._num_unacknowledged = 0

    def _take(self, is_compressed: int, data: bytes) -> None:
        assert self._method is not None
        try:
            if is_compressed:
                data = self._inflate(data)
            if self._requests is not None:
                self._requests.take(data)
            elif self._message is None:
                self._message = self._method.request.FromString(data)
            else:
                self.finish(grpc.StatusCode.INTERNAL, "a unary call has one message, a second one came")
        except _Refused as error:
            self.finish(error.code, error.details)
        except DecodeError:
            name = self._method.request.DESCRIPTOR.name
            self.finish(grpc.StatusCode.INVALID_ARGUMENT, f"a message of {len(data)} bytes is no {name}")
        except Exception:  # costs this call only, not the others of the connection
            logger.exception("a call failed: %s", self._headers.get(b":path"))
            self.finish(grpc.StatusCode.INTERNAL, "an unexpected error: the server's log has it")

    def _inflate(self, data: bytes) -> bytes:
        encoding = self._headers.get(b"grpc-encoding", b"identity")
        if encoding not in _ENCODINGS:
            text = f"messages are compressed by {encoding.decode(errors='replace')!r}, gzip and deflate are known here"
            raise _Refused(grpc.StatusCode.UNIMPLEMENTED, text)
        inflate = zlib.decompressobj(_ENCODINGS[encoding])
        try:
            found = inflate.decompress(data, MAX_MESSAGE_BYTES)
        except zlib.error as error:
            raise _Refused(
                grpc.StatusCode.INVALID_ARGUMENT, f"a message is not what {encoding!r} gives: {error}"
            ) from None
        if inflate.unconsumed_tail or not inflate.eof:
            text = f"a message is cut off, or of more than {MAX_MESSAGE_BYTES} bytes, the limit: send less at once"
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return found

    def _all_taken(self) -> None:
        """The client sends no more, and all its messages were taken."""
        assert self._method is not None
        if self._buffer:
            self.finish(grpc.StatusCode.INTERNAL, "the last message is cut off")
        elif self._requests is not None:
            if not self._requests.outstanding:
                self.finish(grpc.StatusCode.OK)
        elif self._message is None:
            self.finish(grpc.StatusCode.INTERNAL, "a unary call has one message, none came")
        elif self._running is None:
            # In a context of its own: what is opened on the way must not hang on this call.
            self._running = self._connection.loop.create_task(self._run(), context=contextvars.Context())

    async def _run(self) -> None:
        """A unary call."""
        assert self._method is not None and self._method.call is not None
        context = Context(self._metadata)
        try:
            reply = await self._method.call(self._message, context)
        except Exception:
            logger.exception("a call failed: %s", self._headers.get(b":path"))
            self.finish(grpc.StatusCode.INTERNAL, "an unexpected error: the server's log has it")
            return
        if self._is_over:
            return
        if context.code is grpc.StatusCode.OK:
            self._write(reply.SerializeToString())
        self.finish(context.code, context.details, context.trailing)

    def _write(self, message: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._http.send_response(self._stream, _HEADERS)
        self._http.send_data(self._stream, b"".join((b"\0", len(message).to_bytes(4), message)))
        self._connection.flush_soon()


class _Refused(Exception):
    """A message that cannot be read."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        self.details = details
