"""Conversations over real WebSockets, to a whole system in this process; and the client that speaks them."""

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import msgpack
import numpy as np
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

import clients.client
from clients import websocket as websocket_client
from clients.websocket import WebSocketCarrier, open_websocket
from serve_app import lease
from serve_app.config import AppConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.errors import (
    InvalidInput,
    NotOwner,
    SessionEnded,
    SessionExists,
    StateLost,
    StepFailed,
    Unavailable,
    UnknownModel,
    WindowFull,
)
from serve_app.ingress import websocket as websocket_ingress
from serve_app.ingress.codec import MSGPACK, read_array
from serve_app.ingress.http import build_http
from serve_app.ingress.hub import Hub
from serve_app.ingress.websocket import SUBPROTOCOL, Conversation
from serve_app.models.interface import RecurrentModel
from serve_app.session import Session
from tests.fakes import SumModel
from tests.local import LocalCluster, local

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(30)]

CONFIG = AppConfig(
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(max_sessions=64, max_segment_timesteps=64, max_window_timesteps=256),
    frame=FrameConfig(answer_within_s=0.05),
)
ALONE = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, checkpoint_timesteps=0))
"""Sessions that end with their owner."""


@dataclasses.dataclass
class System:
    address: str
    cluster: LocalCluster
    hub: Hub


@asynccontextmanager
async def serving(hub: Hub, within: Callable[[ASGIApp], ASGIApp] = lambda app: app) -> AsyncIterator[str]:
    """An ingress; yields its address."""
    settings = uvicorn.Config(
        within(build_http(hub)),
        port=0,
        log_config=None,
        lifespan="off",
        ws="websockets-sansio",
        timeout_graceful_shutdown=1,
    )
    settings.load()
    server = uvicorn.Server(settings)
    server.lifespan = settings.lifespan_class(settings)
    await server.startup()  # serve() would also take the signals, and look only now and then whether to stop
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"ws://127.0.0.1:{port}"
    finally:
        await server.shutdown()


@asynccontextmanager
async def system(*models: RecurrentModel, config: AppConfig = CONFIG) -> AsyncIterator[System]:
    async with (
        local(*(models or (SumModel(),)), config=config, ack_on_receipt=False) as (cluster, hub),
        serving(hub) as address,
    ):
        yield System(address, cluster, hub)


