"""What users of Triton's sequence batcher report, and how it is here: a test for each, with the reports' numbers.

Numbers are of issues of triton-inference-server/server, unless another repository is named.
"""

import asyncio
import dataclasses
import random
import threading
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from clients.client import connect
from serve_app import lease
from serve_app.config import AppConfig, EngineConfig, ModelConfig
from serve_app.engine.stats import Stats
from serve_app.errors import SessionEnded, SessionExists
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc
from serve_app.models.registry import check, load
from serve_app.spec import TensorSpec
from tests.fakes import FloatSumModel
from tests.local import LocalCluster, local
from tests.unit.test_oip_grpc import CONFIG, at_port, infer, refused, served, stream, totals, until

pytestmark = pytest.mark.asyncio


def of_sequences(responses: list[Any]) -> dict[str, list[float]]:
    """All totals by sequence; requests have ids like 7:0."""
    assert not [r.error_message for r in responses if r.error_message]
    found: dict[str, list[float]] = {}
    for response in responses:
        name = response.infer_response.id.partition(":")[0]
        found.setdefault(name, []).extend(totals(response.infer_response))
    return found


async def test_1_clients_that_never_end_their_sequences_crash_nothing() -> None:
    """8391, 7571."""
    async with served() as (cluster, stub):
        for _ in range(5):
            await asyncio.gather(*(stream(stub, [infer(i, [1], start=True) for i in range(1, 20)]) for _ in range(3)))
        await until(lambda: cluster.engines["owner-0"].gauges()["sessions_open"] == 0)
        assert totals(await stub.ModelInfer(infer(1, [3], start=True, end=True))) == [3]


async def test_2_no_state_gets_to_the_next_sequence_in_its_slot() -> None:
    """7117: with more sequences than slots, some of which are full of NaN."""
    config = dataclasses.replace(
        CONFIG,
        engine=dataclasses.replace(CONFIG.engine, slots=4, max_batch_size=4),
        session=dataclasses.replace(CONFIG.session, nan="pass"),
    )
    async with served(config) as (_, stub):

        async def one(seed: int) -> None:
            for i in range(20):
                if (seed + i) % 3 == 0:
                    await stub.ModelInfer(infer(f"{seed}", [float("nan")], start=True, end=True))
                else:
                    response = await stub.ModelInfer(infer(f"{seed}", [1, seed], start=True, end=True))
                    assert totals(response) == [1, 1 + seed]

        await asyncio.gather(*map(one, range(12)))


async def test_3_sequences_that_are_idle_end_and_the_model_goes_on() -> None:
    """8449, 4178: what is queued is not lost to it either."""
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, idle_timeout_s=0.3))
    async with served(config) as (cluster, stub):
        for sequence in range(1, 9):
            await stub.ModelInfer(infer(sequence, [1], start=True))
        assert totals(await stub.ModelInfer(infer(9, [1], start=True))) == [1]
        await until(lambda: cluster.engines["owner-0"].stats.ends["idle"] == 9)
        code, text = await refused(stub.ModelInfer(infer(1, [1])))
        if code == SessionEnded.grpc:  # sent before the way in knew
            code, text = await refused(stub.ModelInfer(infer(1, [1])))
        assert (code, "START flag" in text) == ("INVALID_ARGUMENT", True)
        assert totals(await stub.ModelInfer(infer(1, [5], start=True, end=True))) == [5]


async def test_4_sequences_are_spread_over_replicas_and_stay_where_they_are() -> None:
    """7360, 2376."""
    async with local(FloatSumModel(), FloatSumModel(), config=CONFIG) as (cluster, hub):
        sessions = [await hub.open(f"s{i}") for i in range(8)]
        for _ in range(5):
            for session in sessions:
                session.submit(np.ones((3, 1), np.float32))
        for session in sessions:
            await session.wait()
            outputs = session.read()
            assert outputs is not None
            assert outputs.values["total"].ravel().tolist() == list(range(1, 16))
        assert sorted(cluster.directory.num_sessions().values()) == [4, 4]


async def test_5_a_replica_is_replaced_and_its_sequences_go_on() -> None:
    """7119."""
    async with served() as (cluster, stub):
        assert totals(await stub.ModelInfer(infer(1, [1, 2], start=True))) == [1, 3]
        cluster.add(FloatSumModel())
        await cluster.drain("owner-0")
        assert totals(await stub.ModelInfer(infer(1, [10], end=True))) == [13]


