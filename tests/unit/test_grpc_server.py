"""The gRPC port of our own, by clients that do what gRPC's do not: tests/unit/test_oip_grpc.py has the others."""

import asyncio
import gzip
import socket
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import ngh2
import pytest
from google.protobuf.message import Message

from serve_app.ingress import grpc_server
from serve_app.ingress.grpc_server import Context, GrpcServer, methods
from serve_app.ingress.protos import oip_pb2 as pb

pytestmark = pytest.mark.asyncio

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
HEADERS = [
    (b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"x"), (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]  # fmt: skip
INFER, STREAM = b"/inference.GRPCInferenceService/ModelInfer", b"/inference.GRPCInferenceService/ModelStreamInfer"


class Echo:
    """Unary calls answer with the request's id; streams answer each message when `release` is called, or at once."""

    def __init__(self) -> None:
        self.streams: list[EchoStream] = []
        self.waits = False
        self.cancelled = 0

    def __getattr__(self, name: str) -> Any:
        return self._unary

    async def _unary(self, request: Any, context: Context) -> Message:
        if request.id == "fails":
            raise RuntimeError("a fault")
        if request.id == "refused":
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("nö %")
            context.set_trailing_metadata([("retry-after", "1")])
        try:
            await asyncio.sleep(60 if request.id == "slow" else 0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return pb.ModelInferResponse(id=request.id)

    def open(self, metadata: Mapping[str, str], send: Callable[[bytes], None]) -> "EchoStream":
        self.streams.append(EchoStream(self, send))
        return self.streams[-1]


class EchoStream:
    def __init__(self, echo: Echo, send: Callable[[bytes], None]) -> None:
        self.outstanding = self.outstanding_bytes = 0
        self.taken: list[str] = []
        self.has_left = False
        self._echo, self._send = echo, send

    def take(self, data: bytes) -> None:
        message = pb.ModelInferRequest.FromString(data)
        if message.id == "fails":
            raise RuntimeError("a fault")
        self.outstanding += 1
        self.taken.append(message.id)
        if not self._echo.waits:
            self.answer(message.id)

    def answer(self, identity: str) -> None:
        self._send(pb.ModelStreamInferResponse(error_message=identity).SerializeToString())

    def replied(self) -> None:
        self.outstanding -= 1

    def leave(self) -> None:
        assert not self.has_left
        self.has_left = True


class Client:
    """HTTP/2 as it comes: nothing is checked or put right."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.http = ngh2.Connection(ngh2.Role.CLIENT, ngh2.Configuration(auto_window_update=False))
        self.http.initiate_connection()
        self.reader, self.writer = reader, writer
        self.headers: dict[int, dict[bytes, bytes]] = {}
        self.data: dict[int, bytearray] = {}
        self.over: set[int] = set()

    def flush(self) -> None:
        self.writer.write(self.http.data_to_send())

    def call(self, path: bytes, *data: bytes, end: bool = True, headers: Any = ()) -> int:
        stream = self.http.send_request([(b":path", path), *HEADERS, *headers])
        for part in data:
            self.http.send_data(stream, part)
        if end:
            self.http.end_stream(stream)
        self.flush()
        return stream

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                if not (data := await self.reader.read(65536)):
                    raise ConnectionError("the server has closed the connection")
                self.http.receive_data(data)
                for event in self.http.events():
                    match event:
                        case ngh2.ResponseReceived() | ngh2.TrailersReceived():
                            self.headers.setdefault(event.stream_id, {}).update(event.headers)
                        case ngh2.DataReceived():
                            self.data.setdefault(event.stream_id, bytearray()).extend(event.data)
                        case ngh2.StreamClosed():
                            self.over.add(event.stream_id)
                self.flush()

    async def status(self, stream: int) -> tuple[str, str]:
        await self.until(lambda: b"grpc-status" in self.headers.get(stream, {}))
        found = self.headers[stream]
        code = next(code for code in grpc.StatusCode if code.value[0] == int(found[b"grpc-status"]))
        return code.name, found.get(b"grpc-message", b"").decode()


@asynccontextmanager
async def served(max_outstanding: int = 8) -> AsyncIterator[tuple[Echo, Client, GrpcServer]]:
    echo = Echo()
    server = GrpcServer(methods(SERVICE, echo, {"ModelStreamInfer": echo.open}), max_outstanding)
    client = Client(*await asyncio.open_connection("127.0.0.1", await server.start("127.0.0.1", 0)))
    yield echo, client, server
    server.stop()
    client.writer.close()
    await client.writer.wait_closed()
    assert not server.connections


def message(identity: str = "a", compressed: int = 0, encode: Callable[[bytes], bytes] = bytes) -> bytes:
    data = encode(pb.ModelInferRequest(id=identity).SerializeToString())
    return bytes([compressed]) + len(data).to_bytes(4) + data


async def test_a_message_may_come_in_any_parts() -> None:
    async with served() as (_, client, _):
        whole = message("some id")
        stream = client.call(INFER, *(whole[i : i + 1] for i in range(len(whole))))
        assert await client.status(stream) == ("OK", "")
        assert pb.ModelInferResponse.FromString(bytes(client.data[stream][5:])).id == "some id"
        stream = client.call(STREAM, message("a") + message("b") + message("c")[:3], end=False)
        await client.until(lambda: len(client.data.get(stream, b"")) >= 16)
        client.http.send_data(stream, message("c")[3:])
        client.http.end_stream(stream)
        client.flush()
        assert await client.status(stream) == ("OK", "")
        assert client.data[stream].count(b"\x0a\x01") == 3


@pytest.mark.parametrize(("encoding", "encode"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
async def test_compressed_messages(encoding: bytes, encode: Callable[[bytes], bytes]) -> None:
    async with served() as (_, client, _):
        headers = [(b"grpc-encoding", encoding)]
        assert await client.status(client.call(INFER, message("a", 1, encode), headers=headers)) == ("OK", "")
        code, _ = await client.status(client.call(INFER, message("a", 1), headers=headers))
        assert code == "INVALID_ARGUMENT"
        code, text = await client.status(client.call(INFER, message("a", 1, encode)[:-3], headers=headers))
        assert (code, text) == ("INTERNAL", "the last message is cut off")


@pytest.mark.parametrize(
    ("data", "headers", "code", "text"),
    [
        ([], [], "INTERNAL", "none came"),
        ([message(), message()], [], "INTERNAL", "a second one came"),
        ([message()[:-1]], [], "INTERNAL", "cut off"),
        ([b"\0\xff\xff\xff\xff"], [], "RESOURCE_EXHAUSTED", "the limit is 67108864"),
        ([b"\0\0\0\0\x03abc"], [], "INVALID_ARGUMENT", "3 bytes is no ModelInferRequest"),
        ([message("a", 1)], [(b"grpc-encoding", b"snappy")], "UNIMPLEMENTED", "'snappy'"),
        ([message("refused")], [], "NOT_FOUND", "n%C3%B6 %25"),
        ([message("fails")], [], "INTERNAL", "the server's log has it"),
        ([message("slow")], [(b"grpc-timeout", b"20m")], "DEADLINE_EXCEEDED", "0.02 s"),
    ],
)
async def test_what_cannot_be_answered(data: list[bytes], headers: Any, code: str, text: str) -> None:
    async with served() as (_, client, _):
        found = await client.status(client.call(INFER, *data, headers=headers))
        assert found[0] == code
        assert text in found[1]
        assert await client.status(client.call(INFER, message())) == ("OK", "")


async def test_a_fault_in_one_call_costs_no_other_of_the_connection() -> None:
    async with served() as (echo, client, _):
        echo.waits = True
        other = client.call(STREAM, message("a"))
        code, text = await client.status(client.call(STREAM, message("fails"), end=False))
        assert (code, "the server's log has it" in text) == ("INTERNAL", True)
        assert [requests.has_left for requests in echo.streams] == [False, True]
        echo.streams[0].answer("a")
        assert await client.status(other) == ("OK", "")


async def test_what_is_no_call_of_this_service() -> None:
    async with served() as (_, client, _):
        code, text = await client.status(client.call(b"/inference.GRPCInferenceService/Other", message()))
        assert (code, "Other" in text) == ("UNIMPLEMENTED", True)
        stream = client.http.send_request([*HEADERS[:3], (b":path", INFER), (b"content-type", b"text/plain")])
        client.flush()
        await client.until(lambda: stream in client.headers)
        assert client.headers[stream][b":status"] == b"415"


async def test_no_more_is_taken_from_a_stream_than_may_be_outstanding() -> None:
    async with served(max_outstanding=8) as (echo, client, _):
        echo.waits = True
        stream = client.call(STREAM, *(message(str(i)) for i in range(30)))
        other = client.call(INFER, message())
        assert await client.status(other) == ("OK", "")
        (requests,) = echo.streams
        assert requests.taken == [str(i) for i in range(8)]
        for i in range(30):
            requests.answer(str(i))
            await asyncio.sleep(0)
            assert len(requests.taken) <= i + 9
        assert await client.status(stream) == ("OK", "")
        assert requests.taken == [str(i) for i in range(30)]
        assert requests.has_left


async def test_no_more_is_taken_from_a_stream_than_some_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MAX_OUTSTANDING_BYTES", 100)
    async with served() as (echo, client, _):
        echo.waits = True
        stream = client.call(STREAM, message("0"), end=False)
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        (requests,) = echo.streams
        requests.outstanding_bytes = 101
        client.http.send_data(stream, message("1"))
        client.http.end_stream(stream)
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        assert requests.taken == ["0"]
        requests.outstanding_bytes = 100
        requests.answer("0")
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        assert requests.taken == ["0", "1"]
        requests.answer("1")
        assert await client.status(stream) == ("OK", "")


async def test_what_is_said_of_an_error_fits_into_headers() -> None:
    async with served() as (_, client, _):
        code, text = await client.status(client.call(b"/" + b"%" * 30_000, message()))
        assert (code, text[:30]) == ("UNIMPLEMENTED", "there is no method /%25%25%25%")


async def test_headers_of_any_bytes_cost_no_other_call() -> None:
    async with served() as (echo, client, _):
        echo.waits = True
        stream = client.call(STREAM, message("0"), end=False)
        other = client.http.send_request(
            [*HEADERS[:3], (b":path", INFER), (b"content-type", b"text/\xff"), (b"other", b"\xff")]
        )
        client.flush()
        await client.until(lambda: other in client.headers)
        assert client.headers[other][b":status"] == b"415"
        echo.streams[0].answer("0")
        client.http.end_stream(stream)
        client.flush()
        assert await client.status(stream) == ("OK", "")


async def test_a_client_that_reads_nothing_holds_up_itself_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MAX_UNSENT_BYTES", 1000)
    async with served(max_outstanding=10**6) as (echo, client, _):
        long = "x" * 5000
        stream = client.call(STREAM, *(message(long) for _ in range(40)), end=False)  # its window is 65,535
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        (requests,) = echo.streams
        taken = len(requests.taken)
        assert taken < 20
        while len(requests.taken) < 40:
            client.http.acknowledge_received_data(len(client.data[stream]), stream)
            client.data[stream].clear()
            client.flush()
            await client.until(lambda: len(client.data[stream]) > 5000)


async def test_calls_end_with_their_client() -> None:
    async with served() as (echo, client, server):
        echo.waits = True
        slow, stream = client.call(INFER, message("slow")), client.call(STREAM, message(), end=False)
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        client.http.reset_stream(slow)
        client.flush()
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        assert (echo.cancelled, echo.streams[0].has_left) == (1, False)
        echo.streams[0].answer("a")
        client.http.reset_stream(stream)
        client.flush()
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        assert echo.streams[0].has_left
        client.call(STREAM, message(), end=False)
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        client.writer.close()
        while server.connections:
            await asyncio.sleep(0.001)
        assert echo.streams[1].has_left
        echo.streams[1].answer("nobody hears")


async def test_a_client_whose_machine_is_gone_is_noticed() -> None:
    async with served() as (_, client, server):
        await client.status(client.call(INFER, message()))
        (connection,) = server.connections
        assert connection._transport is not None
        of = connection._transport.get_extra_info("socket")
        assert of.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle_s, every_s, tries = (
            of.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert 0 < idle_s + every_s * tries <= grpc_server.LOST_AFTER_S


async def test_what_is_no_http2_closes_the_connection() -> None:
    async with served() as (_, client, server):
        reader, writer = await asyncio.open_connection(*client.writer.get_extra_info("peername"))
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()
        while len(server.connections) > 1:
            await asyncio.sleep(0.001)
        assert await client.status(client.call(INFER, message())) == ("OK", "")


async def test_calls_that_run_go_on_when_no_more_are_taken() -> None:
    async with served() as (echo, client, server):
        echo.waits = True
        stream = client.call(STREAM, message())
        assert await client.status(client.call(INFER, message())) == ("OK", "")
        server.refuse()
        with pytest.raises(OSError, match="onnect"):
            await asyncio.open_connection(*client.writer.get_extra_info("peername"))
        echo.streams[0].answer("a")
        assert await client.status(stream) == ("OK", "")


@pytest.mark.parametrize("begins", ["with it", "before"])
@pytest.mark.parametrize("what", [message("a"), b"\0\0\0\0\1\xff"], ids=["a message", "no message"])
async def test_who_gives_up_at_once_costs_no_other_call(what: bytes, begins: str) -> None:
    """All in one read: its messages could be answered to nobody."""
    async with served() as (_, client, _):
        other = client.call(STREAM, message("before"), end=False)
        given_up = client.http.send_request([(b":path", STREAM), *HEADERS])
        if begins == "before":
            client.flush()
            await client.until(lambda: b"before" in client.data.get(other, b""))
        client.http.send_data(given_up, what)
        part = client.http.data_to_send()
        client.http.reset_stream(given_up)
        client.writer.write(part + client.http.data_to_send())
        client.http.send_data(other, message("after"))
        client.http.end_stream(other)
        client.flush()
        assert await client.status(other) == ("OK", "")
        assert b"after" in client.data[other]
