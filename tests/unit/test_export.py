"""One session as bytes: exported by any transport, gone on from by any other, refused for another model."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgpack
import numpy as np
import pytest

from clients.client import Client
from clients.session import Session
from clients.websocket import WebSocketTransport, open_websocket
from serve_app.checkpoint import MAGIC, _digest, decode_checkpoint, encode_checkpoint
from serve_app.config import EngineConfig
from serve_app.errors import InvalidInput, SessionEnded, SessionExists, StateLost, StepFailed, UnknownModel
from serve_app.frame import Open
from serve_app.ingress.hub import Hub
from serve_app.session import Session as Line
from tests.fakes import Sender, SumModel
from tests.local import LocalCluster, local
from tests.unit.test_durable import CONFIG, Ingresses, ingresses
from tests.unit.test_websocket import break_connection, ones, system, talk

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


class HubTransport:
    """A handle client's, with a hub to a cluster in this process."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._hub = Hub(cluster, ack_on_receipt=True)
        self.open = lambda *args: self._hub.open(*args[:3], checkpoint=args[3])
        self.models, self.stop = self._hub.models, self._hub.stop


@asynccontextmanager
async def clients(*models: SumModel) -> AsyncIterator[tuple[Ingresses, Client, Client]]:
    """A cluster, a client by WebSocket and one by handle."""
    async with ingresses(*models) as sut:
        transport: object = HubTransport(sut.cluster)
        async with Client(WebSocketTransport(sut.alive[0])) as by_socket, Client(transport) as by_handle:  # type: ignore[arg-type]
            yield sut, by_socket, by_handle


async def last(session: Session) -> list[int]:
    """Run a segment of ones; what comes last."""
    await session.wait(session.submit(np.array(ones(3))))
    outputs = session.read()
    assert outputs is not None
    return [int(value) for value in outputs.values["total"][-1]]


async def test_a_session_goes_on_from_what_another_has_exported() -> None:
    async with clients() as (_, by_socket, by_handle):
        for one, other in ((by_socket, by_handle), (by_handle, by_socket), (by_socket, by_socket)):
            session = await one.open()
            await session.wait(session.submit(np.array(ones(7))))
            record = await session.export()
            assert decode_checkpoint(record).at == 7
            again = await other.open(checkpoint=record)
            assert (again.submitted, again.progress) == (7, 7)
            assert await last(again) == [10, 10]
            assert await last(session) == [10, 10], "and the first goes on, too"
            with pytest.raises(SessionExists):
                await other.open(session.name, checkpoint=record)
            assert await session.close() == await again.close() == "closed"


async def test_whatever_was_submitted_is_in_it() -> None:
    async with clients() as (_, by_socket, by_handle):
        for client in (by_socket, by_handle):
            session = await client.open()
            for length in (1, 20, 30):
                end = session.submit(np.array(ones(length)))
                first, second = decode_checkpoint(await session.export()), await session.export()
                assert first.at == decode_checkpoint(second).at == end
                again = await client.open(checkpoint=second)
                assert await last(again) == [end + 3, end + 3]


async def test_many_ask_while_it_runs() -> None:
    async with clients() as (_, by_socket, by_handle):
        for client in (by_socket, by_handle):
            session = await client.open()
            found = []
            for _ in range(30):
                session.submit(np.array(ones(5)))
                found.append(asyncio.create_task(session.export()))
                await asyncio.sleep(0)
            for number, task in enumerate(found):
                checkpoint = decode_checkpoint(await task)
                assert checkpoint.at >= 5 * (number + 1)
                assert checkpoint.state is not None and checkpoint.state[0].tolist() == [[checkpoint.at] * 2]


async def test_a_session_that_has_run_nothing_is_exported_as_it_begins() -> None:
    async with clients() as (_, by_socket, by_handle):
        for client in (by_socket, by_handle):
            fresh = await client.open()
            given = await client.open(initial_state=[np.array([[5, 6]])])
            assert decode_checkpoint(await fresh.export()).state is None
            assert await last(await client.open(checkpoint=await fresh.export())) == [3, 3]
            again = await client.open(checkpoint=await given.export())
            assert await (await client.open(checkpoint=await again.export())).close() == "closed"
            assert await last(again) == [8, 9]


async def test_evicted_sessions_are_exported() -> None:
    config = dataclasses.replace(CONFIG, engine=EngineConfig(device="cpu", slots=4, max_batch_size=4))
    async with local(SumModel(), config=config) as (cluster, hub):
        sessions = [await hub.open() for _ in range(20)]
        for number, session in enumerate(sessions):
            await session.wait(session.submit(np.array(ones(number + 1))))
        assert cluster.engines["owner-0"].gauges()["sessions_evicted"] > 0
        found = await asyncio.gather(*(session.export() for session in sessions))
        assert [at for at, _ in found] == list(range(1, 21))
        states = [decode_checkpoint(record).state for _, record in found]
        assert [int(state[0][0, 0]) for state in states if state is not None] == list(range(1, 21))
        cluster.engines["owner-0"].check()