def within_serve(app: ASGIApp) -> ASGIApp:
    """Serve reads ahead, and cancels what serves a client that hangs up as soon as it has read so."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        events: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            kind = None
            while kind != "websocket.disconnect":
                event = await receive()
                kind = event["type"]
                await events.put(event)

        tasks = [asyncio.create_task(read()), asyncio.create_task(app(scope, events.get, send))]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    return run


class Talk:
    """A client that says what it is told to, in either encoding."""

    def __init__(self, websocket: ClientConnection, packed: bool) -> None:
        self.websocket, self.packed = websocket, packed

    async def send(self, kind: str, **values: Any) -> None:
        message = {"type": kind, **values}
        await self.websocket.send(MSGPACK.encode(message) if self.packed else json.dumps(message))

    async def receive(self, kind: str) -> dict[str, Any]:
        data = await self.websocket.recv()
        message: dict[str, Any] = msgpack.unpackb(data) if self.packed else json.loads(data)
        assert message.pop("type") == kind, message
        return message

    async def refused(self, code: str) -> dict[str, Any]:
        error: dict[str, Any] = (await self.receive("error"))["error"]
        assert error["code"] == code, error
        return error

    async def outputs(self, start: int, end: int) -> list[list[int]]:
        """The outputs of exactly these timesteps, which come next."""
        values: list[list[int]] = []
        while start + len(values) < end:
            message = await self.receive("outputs")
            assert message["start"] == start + len(values)
            total = message["outputs"]["total"]
            values += read_array(total, "total").tolist() if self.packed else total
        assert start + len(values) == end
        return values

    async def closed(self) -> int:
        """The code with which the server closes, which is all that comes."""
        with pytest.raises(ConnectionClosed) as caught:
            await self.websocket.recv()
        assert caught.value.rcvd is not None
        return caught.value.rcvd.code


@asynccontextmanager
async def talk(sut: System, query: str = "", packed: bool = False) -> AsyncIterator[Talk]:
    subprotocols = [SUBPROTOCOL] if packed else None
    async with connect(f"{sut.address}/v1/session{query}", subprotocols=subprotocols) as websocket:  # type: ignore[arg-type]
        assert websocket.subprotocol == (SUBPROTOCOL if packed else None)
        yield Talk(websocket, packed)


@asynccontextmanager
async def bystander(sut: System) -> AsyncIterator[None]:
    """A session beside whatever happens within: all its outputs are what they are alone, to the bit."""
    x = np.arange(80).reshape(40, 2) % 7
    session = await open_websocket(sut.address)
    session.submit(x[:20])
    yield
    session.submit(x[20:])
    session.close()
    values = [outputs.values["total"] async for outputs in session.outputs()]
    np.testing.assert_array_equal(np.concatenate(values), x.cumsum(0))


def ones(n: int) -> list[list[int]]:
    return [[1, 1]] * n


def line(start: int, end: int) -> list[list[int]]:
    return [[i, i] for i in range(start + 1, end + 1)]


async def collect(session: Session) -> list[list[int]]:
    return [row async for outputs in session.outputs() for row in outputs.values["total"].tolist()]


@pytest.mark.parametrize("packed", [False, True])
async def test_a_conversation_from_open_to_close(packed: bool) -> None:
    async with system() as sut, talk(sut, "?session=a&model=silero_vad", packed) as client:
        assert await client.receive("opened") == {
            "session": "a",
            "model": "silero_vad",
            "input": {"shape": [2], "dtype": "int64"},
            "outputs": {"total": {"shape": [2], "dtype": "int64"}},
            "limits": {"max_segment": 64, "max_window": 256, "refuse_nan": True},
            "next": 0,
            "progress": 0,
            "acked": 0,
            "rewind": 0,
        }
        await client.send("segment", x=np.ones((5, 2), np.int64) if packed else ones(5))
        assert await client.outputs(0, 5) == line(0, 5)
        await client.send("segment", x=ones(5), start=5, acked=5)
        await client.send("segment", x=ones(5), start=5)  # a resend
        assert await client.outputs(5, 10) == line(5, 10)
        assert sut.hub.get("a").acked == 5
        await client.send("segment", x=ones(3), start=10, rewind=0)
        await client.send("close", start=13)
        assert await client.outputs(10, 13) == line(10, 13)
        assert await client.receive("ended") == {"reason": "closed", "progress": 13}
        assert await client.closed() == 1000
        await freed(sut)


BAD_MESSAGES: dict[str, tuple[str, str, str | bytes]] = {
    "JSON": ("invalid_input", "not JSON", '{"type": "segm'),
    "binary": ("invalid_input", "a binary message arrived in a conversation in JSON", b"\x80"),
    "not a map": ("invalid_input", "a list, expected a map", "[]"),
    "too large": ("invalid_input", "a message of 90000 bytes arrived, the limit is 81920", " " * 90_000),
    "no type": ("invalid_input", "a message of type None arrived, expected segment, ack, export, ping or close", "{}"),
    "unknown type": ("invalid_input", "type 'open' arrived, expected segment", '{"type": "open"}'),
    "unknown key": ("invalid_input", "'ack' is not known here: type, acked", '{"type": "ack", "ack": 3}'),
    "no x": ("invalid_input", "key 'x' is missing", '{"type": "segment"}'),
    "feature size": ("invalid_input", "shape [1, 1] arrived", '{"type": "segment", "x": [[1]]}'),
    "dtype": ("invalid_input", "x[0][0] is 1.5, expected", '{"type": "segment", "x": [[1.5, 1]]}'),
    "empty": ("invalid_input", "an empty segment", '{"type": "segment", "x": []}'),
    "too long": ("invalid_input", "the limit is 64", json.dumps({"type": "segment", "x": ones(65)})),
    "start too high": ("start_mismatch", "5, 2 was expected", '{"type": "segment", "x": [[1, 1]], "start": 5}'),
    "acked too high": ("invalid_input", "outputs up to timestep 2, 3 was", '{"type": "ack", "acked": 3}'),
    "rewind": ("rewound", "resend from", '{"type": "segment", "x": [[1, 1]], "rewind": 1}'),
    "close rewound": ("rewound", "resend from", '{"type": "close", "rewind": 1}'),
    "close too high": ("start_mismatch", "to close at timestep 3, 2 are", '{"type": "close", "start": 3}'),
    "close too low": ("start_mismatch", "to close at timestep 1, 2 are", '{"type": "close", "start": 1}'),
    "abort": ("invalid_input", "abort is 1, expected true or false", '{"type": "close", "abort": 1}'),
}


@pytest.mark.parametrize("bad", BAD_MESSAGES)
async def test_a_bad_message_is_refused_and_nothing_else_notices(bad: str) -> None:
    code, message, data = BAD_MESSAGES[bad]
    async with system() as sut, bystander(sut), talk(sut) as client:
        await client.receive("opened")
        await client.send("segment", x=ones(2))
        assert await client.outputs(0, 2) == line(0, 2)
        await client.websocket.send(data)
        assert message in (await client.refused(code))["message"]
        await client.send("segment", x=ones(1), start=2)
        assert await client.outputs(2, 3) == line(2, 3)


async def test_msgpack_conversations_refuse_text_and_what_is_not_msgpack() -> None:
    async with system() as sut, bystander(sut), talk(sut, packed=True) as client:
        await client.receive("opened")
        for data, message in (("{}", "a text message arrived in a conversation in msgpack"), (b"\xc1", "not msgpack")):
            await client.websocket.send(data)
            assert message in (await client.refused("invalid_input"))["message"]
        await client.send("segment", x=np.ones((1, 2)))
        assert "float64 arrived" in (await client.refused("invalid_input"))["message"]
        await client.send("close")
        assert (await client.receive("ended"))["reason"] == "closed"


async def test_who_never_makes_sense_is_hung_up_on() -> None:
    async with system() as sut, bystander(sut), talk(sut, "?session=a") as client:
        await client.receive("opened")
        for _ in range(2):
            for _ in range(7):
                await client.websocket.send("hello?")
                await client.refused("invalid_input")
            await client.send("ack", acked=0)  # that was readable
        for _ in range(8):
            await client.websocket.send("hello?")
            await client.refused("invalid_input")
        assert await client.closed() == 4400
        await gone(sut, "a")


async def test_what_cannot_be_opened() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=2))
    async with system(config=config) as sut, bystander(sut), talk(sut, "?session=a") as client:
        await client.receive("opened")
        for query, code, status in (
            ("?session=a", "session_exists", 409),
            ("?session=", "invalid_input", 400),
            ("?sesion=a", "invalid_input", 400),
            ("?model=whisper", "unknown_model", 404),
            ("", "too_many_sessions", 429),
        ):
            async with talk(sut, query) as other:
                await other.refused(code)
                assert await other.closed() == 4000 + status


async def freed(sut: System) -> None:
    """Wait until every session is forgotten, with all its outputs."""
    engines = sut.cluster.engines.values()
    while sut.hub.num_sessions or any(engine.gauges()["retained_bytes"] for engine in engines):
        await asyncio.sleep(0.005)


async def gone(sut: System, session: str) -> None:
    """Wait until the session has been aborted, and nothing of it is left."""
    ended = None
    while ended is None:
        try:
            sut.hub.get(session)
            await asyncio.sleep(0.005)
        except SessionEnded as error:
            ended = error
    assert ended.details == {"reason": "aborted"}


async def test_a_client_that_vanishes_is_aborted_and_nothing_else_notices() -> None:
    model = SumModel()
    async with system(model) as sut, bystander(sut):
        for name in ("a", "b"):
            async with talk(sut, f"?session={name}") as client:
                await client.receive("opened")
                for _ in range(4):
                    await client.send("segment", x=ones(64))
                if name == "a":
                    await client.receive("outputs")
                client.websocket.transport.abort()
            await gone(sut, name)
        assert sorted(model.ended) == [("a", "aborted"), ("b", "aborted")]
        assert sut.cluster.engines["owner-0"].gauges()["sessions_open"] == 1


async def test_abort_ends_at_once() -> None:
    async with system() as sut, bystander(sut), talk(sut, "?session=a") as client:
        await client.receive("opened")
        await client.send("close", abort=True)
        assert await client.receive("ended") == {"reason": "aborted", "progress": 0}
        assert await client.closed() == 1000


async def test_a_client_that_does_not_acknowledge_is_held_up_by_its_window() -> None:
    async with system() as sut, bystander(sut), talk(sut) as client:
        await client.receive("opened")
        for _ in range(4):
            await client.send("segment", x=ones(64))
        assert await client.outputs(0, 256) == line(0, 256)
        await client.send("segment", x=ones(1))
        assert (await client.refused("window_full"))["details"] == {"expected": 256}
        await client.send("ack", acked=1)
        await client.send("segment", x=ones(1), start=256)
        assert await client.outputs(256, 257) == line(256, 257)


async def test_a_failed_step_is_told_and_the_conversation_goes_on() -> None:
    async with system(SumModel(poison=0)) as sut, talk(sut) as client:
        await client.receive("opened")
        await client.send("segment", x=ones(3))
        await client.outputs(0, 3)
        await client.send("segment", x=[[-1, -1]], start=3)
        assert (await client.refused("step_failed"))["details"] == {"expected": 3, "rewind": 1}
        await client.send("segment", x=ones(2), start=4, rewind=0)  # sent before the client could know
        assert (await client.refused("rewound"))["details"] == {"expected": 3, "rewind": 1}
        await client.send("segment", x=ones(2), start=3, rewind=1)
        assert await client.outputs(3, 5) == line(3, 5)


async def test_a_session_that_ends_otherwise_says_why() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, idle_timeout_s=0.1))
    async with system(config=config) as sut, talk(sut) as client:
        await client.receive("opened")
        assert await client.receive("ended") == {"reason": "idle", "progress": 0}
        assert await client.closed() == 4410
    async with system(config=ALONE) as sut, talk(sut) as client:
        await client.receive("opened")
        await sut.cluster.kill("owner-0")
        ended = await client.receive("ended")
        assert (ended["reason"], ended["progress"], ended["error"]["code"]) == ("state_lost", 0, "state_lost")
        assert await client.closed() == 4410


async def test_an_initial_state() -> None:
    async with system() as sut, bystander(sut):
        async with talk(sut, "?initial_state=true") as client:
            await client.send("open", initial_state=[[[41, 0]]])
            await client.receive("opened")
            await client.send("segment", x=ones(1))
            assert await client.outputs(0, 1) == [[42, 1]]
        for message in ({"initial_state": [[[1, 2, 3]]]}, {"initial_state": 7}, {"x": 1}):
            async with talk(sut, "?initial_state=true") as client:
                await client.send("open", **message)
                await client.refused("invalid_input")
                assert await client.closed() == 4400
        session = await open_websocket(sut.address, initial_state=[np.array([[41, 0]])])
        session.submit(np.array(ones(1)))
        session.close()
        assert await collect(session) == [[42, 1]]
        with pytest.raises(InvalidInput, match="an initial state of shapes"):
            await open_websocket(sut.address, initial_state=[np.array([1])])


async def test_a_fault_of_the_server_is_logged_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the secret reason")

    async with system() as sut:
        monkeypatch.setattr(sut.hub, "open", broken)
        async with talk(sut) as client:
            assert "secret" not in (await client.refused("internal"))["message"]
            assert await client.closed() == 1011
    assert "the secret reason" in caplog.text


# The client.


async def test_many_clients_get_each_output_once_in_order() -> None:
    async with system(SumModel(), SumModel()) as sut:

        async def one(seed: int) -> None:
            rng, n = random.Random(seed), 0
            session = await open_websocket(f"{sut.address}/", session=f"s{seed}", model="silero_vad")
            assert (session.name, session.spec.input.shape) == (f"s{seed}", (2,))
            reader = asyncio.create_task(collect(session))
            for _ in range(rng.randint(0, 20)):
                try:
                    n = session.submit(np.array(ones(rng.randint(1, 64))))
                except WindowFull:
                    await session.wait()
                if rng.random() < 0.3:
                    assert await session.wait(rng.randint(0, n)) <= n
            session.close()
            assert await session.closed() == "closed"
            assert await reader == line(0, n)

        await asyncio.gather(*(one(seed) for seed in range(20)))
        await freed(sut)
    for engine in sut.cluster.engines.values():
        engine.check()


async def test_segments_are_merged_into_messages_and_need_not_wait_for_each_other() -> None:
    async with system() as sut:
        session = await open_websocket(sut.address, session="a")
        sut.cluster.delay_s = lambda: 0.05  # what is accepted is not known yet
        for _ in range(4):
            session.submit(np.array(ones(30)))
        behind = sut.hub.get("a")
        while behind.next < 120:
            await asyncio.sleep(0.001)
        assert (session.accepted, behind.progress) == (0, 0)
        session.close()
        assert await collect(session) == line(0, 120)


async def test_acknowledgements_go_alone_when_a_quarter_of_the_window_is_due() -> None:
    async with system() as sut:
        session = await open_websocket(sut.address, session="a")
        for _ in range(2):
            session.submit(np.array(ones(60)))
        while sut.hub.get("a").acked < 65:  # without another segment
            await asyncio.sleep(0.001)
        session.abort()
        assert await session.closed() == "aborted"


async def test_a_client_is_told_of_a_failed_step_once_with_segments_behind_it() -> None:
    async with system(SumModel(poison=0)) as sut:
        session = await open_websocket(sut.address)
        session.submit(np.array(ones(3)))
        await session.wait()
        session.submit(np.array([[-1, -1]]))
        while sut.hub.get(session.name).rewind < 1:
            await asyncio.sleep(0)
        session.submit(np.array(ones(3)))  # most likely it leaves before the failure is known here
        with pytest.raises(StepFailed, match="resend from 3"):
            await session.wait()
        other = await open_websocket(sut.address)  # so long that the refusal of that segment has come, too
        other.abort()
        await other.closed()
        session.submit(np.array(ones(2)))
        assert await session.wait() == 5
        session.close()
        assert await collect(session) == line(0, 5)


async def test_a_session_goes_on_at_another_owner_after_a_failed_step() -> None:
    """The client counts failed steps, so they still count there."""
    async with system(SumModel(poison=0)) as sut:
        session = await open_websocket(sut.address)
        session.submit(np.array([[-1, -1]]))
        with pytest.raises(StepFailed):
            await session.wait()
        sut.cluster.add(SumModel(poison=0))
        await sut.cluster.kill("owner-0")
        session.submit(np.array(ones(2)))
        assert await session.wait() == 2
        session.submit(np.array([[-1, -1]]))
        with pytest.raises(StepFailed, match="resend from 2"):
            await session.wait()


async def test_what_the_client_is_refused() -> None:
    async with system() as sut:
        session = await open_websocket(sut.address, session="a")
        with pytest.raises(SessionExists, match="'a' is open already"):
            await open_websocket(sut.address, session="a")
        with pytest.raises(UnknownModel, match="'whisper' is not served here"):
            await open_websocket(sut.address, model="whisper")
        with pytest.raises(InvalidInput, match=r"'localhost:1' is no address, expected one like ws://"):
            await open_websocket("localhost:1")
        with pytest.raises(Unavailable, match=r"no connection to .*: server rejected"):
            await open_websocket(f"{sut.address}/elsewhere")
        with pytest.raises(InvalidInput, match="float64 arrived, the model takes int64"):
            session.submit(np.ones((1, 2)))
        session.close()
        await session.closed()
    with pytest.raises(Unavailable, match="no connection to"):
        await open_websocket(sut.address)


async def test_a_session_whose_owner_dies_is_lost() -> None:
    async with system(config=ALONE) as sut:
        session = await open_websocket(sut.address)
        session.submit(np.array(ones(1)))
        await session.wait()
        await sut.cluster.kill("owner-0")
        with pytest.raises(StateLost):
            await session.closed()


def carrier(session: Session) -> WebSocketCarrier:
    assert isinstance(session.carrier, WebSocketCarrier)
    return session.carrier


def break_connection(session: Session) -> None:
    carrier(session)._websocket.transport.abort()


async def test_a_session_goes_on_when_its_connection_breaks() -> None:
    async with system() as sut, bystander(sut):
        session = await open_websocket(sut.address, session="a")
        session.submit(np.array(ones(64)))
        break_connection(session)
        session.submit(np.array(ones(3)))
        session.close()
        assert await session.closed() == "closed"
        assert await collect(session) == line(0, 67)


async def test_an_ingress_that_stops_leaves_its_sessions_for_another() -> None:
    async with system() as sut:
        other = Hub(sut.cluster, ack_on_receipt=False)
        async with serving(other) as address:
            session = await open_websocket(f"{address},{sut.address}")
            session.submit(np.array(ones(20)))
            assert await session.wait() == 20
            await other.stop()
        session.submit(np.array(ones(2)))
        assert await session.wait() == 22
        assert sut.cluster.engines["owner-0"].stats.timesteps == 22, "nothing has run twice"
        session.close()
        assert await session.closed() == "closed"
        assert await collect(session) == line(0, 22)
    assert sut.cluster.engines["owner-0"].gauges()["sessions_open"] == 0


async def test_sessions_are_spread_over_the_addresses_that_answer() -> None:
    async with system() as sut:
        nobody = "ws://127.0.0.1:1"
        async with clients.client.connect(f"{sut.address}/, {nobody}") as client:
            assert set(await client.models()) == {"silero_vad"}
            for _ in range(4):
                async with await client.open() as session:
                    session.submit(np.array(ones(2)))
                    assert await session.wait() == 2
        with pytest.raises(Unavailable, match=r"no connection to ws://127\.0\.0\.1:2"):
            await open_websocket(f"{nobody},ws://127.0.0.1:2")


@asynccontextmanager
async def relay(to: str, stands_still: asyncio.Event) -> AsyncIterator[str]:
    """A way to an ingress that takes connections, but passes nothing on while it stands still; yields its address."""
    host, port = to.removeprefix("ws://").split(":")
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            if stands_still.is_set():
                await asyncio.Event().wait()
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead, back = await asyncio.open_connection(host, int(port))
        writers.extend((writer, back))
        tasks.update(asyncio.create_task(pass_on(*way)) for way in ((reader, back), (ahead, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1")
    try:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


async def test_a_session_goes_on_by_another_way_when_its_own_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SILENT_S", 0.1), ("LOOK_S", 0.05), ("ALIVE_WITHIN_S", 0.3), ("RECONNECT_WITHIN_S", 0.3)):
        monkeypatch.setattr(websocket_client, name, seconds)
    stands_still = asyncio.Event()
    async with system() as sut, relay(sut.address, stands_still) as first, relay(sut.address, stands_still) as second:
        session = await open_websocket(f"{first},{second},{sut.address}")
        assert await session.wait(session.submit(np.array(ones(3)))) == 3
        assert session.epoch == 0
        stands_still.set()
        assert await session.wait(session.submit(np.array(ones(4)))) == 7
        assert carrier(session)._addresses[0] == sut.address
        session.close()
        assert await session.closed() == "closed"
        assert await collect(session) == line(0, 7)


@asynccontextmanager
async def proxy(to: str, stands_still: asyncio.Event) -> AsyncIterator[str]:
    """As `relay`, but as Serve's own proxy it ends WebSockets, and answers their pings, whoever is behind it."""

    async def pass_on(source: Connection, target: Connection) -> None:
        async for message in source:
            if stands_still.is_set():
                await asyncio.Event().wait()
            await target.send(message)

    async def accept(client: ServerConnection) -> None:
        assert client.request is not None
        async with connect(to + client.request.path, subprotocols=[websocket_client.SUBPROTOCOL]) as ahead:
            passing = [asyncio.create_task(pass_on(*way)) for way in ((client, ahead), (ahead, client))]
            await client.wait_closed()
            for task in passing:
                task.cancel()
            await asyncio.gather(*passing, return_exceptions=True)

    async with serve(accept, "127.0.0.1", 0, subprotocols=[websocket_client.SUBPROTOCOL]) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