async def test_6_who_comes_too_late_is_told_to_try_again() -> None:
    """5467."""
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=1))
    async with served(config) as (_, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.ModelInfer(infer(2, [1], start=True))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(raised.value.trailing_metadata())["retry-after"] == "1"
        assert totals(await stub.ModelInfer(infer(1, [1], end=True))) == [2]


class Held(FloatSumModel):
    """Its steps take until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.go.wait(30)
        return super().forward(x, state)


QUEUED = dataclasses.replace(
    CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=1, max_wait_s=10, default_priority=2)
)


def asking(request: pb.ModelInferRequest, **parameters: int) -> pb.ModelInferRequest:
    """The request with parameters, as tritonclient sends them."""
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


def num_waiting(cluster: LocalCluster) -> int:
    cluster.directory.tick(lease.now())
    return cluster.directory.statistics()["sum"].waiting


async def test_6_who_comes_while_all_is_full_waits_in_line() -> None:
    """5467: by priority, then first come."""
    async with served(QUEUED) as (cluster, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        order: list[int] = []

        async def come(sequence: int, priority: int) -> None:
            request = asking(infer(sequence, [sequence], start=True, end=True), priority=priority)
            assert totals(await stub.ModelInfer(request)) == [sequence]
            order.append(sequence)

        coming = []
        for sequence, priority in ((2, 3), (3, 0), (4, 2), (5, 1)):
            coming.append(asyncio.ensure_future(come(sequence, priority)))
            await until(lambda: num_waiting(cluster) == len(coming))
        assert totals(await stub.ModelInfer(infer(1, [1], end=True))) == [2]
        await asyncio.gather(*coming)
        assert order == [5, 3, 4, 2]


async def test_6_a_sequence_that_waits_longer_than_its_timeout_is_told_to_try_again() -> None:
    async with served(QUEUED) as (cluster, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        with pytest.raises(grpc.aio.AioRpcError, match="has waited for a place longer than its timeout") as raised:
            await stub.ModelInfer(asking(infer(2, [1], start=True), timeout=200_000))
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert dict(raised.value.trailing_metadata())["retry-after"] == "1"
        await until(lambda: num_waiting(cluster) == 0)
        (response,) = await stream(stub, [asking(infer(2, [1], start=True), timeout=200_000)])
        parameters = response.infer_response.parameters
        assert (parameters["error"].string_param, parameters["retry_after_s"].int64_param) == ("timed_out", 1)
        code, text = await refused(stub.ModelInfer(infer(2, [1])))
        assert (code, "START flag" in text) == ("INVALID_ARGUMENT", True)


async def test_6_a_timeout_of_a_sequence_that_runs_costs_it_an_answer_and_not_its_state() -> None:
    model = Held()
    model.go.set()
    async with served(model=model) as (_, stub):
        assert totals(await stub.ModelInfer(asking(infer(1, [1], start=True), timeout=10_000_000))) == [1]
        model.go.clear()
        with pytest.raises(grpc.aio.AioRpcError, match="its timesteps run all the same") as raised:
            await stub.ModelInfer(asking(infer(1, [10]), timeout=100_000))
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "retry-after" not in dict(raised.value.trailing_metadata())
        model.go.set()
        assert totals(await stub.ModelInfer(infer(1, [100], end=True))) == [111]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"priority": -1}, "priority is -1, expected a whole number from 0 to"),
        ({"timeout": -5}, "timeout is -5, expected a whole number from 0 to"),
        ({"priority": 1}, "began with priority 2, and a request of it has 1: leave it out there"),
    ],
)
async def test_6_a_priority_or_timeout_that_means_nothing_is_refused(parameters: dict[str, int], message: str) -> None:
    async with served() as (_, stub):
        await stub.ModelInfer(asking(infer(1, [1], start=True), priority=2))
        code, text = await refused(stub.ModelInfer(asking(infer(1, [1]), **parameters)))
        assert (code, message in text) == ("INVALID_ARGUMENT", True), text
        assert totals(await stub.ModelInfer(asking(infer(1, [1], end=True), priority=2))) == [2]


async def test_6_what_follows_a_sequence_that_waits_in_vain_holds_up_its_stream_no_longer() -> None:
    async with served(QUEUED) as (_, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        many = [infer(2, [1] * 64, identity="more") for _ in range(80)]
        first = asking(infer(2, [1], start=True, identity="first"), timeout=500_000)
        responses = await stream(stub, [first, *many, infer(3, [1], identity="other")])
        assert len(responses) == 82 and all(r.error_message for r in responses)


@pytest.mark.parametrize("way", ["unary", "stream", "stream of a named client"])
async def test_6_who_goes_leaves_the_line(way: str) -> None:
    async with served(QUEUED) as (cluster, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        metadata = (("lockstep-client", "me"),) if way.endswith("named client") else ()
        if way == "unary":
            call = stub.ModelInfer(infer(2, [1], start=True), metadata=metadata)
        else:
            call = stub.ModelStreamInfer(metadata=metadata)
            await call.write(infer(2, [1], start=True))
        await until(lambda: num_waiting(cluster) == 1)
        call.cancel()
        await until(lambda: num_waiting(cluster) == 0)
        assert totals(await stub.ModelInfer(infer(1, [1], end=True))) == [2]
        assert totals(await stub.ModelInfer(infer(3, [7], start=True, end=True))) == [7]
        assert cluster.directory.statistics()["sum"].opened == 2


async def test_7_the_model_is_told_when_and_why_a_sequence_ends() -> None:
    """5453, 4629, 3492, k2-fsa/sherpa 533."""

    class Told(FloatSumModel):
        def __init__(self) -> None:
            self.ended: list[str] = []

        def session_ended(self, session: str, reason: str) -> None:
            self.ended.append(reason)

    model = Told()
    async with served(model=model) as (_, stub):
        await stub.ModelInfer(infer(1, [1], start=True, end=True))
        await until(lambda: model.ended == ["closed"])
        await stream(stub, [infer(1, [1], start=True)])
        await until(lambda: model.ended == ["closed", "aborted"])


async def run_together(config: AppConfig, segments: dict[str, list[int]]) -> Stats:
    """What the engine did for sessions that submit segments of ones, of such lengths, while a step runs."""
    model = Held()
    async with local(model, config=config) as (cluster, hub):
        sessions = {name: await hub.open(name) for name in segments}
        for name, lengths in segments.items():
            for length in lengths:
                sessions[name].submit(np.ones((length, 1), np.float32))
        await until(lambda: cluster.engines["owner-0"].stats.segments > 0)
        model.go.set()
        for name, lengths in segments.items():
            await sessions[name].wait()
            outputs = sessions[name].read()
            assert outputs is not None
            assert outputs.values["total"].ravel().tolist() == list(range(1, sum(lengths) + 1))
        return cluster.engines["owner-0"].stats


async def test_7_a_client_that_wants_to_know_is_told_when_and_why_its_sequence_ends() -> None:
    """5453, 4178: over a stream, and by our own client."""
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, idle_timeout_s=0.3))
    async with at_port(config) as (cluster, port, _), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        noticed = infer(7, [1], start=True, identity="first")
        noticed.parameters["sequence_notice"].bool_param = True
        call = stub.ModelStreamInfer()
        for request in (noticed, infer(8, [1], start=True), infer(9, [1], start=True, end=True)):
            await call.write(request)
        assert [totals((await call.read()).infer_response) for _ in range(3)] == [[1]] * 3
        told = await asyncio.wait_for(call.read(), 5)
        assert "sequence 7 of sum" in told.error_message and told.infer_response.id == "first"
        parameters = told.infer_response.parameters
        assert parameters["sequence_ended"].string_param == "idle"
        assert parameters["sequence_id"].WhichOneof("parameter_choice") != "string_param"
        await until(lambda: cluster.engines["owner-0"].stats.ends["idle"] == 2)
        await call.done_writing()
        assert await asyncio.wait_for(call.read(), 5) is grpc.aio.EOF
        code, text = await refused(stub.ModelInfer(noticed))
        assert (code, "use a stream" in text) == ("INVALID_ARGUMENT", True)
        client = connect(f"grpc://127.0.0.1:{port}")
        session = await client.open()
        session.submit(np.ones((1, 1), np.float32))
        await session.wait()
        with pytest.raises(SessionEnded, match="idle"):
            async for _ in session.outputs():
                pass
        await client.stop()


async def test_8_what_is_ready_together_runs_together() -> None:
    """7776, 4841: many sequences of single timesteps fill the batches, without a delay to configure."""
    config = dataclasses.replace(CONFIG, engine=EngineConfig(device="cpu", slots=64, max_batch_size=64))
    stats = await run_together(config, {f"s{i}": [1] * 20 for i in range(64)})
    assert stats.session_steps / stats.steps > 32


async def test_9_sequences_of_unequal_lengths_share_steps() -> None:
    """270, 8156, 6061, wenet-e2e/wenet 1993."""
    rng = random.Random(0)
    config = dataclasses.replace(CONFIG, engine=EngineConfig(device="cpu", slots=64, max_batch_size=64))
    stats = await run_together(config, {f"s{i}": [rng.randint(1, 16) for _ in range(10)] for i in range(64)})
    assert stats.session_steps / stats.steps > 16


class Fibonacci:
    """Two states of the same shape, which would show if they changed places."""

    input, outputs = TensorSpec((1,)), {"total": TensorSpec((1,))}

    def initial_state(self, batch: int) -> dict[str, torch.Tensor]:
        return {"last": torch.ones(batch, 1), "before": torch.zeros(batch, 1)}

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        before, last, ys = state["before"], state["last"], []
        for now in x:
            before, last = last, last + before * now
            ys.append(last)
        return torch.stack(ys), {"before": before, "last": last}


async def test_10_states_keep_their_places_in_and_out_of_slots() -> None:
    """8586, 6538, 5446."""
    config = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, slots=2, max_batch_size=2))
    model: Any = Fibonacci()
    async with served(config, model) as (cluster, stub):
        requests = [
            infer(sequence, [1], start=turn == 0, identity=f"{sequence}:{turn}")
            for turn in range(9)
            for sequence in range(1, 8)
        ]
        found = of_sequences(await stream(stub, requests))
        assert all(values == [1, 2, 3, 5, 8, 13, 21, 34, 55] for values in found.values())
        assert cluster.engines["owner-0"].stats.evictions > 0


async def test_11_a_stateful_model_is_a_class_of_a_few_lines() -> None:
    """5453, 3405, 5191, pytriton 50."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, name="examples.own_model:Smoother"))
    async with local(load(config.model), config=config) as (_, hub):
        session = await hub.open()
        session.submit(np.full((4, 1), 2, np.float32))
        await session.wait()
        outputs = session.read()
        assert outputs is not None
        assert outputs.values["mean"].ravel().tolist() == [2, 2, 2, 2]


async def test_12_a_session_can_begin_with_a_state_of_its_own() -> None:
    """6579."""
    async with local(FloatSumModel(), config=CONFIG) as (_, hub):
        session = await hub.open(initial_state=[np.full((1, 1), 100, np.float32)])
        session.submit(np.ones((2, 1), np.float32))
        await session.wait()
        outputs = session.read()
        assert outputs is not None
        assert outputs.values["total"].ravel().tolist() == [101, 102]


async def test_13_two_clients_with_one_id_do_not_meet() -> None:
    """3103, 3577, 4064: on streams each has its own; where they share a space it is a conflict, never a takeover."""
    async with served() as (_, stub):
        requests = [infer(1, [1], start=turn == 0, identity=f"1:{turn}") for turn in range(10)]
        found = await asyncio.gather(*(stream(stub, requests) for _ in range(4)))
        assert [of_sequences(responses) for responses in found] == [{"1": list(range(1, 11))}] * 4
        await stub.ModelInfer(infer(1, [1], start=True))
        code, text = await refused(stub.ModelInfer(infer(1, [1], start=True)))
        assert (code, "is open already" in text) == (SessionExists.grpc, True)
        assert totals(await stub.ModelInfer(infer(1, [1], end=True))) == [2]


async def test_14_a_sequence_goes_through_all_models_of_a_pipeline() -> None:
    """3770, 8322, 5188: each part has a state of the sequence, which begins and ends with it."""
    options: dict[str, Any] = {
        "parts": [
            {"name": "sums", "model": "tests.fakes:FloatSumModel"},
            {"name": "again", "model": "tests.fakes:FloatSumModel"},
        ],
        "outputs": ["sums", "again"],
    }
    config = dataclasses.replace(CONFIG, model=check(ModelConfig("pipeline", options, served_as="sum")))
    async with served(config, load(config.model)) as (_, stub):
        requests = [
            infer(sequence, [sequence], start=turn == 0, end=turn == 4, identity=f"{sequence}:{turn}")
            for _ in range(2)
            for turn in range(5)
            for sequence in range(1, 7)
        ]
        found: dict[str, list[float]] = {}
        for response in await stream(stub, requests):
            assert not response.error_message
            answer = response.infer_response
            values = dict(zip((t.name for t in answer.outputs), answer.raw_output_contents, strict=True))
            found.setdefault(answer.id.partition(":")[0], []).append(np.frombuffer(values["again"], np.float32).item())
        for sequence in range(1, 7):
            assert found[str(sequence)] == [sequence * n for n in (1, 3, 6, 10, 15)] * 2


async def test_15_an_idle_sequence_holds_no_slot_and_a_lone_one_does_not_wait_for_others() -> None:
    """1950, PR 3848, PR 3057: a direct strategy has a sequence to a slot, and a delay to fill the others."""
    config = dataclasses.replace(CONFIG, engine=EngineConfig(device="cpu", slots=4, max_batch_size=4))
    async with served(config) as (cluster, stub):
        for sequence in range(1, 33):
            await stub.ModelInfer(infer(sequence, [1], start=True))
        stats = cluster.engines["owner-0"].stats
        assert stats.steps == stats.session_steps == 32, "each ran at once, alone"
    stats = await run_together(config, {f"s{i}": [1] * 20 for i in range(32)})
    assert stats.session_steps / stats.steps > 3.5, "of 4"