async def test_a_state_is_not_read_while_a_step_uses_it() -> None:
    sender = Sender(SumModel(), CONFIG, overlap=True)
    sender.send(opens=(Open(1, "a"), Open(2, "b")))
    sender.send({"epoch": 1, "x": ones(12)}, {"epoch": 2, "x": ones(3)})
    sender.engine._exports |= {1, 2, 99}
    for _ in range(2):
        sender.step()
    sender.run()
    for _ in range(4):
        sender.send()
        sender.collect()
    for _, at, (total,) in sender.checkpoints:
        assert total.tolist() == [[at, at]]
    assert {epoch for epoch, *_ in sender.checkpoints} == {1, 2}
    assert not sender.engine._exports, "nor is one asked for that is not there"


async def test_an_owner_or_a_connection_that_is_lost_meanwhile_delays_it() -> None:
    async with clients(SumModel(), SumModel()) as (sut, by_socket, by_handle):
        sessions = [await client.open() for client in (by_socket, by_handle) for _ in range(4)]
        for session in sessions:
            await session.wait(session.submit(np.array(ones(25))))
            session.submit(np.array(ones(20)))
        found = [asyncio.create_task(session.export()) for session in sessions]
        await asyncio.sleep(0)
        await sut.cluster.kill("owner-0")
        for session in sessions[:4]:
            break_connection(session._line)
        for task in found:
            checkpoint = decode_checkpoint(await task)
            assert checkpoint.state is not None and checkpoint.state[0].tolist() == [[45, 45]]


async def test_a_session_that_has_ended_cannot_be_exported() -> None:
    async with clients() as (_, by_socket, by_handle):
        for client in (by_socket, by_handle):
            session = await client.open()
            await session.close()
            with pytest.raises(SessionEnded, match="closed"):
                await session.export()


async def test_a_step_that_fails_is_told_to_the_client_and_not_to_the_export() -> None:
    async with clients(SumModel(poison=0)) as (_, by_socket, by_handle):
        for client in (by_socket, by_handle):
            session = await client.open()
            await session.wait(session.submit(np.array(ones(4))))
            session.submit(np.array([[-1, -1]]))
            assert decode_checkpoint(await session.export()).at == 4
            with pytest.raises(StepFailed, match="resend from 4"):
                session.submit(np.array(ones(1)))


async def test_what_cannot_be_gone_on_from_is_refused() -> None:
    async with clients() as (_, by_socket, by_handle):
        session = await by_handle.open()
        await session.wait(session.submit(np.array(ones(7))))
        record = await session.export()
        checkpoint = decode_checkpoint(record)
        others = dataclasses.replace(checkpoint, fingerprint="f" * 32)
        head, body = MAGIC + record[8:10], msgpack.packb([1, 2])
        wrong = {
            "is damaged or truncated": record[:-1],
            "is no checkpoint": b"x" * 100,
            "is truncated": b"",
            f"fingerprint {'f' * 32}, the one that is served has {checkpoint.fingerprint}": encode_checkpoint(others),
            "was not written by Lockstep: not enough values": head + _digest(head, body) + body,
            "at timestep -1": encode_checkpoint(dataclasses.replace(checkpoint, at=-1)),
        }
        for client in (by_socket, by_handle):
            for message, data in wrong.items():
                with pytest.raises(StateLost, match=message):
                    await client.open(checkpoint=data)
            with pytest.raises(UnknownModel, match="'lstm' is not served here"):
                await client.open(checkpoint=encode_checkpoint(dataclasses.replace(checkpoint, model="lstm")))
            with pytest.raises(InvalidInput, match="an initial state of shapes"):
                await client.open(
                    checkpoint=encode_checkpoint(dataclasses.replace(checkpoint, state=(np.zeros((1, 3)),)))
                )
            with pytest.raises(InvalidInput, match="one of them"):
                await client.open(initial_state=[np.array([[5, 6]])], checkpoint=record)
        assert await last(session) == [10, 10], "nobody else has noticed"


async def test_json_has_no_checkpoints() -> None:
    async with system(config=CONFIG) as sut, talk(sut) as conversation:
        await conversation.receive("opened")
        await conversation.send("export")
        refused = await conversation.receive("error")
        assert "lockstep.msgpack" in refused["error"]["message"]


async def test_one_that_was_imported_can_be_resumed_from_there() -> None:
    async with ingresses(SumModel(), SumModel()) as sut:
        first, second = sut.alive
        session = await open_websocket(first)
        await session.wait(session.submit(np.array(ones(7))))
        found = await session.export()
        again: Line = await open_websocket(first, session="again", checkpoint=found.record)
        while not again.kept or again.kept == 7:
            await again.wait(again.submit(np.array(ones(1))))
        sut.kill(first)
        again.carrier._addresses[0] = second  # type: ignore[attr-defined]
        await sut.cluster.kill(sut.hubs[first].get("again").owner)
        break_connection(again)
        end = again.submit(np.array(ones(5)))
        await again.wait(end)
        outputs = again.peek(7)
        assert outputs is not None and outputs.values["total"][:, 0].tolist() == list(range(8, end + 1))