@pytest.mark.parametrize("due", ["outputs", "end", "checkpoint"])
async def test_who_is_behind_a_proxy_that_answers_pings_is_asked(due: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("SILENT_S", 0.1), ("LOOK_S", 0.05), ("ALIVE_WITHIN_S", 0.3), ("RESUMED_WITHIN_S", 0.3)):
        monkeypatch.setattr(websocket_client, name, seconds)
    stands_still = asyncio.Event()
    async with system() as sut, proxy(sut.address, stands_still) as first:
        session = await open_websocket(f"{first},{sut.address}")
        assert await session.wait(session.submit(np.array(ones(3)))) == 3
        stands_still.set()
        if due == "outputs":
            assert await session.wait(session.submit(np.array(ones(4)))) == 7
        elif due == "checkpoint":
            assert (await session.export()).at == 3
        session.close()
        assert await session.closed() == "closed"
        assert await collect(session) == line(0, session.next)
        assert carrier(session)._addresses[0] == sut.address


async def test_a_connection_that_is_lost_before_its_handshake_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a proxy that dies when it has just taken it."""
    lost: list[ClientConnection] = []

    class Once(ClientConnection):
        async def handshake(self, *args: Any, **more: Any) -> None:
            if not lost:
                lost.append(self)
                self.transport.abort()
                await asyncio.sleep(0.01)
            await super().handshake(*args, **more)

    async with system() as sut:
        session = await open_websocket(sut.address)
        await session.wait(session.submit(np.array(ones(3))))
        monkeypatch.setattr(websocket_client, "connect", partial(connect, create_connection=Once))
        break_connection(session)
        assert await session.wait(session.submit(np.array(ones(4)))) == 7
        assert len(lost) == 1
        session.abort()


async def test_a_way_in_that_is_only_slow_is_given_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_client, "RESUMED_WITHIN_S", 0.1)
    resume = Hub.resume

    async def slowly(*args: Any, **more: Any) -> Session:
        await asyncio.sleep(0.25)
        return await resume(*args, **more)

    async with system() as sut:
        session = await open_websocket(sut.address)
        assert await session.wait(session.submit(np.array(ones(3)))) == 3
        monkeypatch.setattr(Hub, "resume", slowly)
        break_connection(session)
        assert await session.wait(session.submit(np.array(ones(4)))) == 7
        assert carrier(session)._patience == 4, "0.1 and 0.2 s were too short"
        session.abort()


async def test_a_way_in_that_waits_for_the_model_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing comes for long, but somebody is there."""
    for name, seconds in (("SILENT_S", 0.05), ("LOOK_S", 0.02)):
        monkeypatch.setattr(websocket_client, name, seconds)

    class Slow(SumModel):
        def forward(self, x, state):  # type: ignore[no-untyped-def]
            time.sleep(0.5)
            return super().forward(x, state)

    async with system(Slow()) as sut:
        session = await open_websocket(sut.address)
        assert await session.wait(session.submit(np.array(ones(3)))) == 3
        assert session.epoch == 0, "by its first connection"
        session.abort()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_breaks_each_output_comes_once(seed: int) -> None:
    """Connections, again and again; sessions go on by either of two ingresses."""
    rng = random.Random(seed)
    async with system(SumModel(), SumModel()) as sut:
        other = Hub(sut.cluster, ack_on_receipt=False)
        async with serving(other) as address:
            sessions = [await open_websocket(rng.choice([address, sut.address])) for _ in range(12)]

            async def one(session: Session) -> None:
                reader = asyncio.create_task(collect(session))
                while session.next < 200:
                    session.submit(np.array(ones(rng.randint(1, 12))))
                    if rng.random() < 0.5:
                        await session.wait(session.next - rng.randint(0, min(5, session.next)))
                    if rng.random() < 0.3:
                        carrier(session)._addresses[0] = rng.choice([address, sut.address])
                        break_connection(session)
                    await asyncio.sleep(rng.random() * 0.02)
                session.close()
                assert await session.closed() == "closed"
                assert await reader == line(0, session.next)

            await asyncio.gather(*map(one, sessions))
            await asyncio.gather(*(carrier(session).stop() for session in sessions))
        await other.stop()


