"""Our own client over the Open Inference Protocol, with real gRPC, in front of engines in this process: no Ray."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from clients.client import Client, connect
from clients.session import Session
from serve_app.errors import InvalidInput, StepFailed, TooManySessions, Unavailable, UnknownModel
from tests.fakes import FloatSumModel
from tests.local import LocalCluster
from tests.stateless import LocalModels
from tests.unit.test_oip_grpc import CONFIG, at_port

pytestmark = pytest.mark.asyncio


class Tone(FloatSumModel):
    """A timestep is one sample."""

    sample_rate = 16000


class Broken(FloatSumModel):
    """Fails on negative input."""

    def forward(self, x, state):  # type: ignore[no-untyped-def]
        if (x < 0).any():
            raise RuntimeError("negative input")
        return super().forward(x, state)


@asynccontextmanager
async def client_of(
    config: object = CONFIG, model: FloatSumModel | None = None
) -> AsyncIterator[tuple[Client, LocalCluster, Callable[[], Awaitable[None]]]]:
    async with at_port(config, model) as (cluster, port, stop), connect(f"grpc://127.0.0.1:{port}") as client:  # type: ignore[arg-type]
        yield client, cluster, stop


async def totals(session: Session) -> list[float]:
    found: list[float] = []
    async for outputs in session.outputs():
        found += outputs.values["total"].ravel().tolist()
    return found


async def test_many_sessions_share_a_stream() -> None:
    async with client_of() as (client, _, _):

        async def talk(seed: int) -> None:
            rng = random.Random(seed)
            sent: list[float] = []
            session = await client.open()
            reader = asyncio.create_task(totals(session))
            for _ in range(20):
                segment = [float(rng.randint(-9, 9)) for _ in range(rng.randint(1, 9))]
                sent += segment
                end = session.submit(np.array(segment, np.float32)[:, None])
                if rng.random() < 0.3:
                    assert await session.wait(end) >= end
            assert await session.close() == "closed"
            assert await reader == np.cumsum(sent).tolist()

        await asyncio.gather(*map(talk, range(30)))


async def test_what_a_model_takes_is_known() -> None:
    async with client_of(model=Tone()) as (client, _, _):
        spec = (await client.models())["sum"]
        assert (spec.input.shape, spec.input.dtype, spec.sample_rate) == ((1,), "float32", 16000)
        async with await client.open() as session:
            session.submit(np.ones(3, np.float32))  # samples, since there is a rate
        (outputs,) = [outputs async for outputs in session.outputs()]
        assert outputs.values["total"].ravel().tolist() == [1, 2, 3]
        assert outputs.timing.batch_size == 1


async def test_a_session_without_input_closes() -> None:
    async with client_of() as (client, cluster, _):
        session = await client.open()
        assert await session.close() == "closed"
        assert not any(cluster.directory.num_sessions().values())


async def test_an_abort_ends_the_session_and_no_other() -> None:
    async with client_of() as (client, _, _):
        first, second = await client.open(), await client.open()
        for session in (first, second):
            session.submit(np.ones((5, 1), np.float32))
        await first.abort()
        assert await second.close() == "closed"
        assert await totals(second) == [1, 2, 3, 4, 5]


async def test_bad_input_is_refused_with_its_error() -> None:
    async with client_of(model=Broken()) as (client, _, _):
        with pytest.raises(UnknownModel, match="nothing_like_it"):
            await client.open(model="nothing_like_it")
        with pytest.raises(InvalidInput, match="initial_state"):
            await client.open(initial_state=[np.zeros((1, 1), np.float32)])
        good, bad = await client.open(), await client.open()
        bad.submit(np.full((1, 1), -1, np.float32))
        with pytest.raises(StepFailed, match="negative input"):
            await bad.wait()
        with pytest.raises(StepFailed):
            await bad.close()
        good.submit(np.ones((2, 1), np.float32))
        assert await good.wait() == 2
        with pytest.raises(InvalidInput, match="cannot be exported"):
            await good.export()
        assert await good.close() == "closed"
    with pytest.raises(InvalidInput, match="grpc://host:8001"):
        connect("grpc://")


async def test_what_a_session_cannot_be_opened_for_is_said_by_its_outputs() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=1))
    async with client_of(config) as (client, _, _):
        first, second = await client.open(), await client.open()
        first.submit(np.ones((1, 1), np.float32))
        assert await first.wait() == 1
        second.submit(np.ones((1, 1), np.float32))
        with pytest.raises(TooManySessions):
            await second.wait()
        assert await first.close() == "closed"


async def test_the_end_of_the_server_is_that_of_its_sessions() -> None:
    async with client_of() as (client, _, stop):
        session = await client.open()
        session.submit(np.ones((1, 1), np.float32))
        await session.wait()
        reading = asyncio.create_task(totals(session))
        await stop()
        with pytest.raises(Unavailable):
            await reading
        with pytest.raises(Unavailable, match="no answer from grpc://"):
            await client.open()


@pytest.mark.parametrize("name", ["MaskedSum", "Words"])
async def test_stateless_models_are_none_to_open_sessions_of(name: str) -> None:
    """Of several inputs, and of one."""
    async with (
        LocalModels.of(name) as models,
        at_port(batched=models) as (_, port, _),
        connect(f"grpc://127.0.0.1:{port}") as client,
    ):
        assert set(await client.models()) == {"sum"}
        async with await client.open() as session:
            assert session.spec.name == "sum"
        stateless = models.batcher.spec.name
        with pytest.raises(InvalidInput, match=f"model '{stateless}' is stateless.*clients.rows.RowsClient"):
            await client.open(model=stateless)
