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

from serve_app.config import AppConfig, EngineConfig
from serve_app.engine.stats import Stats
from serve_app.errors import SessionExists
from serve_app.models.registry import load
from serve_app.spec import TensorSpec
from tests.fakes import FloatSumModel
from tests.local import local
from tests.unit.test_oip_grpc import CONFIG, infer, refused, served, stream, totals, until

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


class Held(FloatSumModel):
    """Its first step takes until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.go.wait(30)
        return super().forward(x, state)


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