async def test_a_session_that_nobody_comes_back_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_ingress, "RESUME_WITHIN_S", 0.1)
    async with system() as sut:
        async with talk(sut, "?session=a&resumable=true") as client:
            await client.receive("opened")
            client.websocket.transport.abort()
        await gone(sut, "a")


@pytest.mark.parametrize(
    ("how", "expected"),
    [("hangs up", "given up"), ("hangs up on a server that is held up", "given up"), ("breaks", "kept")],
)
async def test_how_a_client_has_left_is_known_though_serve_cancels_what_serves_it(
    how: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_up = asyncio.Event()
    became: asyncio.Queue[str] = asyncio.Queue()
    send = Conversation.send

    async def send_unless_held_up(self: Conversation, kind: str, **values: Any) -> None:
        if kind == "pong":
            held_up.set()
            await asyncio.Event().wait()
        await send(self, kind, **values)

    monkeypatch.setattr(Conversation, "send", send_unless_held_up)
    monkeypatch.setattr(websocket_ingress, "_keep", lambda *_: became.put_nowait("kept"))
    monkeypatch.setattr(websocket_ingress, "_give_up", lambda *_: became.put_nowait("given up"))
    async with system() as sut, serving(sut.hub, within_serve) as address:
        async with talk(dataclasses.replace(sut, address=address), "?session=a&resumable=true") as client:
            await client.receive("opened")
            if how == "breaks":
                client.websocket.transport.abort()
            elif how != "hangs up":
                await client.send("ping")
                await held_up.wait()
                await client.send("ping")  # which nobody reads before the end
        assert await became.get() == expected


@asynccontextmanager
async def full() -> AsyncIterator[System]:
    """Its one place is taken by session `open`."""
    session = dataclasses.replace(CONFIG.session, max_sessions=1, max_wait_s=600)
    async with system(config=dataclasses.replace(CONFIG, session=session)) as sut:
        await sut.hub.open("open")
        yield sut


async def in_line(sut: System, num: int) -> None:
    """Wait until so many sessions wait for a place."""
    waiting = None
    while waiting != num:
        await asyncio.sleep(0.005)
        sut.cluster.directory.tick(lease.now())
        waiting = sut.cluster.directory.statistics()["silero_vad"].waiting


async def test_who_has_said_something_and_hangs_up_waits_no_more() -> None:
    async with full() as sut:
        async with talk(sut) as client:
            await in_line(sut, 1)
            for _ in range(3):
                await client.send("ping")
        await in_line(sut, 0)


async def test_of_a_client_that_waits_only_so_much_is_taken_in() -> None:
    events: asyncio.Queue[Any] = asyncio.Queue()
    events.put_nowait({"type": "websocket.connect"})
    for n in range(50):
        events.put_nowait({"type": "websocket.receive", "text": json.dumps({"n": n})})

    async def send(event: Any) -> None:
        pass

    async def takes_long() -> None:
        for _ in range(200):
            await asyncio.sleep(0)

    websocket = WebSocket({"type": "websocket", "headers": []}, events.get, send)
    await websocket.accept()
    client = Conversation(websocket)
    await client.while_there(takes_long())
    assert events.qsize() == 50 - websocket_ingress.MAX_EARLY
    assert [(await client.receive(100)).values["n"] for _ in range(50)] == list(range(50))


async def test_a_session_without_a_way_back_is_lost_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket_client, "RESUME_WITHIN_S", 0.2)
    async with system() as sut:
        session = await open_websocket(sut.address)
    for attempt in (session.closed(), session.closed()):
        with pytest.raises(Unavailable, match=r"the connection to ws://.* is gone .*open a new one"):
            await attempt
    with pytest.raises(Unavailable):
        session.submit(np.array(ones(1)))


async def test_one_client_at_a_time_has_a_session() -> None:
    """Who resumes it takes it over; the one before does not fight."""
    async with system() as sut:
        session = await open_websocket(sut.address, session="a")
        session.submit(np.array(ones(3)))
        await session.wait()
        async with talk(sut, "?session=a&resume=1") as client:
            opened = await client.receive("opened")
            assert (opened["next"], opened["rewind"]) == (3, 0)
            assert await client.outputs(1, 3) == line(1, 3)
            with pytest.raises(Unavailable, match="4409"):
                await session.closed()
            await client.send("segment", x=ones(1), start=3)
            assert await client.outputs(3, 4) == line(3, 4)


@pytest.mark.parametrize("is_own", [False, True])
async def test_a_connection_that_was_given_up_may_take_the_session_over_late(is_own: bool) -> None:
    """By another ingress: if it may be the client's own attempt then that goes on, else it yields."""
    async with system() as sut:
        other = Hub(sut.cluster, ack_on_receipt=False)
        async with serving(other) as address:
            session = await open_websocket(sut.address, session="a")
            await session.wait(session.submit(np.array(ones(3))))
            if is_own:
                carrier(session)._unsure_until = time.monotonic() + 10
            async with connect(f"{address}/v1/session?session=a&resume=3", subprotocols=[SUBPROTOCOL]) as late:  # type: ignore[list-item]
                await late.recv()
                if is_own:
                    assert await session.wait(session.submit(np.array(ones(4)))) == 7
                    await late.wait_closed()
                    assert late.close_code == 4409
                else:
                    with pytest.raises(Unavailable, match="4409"):
                        await session.closed()
            session.abort()
        await other.stop()


@pytest.mark.parametrize("turns", [1, 2, 5])
async def test_a_resume_that_is_cancelled_is_done_all_the_same(turns: int) -> None:
    """As Serve does when the client hangs up: the next attempt finds the session, and not half of it."""
    async with system() as sut:
        other = Hub(sut.cluster, ack_on_receipt=False)
        session = await open_websocket(sut.address, session="a")
        await session.wait(session.submit(np.array(ones(3))))
        resuming = asyncio.create_task(websocket_ingress._resume(other, "a", 3, 0))
        for _ in range(turns):
            await asyncio.sleep(0)
        resuming.cancel()
        for _ in range(100):
            with suppress(NotOwner):
                again = await websocket_ingress._resume(other, "a", 3, 0)
                break
            await asyncio.sleep(0.01)
        assert await again.wait(again.submit(np.array(ones(2)), 3)) == 5
        outputs = again.peek(3)
        assert outputs is not None and outputs.values["total"].tolist() == line(3, 5)
        assert sut.cluster.engines["owner-0"].stats.timesteps == 5, "nothing has run twice"
        await other.stop()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?session=a&resume=x", "resume is 'x', expected a whole number from 0 on"),
        ("?session=a&resume=-1", "resume is '-1', expected a whole number from 0 on"),
        (f"?session=a&resume={2**63}", "resume is '9223372036854775808', expected a whole number"),
        (f"?session=a&resume={'9' * 5000}", "resume is '9999"),
        ("?session=a&resume=3&rewind=x", "rewind is 'x', expected a whole number from 0 on"),
        ("?resume=3", "resume is 3, expected a session's id with it"),
    ],
)
async def test_a_wrong_resume_is_told(query: str, message: str) -> None:
    async with system() as sut, talk(sut, query) as client:
        error = await client.refused("invalid_input")
        assert message in error["message"]
        assert await client.closed() == 4400


async def test_what_is_not_there_cannot_be_resumed() -> None:
    async with system() as sut, talk(sut, "?session=nobody&resume=3") as client:
        await client.refused("unknown_session")


async def test_a_session_that_was_not_opened_for_it_cannot_be_taken_over() -> None:
    async with system() as sut, talk(sut, "?session=a") as owner:
        await owner.receive("opened")
        async with talk(sut, "?session=a&resume=0") as thief:
            error = await thief.refused("invalid_input")
            assert "resumable=true" in error["message"]
        await owner.send("segment", x=ones(2))
        assert await owner.outputs(0, 2) == line(0, 2)


async def test_outputs_tell_where_their_time_went() -> None:
    async with system() as sut, clients.client.connect(sut.address) as client:
        sessions = [await client.open() for _ in range(3)]
        for session in sessions:
            session.submit(np.ones((40, 2), np.int64))
            await session.wait()
        for session in sessions:
            outputs = session.read()
            assert outputs is not None
            assert 1 <= outputs.timing.batch_size <= 3
            assert outputs.timing.compute_us > 0
        sessions[0].submit(np.ones((1, 2), np.int64))
        await sessions[0].wait()
        last = sessions[0].read()
        assert last is not None
        assert last.timing.batch_size == 1, "of the new ones only"


async def test_tries_to_resume_become_rarer(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[str] = []

    async def refused(address: str, *rest: Any) -> None:
        attempts.append(address)
        raise Unavailable("nobody is there")

    async with system() as sut:
        session = await open_websocket(sut.address, resume_within_s=0.6)
        monkeypatch.setattr(websocket_client, "_connect_to", refused)
        break_connection(session)
        with pytest.raises(Unavailable, match="nobody is there"):
            await session.closed()
    assert 2 <= len(attempts) <= 6, "0.025 s lie between the first two at least, then twice as much each time"
