"""The Open Inference Protocol over real gRPC, in front of engines in this process: no Ray."""

import asyncio
import dataclasses
import gc
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing import shared_memory
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch

from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig, SessionConfig
from serve_app.ingress import grpc_server, oip, oip_grpc
from serve_app.ingress.batched import BatchedModels
from serve_app.ingress.model_control import Marks
from serve_app.ingress.oip import Answer, InferenceServer
from serve_app.ingress.oip_grpc import MAX_OUTSTANDING, VALUES_TAG, InferenceService, Parts, Splitter, Template, split
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc
from serve_app.ingress.sequences import Sequence
from tests.fakes import FloatSumModel
from tests.local import LocalCluster, local
from tests.stateless import LocalModels

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(
    model=ModelConfig("sum"),
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(max_sessions=64, max_segment_timesteps=64, max_window_timesteps=256),
    frame=FrameConfig(answer_within_s=0.2),
)


@asynccontextmanager
async def served(
    config: AppConfig = CONFIG, model: FloatSumModel | None = None, batched: BatchedModels | None = None
) -> AsyncIterator[tuple[LocalCluster, Any]]:
    """The service; a cluster, and a stub that calls it."""
    async with (
        at_port(config, model, batched) as (cluster, port, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield cluster, oip_pb2_grpc.GRPCInferenceServiceStub(channel)


@asynccontextmanager
async def at_port(
    config: AppConfig = CONFIG, model: FloatSumModel | None = None, batched: BatchedModels | None = None
) -> AsyncIterator[tuple[LocalCluster, int, Callable[[], Awaitable[None]]]]:
    """The service at a port of its own; a cluster, the port, and what stops the server."""
    async with local(model or FloatSumModel(), config=config, ack_on_receipt=False) as (cluster, hub):
        service = InferenceService()
        service.inference = InferenceServer(hub, batched, Marks(["sum"]))
        port, stop = await START(service)
        try:
            yield cluster, port, stop
        finally:
            await stop()


Started = tuple[int, Callable[[], Awaitable[None]]]


async def start_own(service: InferenceService) -> Started:
    server = service.server()

    async def stop() -> None:
        server.stop()

    return await server.start("127.0.0.1", 0), stop


async def start_grpc(service: InferenceService) -> Started:
    """As Serve does it."""
    server = grpc.aio.server()
    oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return port, partial(server.stop, grace=None)


START = start_own


@pytest.fixture(autouse=True, params=[start_own, start_grpc])
def _both_servers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "START", request.param)


def infer(
    sequence: int | str | None,
    values: Iterable[float] = (),
    *,
    start: bool = False,
    end: bool = False,
    identity: str = "",
    **changes: Any,
) -> pb.ModelInferRequest:
    """A request with timesteps of one number each; `changes` are fields of the message, or of its input."""
    x = np.array(list(values), np.float32).reshape(-1, 1)
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, **changes.pop("tensor", {})}
    message = {"model_name": "sum", "inputs": [tensor], "raw_input_contents": [x.tobytes()], **changes}
    request = pb.ModelInferRequest(id=identity, **message)
    if isinstance(sequence, str):
        request.parameters["sequence_id"].string_param = sequence
    elif sequence is not None:
        request.parameters["sequence_id"].int64_param = sequence
    request.parameters["sequence_start"].bool_param = start
    request.parameters["sequence_end"].bool_param = end
    return request


def totals(response: pb.ModelInferResponse) -> list[float]:
    (tensor,), (raw,) = response.outputs, response.raw_output_contents
    assert (tensor.name, tensor.datatype) == ("total", "FP32")
    return list(np.frombuffer(raw, np.float32).reshape(tensor.shape).ravel().tolist())


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code().name, raised.value.details()


async def test_what_the_server_says_of_itself() -> None:
    async with served() as (_, stub):
        assert (await stub.ServerLive(pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="sum", version="1"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="sum", version="2"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="other"))).ready
        assert "statistics" in (await stub.ServerMetadata(pb.ServerMetadataRequest())).extensions
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))
        assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 1])]
        assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [("total", "FP32", [-1, 1])]
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="sum"))).config
        assert config.HasField("sequence_batching") and not config.model_transaction_policy.decoupled
        assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [("x", pb.TYPE_FP32, [-1, 1])]
        unknown = await refused(stub.ModelMetadata(pb.ModelMetadataRequest(name="other")))
        assert unknown == ("NOT_FOUND", "Request for unknown model: 'other' is not found")
        code, text = await refused(stub.ModelConfig(pb.ModelConfigRequest(name="sum", version="3")))
        assert (code, "version 3" in text) == ("NOT_FOUND", True)
        assert "trace_level" in (await stub.TraceSetting(pb.TraceSettingRequest())).settings
        assert (await stub.LogSettings(pb.LogSettingsRequest())).settings["log_error"].bool_param


async def test_a_model_whose_replicas_are_gone_is_not_ready_but_known() -> None:
    async with served() as (cluster, stub):
        await cluster.kill("owner-0")
        await cluster.actor.lost("owner-0")
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="sum"))).ready
        for call in (
            stub.ModelMetadata(pb.ModelMetadataRequest(name="sum")),
            stub.ModelInfer(infer(1, [1], start=True)),
        ):
            code, text = await refused(call)
            assert (code, "no replica of model 'sum' is ready" in text) == ("UNAVAILABLE", True)


async def test_a_sequence_of_unary_calls() -> None:
    async with served() as (_, stub):
        first = await stub.ModelInfer(infer(7, [1, 2], start=True, identity="a"))
        assert (first.id, totals(first)) == ("a", [1, 3])
        assert totals(await stub.ModelInfer(infer(7, [10]))) == [13]
        assert totals(await stub.ModelInfer(infer(7, [1], end=True))) == [14]
        code, text = await refused(stub.ModelInfer(infer(7, [1])))
        assert code == "INVALID_ARGUMENT"
        assert "sequence 7 to model 'sum' must specify the START flag on the first request" in text
        assert totals(await stub.ModelInfer(infer(7, [5], start=True, end=True))) == [5]
        assert totals(await stub.ModelInfer(infer("named", [6], start=True))) == [6]
        assert totals(await stub.ModelInfer(infer("named", [], end=True))) == []


async def test_each_output_tells_its_time() -> None:
    async with served() as (_, stub):
        told = (await stub.ModelInfer(infer(1, [1, 2, 3], start=True, end=True))).parameters
        assert told["batch_size"].int64_param == 1
        assert told["total_us"].int64_param >= told["compute_us"].int64_param + told["queue_us"].int64_param
        assert told["compute_us"].int64_param > 0
        assert "triton_final_response" not in told


async def test_a_leading_dimension_of_one_comes_back() -> None:
    async with served() as (_, stub):
        response = await stub.ModelInfer(infer(1, [1, 2], start=True, tensor={"shape": [1, 2, 1]}))
        assert (list(response.outputs[0].shape), totals(response)) == ([1, 2, 1], [1, 3])


async def test_values_in_the_message_instead_of_raw() -> None:
    async with served() as (_, stub):
        request = infer(1, [], start=True, raw_input_contents=[], tensor={"shape": [2, 1]})
        request.inputs[0].contents.fp32_contents.extend([1, 4])
        assert totals(await stub.ModelInfer(request)) == [1, 5]


async def stream(stub: Any, requests: Iterable[pb.ModelInferRequest], **call: Any) -> list[Any]:
    return [response async for response in stub.ModelStreamInfer(iter(requests), **call)]


async def test_many_sequences_on_streams_equal_each_alone() -> None:
    """Cut anywhere, mixed, with ids that repeat after an end and are the same on all streams."""

    async def one(stub: Any, seed: int) -> None:
        rng = random.Random(seed)
        requests, expected = list[pb.ModelInferRequest](), dict[str, list[float]]()
        running: dict[int, float] = {}
        for i in range(300):
            sequence = rng.randint(1, 12)
            values = [float(rng.randint(-9, 9)) for _ in range(rng.randint(1, 12))]
            start, end = sequence not in running, rng.random() < 0.1
            total = running.pop(sequence, 0.0)
            expected[str(i)] = (total + np.cumsum(values)).tolist()
            if not end:
                running[sequence] = expected[str(i)][-1]
            requests.append(infer(sequence, values, start=start, end=end, identity=str(i)))
        responses = await stream(stub, requests)
        assert not [r.error_message for r in responses if r.error_message]
        assert {r.infer_response.id: totals(r.infer_response) for r in responses} == expected
        of_sequence = {r.id: r.parameters["sequence_id"].int64_param for r in requests}
        for sequence in range(1, 13):
            order = [int(r.infer_response.id) for r in responses if of_sequence[r.infer_response.id] == sequence]
            assert order == sorted(order)

    async with served() as (cluster, stub):
        await asyncio.gather(*(one(stub, seed) for seed in range(3)))
        await until(lambda: cluster.engines["owner-0"].gauges()["sessions_open"] == 0)


async def until(holds: Any, within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.01)


AXES: dict[str, Any] = {"tensor": {"shape": [0, 2**31 - 1, 2**31 - 1]}, "raw_input_contents": [b""]}


async def test_errors_in_a_stream_name_their_request_and_harm_no_other() -> None:
    async with served() as (_, stub):
        responses = await stream(
            stub,
            [
                infer(1, [1], start=True, identity="good"),
                infer(1, [1], identity="wrong type", tensor={"datatype": "INT32"}),
                infer(2, [1], identity="no start"),
                infer(None, [1], identity="no id"),
                infer(1, [1], identity="model", model_name="other"),
                infer(1, [], identity="axes", **AXES),
                infer(1, [1], identity="also good"),
            ],
        )
        found = {r.infer_response.id: r.error_message or totals(r.infer_response) for r in responses}
        assert (found.pop("good"), found.pop("also good")) == ([1], [2])
        assert found["no start"].endswith("must specify the START flag on the first request of the sequence")
        assert found["no id"].endswith("must specify a non-zero or non-empty correlation ID")
        assert "'other' is not found" in found["model"]
        assert "data-type is 'INT32', but model 'sum' expects 'FP32'" in found["wrong type"]
        assert "has the shape [0, 2147483647, 2147483647]" in found["axes"]


BAD = {
    "truncated": ({"raw_input_contents": [b"123"]}, "unexpected total byte size 3 for input 'x', expecting 4"),
    "oversized": ({"raw_input_contents": [b"12345678"]}, "unexpected total byte size 8 for input 'x', expecting 4"),
    "overflow": ({"tensor": {"shape": [2**31, 2**31]}}, "expected whole numbers from 0 on"),
    "huge": ({"tensor": {"shape": [2**31 - 1, 2**31 - 1, 4]}}, "unexpected total byte size 4"),
    "axes": (AXES, "has the shape [0, 2147483647, 2147483647]"),
    "negative": ({"tensor": {"shape": [-1, 1]}}, "expected whole numbers from 0 on"),
    "features": ({"tensor": {"shape": [1, 1, 1, 1]}}, "Expected [-1,1], got [1,1,1,1]"),
    "scalar": ({"tensor": {"shape": []}}, "Expected [-1,1], got []"),
    "datatype": ({"tensor": {"datatype": "FP99"}}, "data-type is 'FP99'"),
    "name": ({"tensor": {"name": "y"}}, "unexpected inference input 'y'"),
    "no input": ({"inputs": [], "raw_input_contents": []}, "expected 1 inputs but got 0"),
    "no data": ({"inputs": [], "raw_input_contents": [b"1234"]}, "expected 0 raw input contents but got 1"),
    "output": ({"outputs": [{"name": "other"}]}, "unexpected inference output 'other'"),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_input_is_named_and_the_sequence_goes_on(what: str) -> None:
    changes, expected = BAD[what]
    async with served() as (_, stub):
        assert totals(await stub.ModelInfer(infer(1, [1], start=True))) == [1]
        code, text = await refused(stub.ModelInfer(infer(1, [1], **changes)))
        assert code == "INVALID_ARGUMENT"
        assert expected in text
        assert totals(await stub.ModelInfer(infer(1, [1], end=True))) == [2]


async def test_parameters_of_the_wrong_kind() -> None:
    async with served() as (_, stub):
        request = infer(1, [1], start=True)
        request.parameters["sequence_id"].bool_param = True
        assert await refused(stub.ModelInfer(request)) == (
            "INVALID_ARGUMENT",
            "sequence_id is True, expected an integer of 64 bits, or a string of at most 256 characters",
        )
        request = infer(1, [1], start=True)
        request.parameters["sequence_end"].int64_param = 1
        assert "sequence_end is 1" in (await refused(stub.ModelInfer(request)))[1]


async def test_two_clients_that_pick_the_same_id() -> None:
    """In the space that all share it is a conflict; with names, and on streams, each has its own."""
    async with served() as (_, stub):
        assert totals(await stub.ModelInfer(infer(1, [1], start=True))) == [1]
        code, text = await refused(stub.ModelInfer(infer(1, [2], start=True)))
        assert (code, "open already" in text) == ("ALREADY_EXISTS", True)
        named = [("lockstep-client", "me")]
        assert totals(await stub.ModelInfer(infer(1, [3], start=True), metadata=named)) == [3]
        token = [("authorization", "Bearer 5")]
        assert totals(await stub.ModelInfer(infer(1, [4], start=True), metadata=token)) == [4]
        assert totals((await stream(stub, [infer(1, [5], start=True)]))[0].infer_response) == [5]
        assert totals(await stub.ModelInfer(infer(1, [1]))) == [2]
        assert totals(await stub.ModelInfer(infer(1, [1]), metadata=named)) == [4]
        assert totals(await stub.ModelInfer(infer(1, [1]), metadata=token)) == [5]


async def test_a_second_start_begins_again() -> None:
    async with served() as (cluster, stub):
        named = [("lockstep-client", "me")]
        await stub.ModelInfer(infer(1, [1], start=True), metadata=named)
        assert totals(await stub.ModelInfer(infer(1, [5], start=True), metadata=named)) == [5]
        responses = await stream(stub, [infer(1, [1], start=True), infer(1, [9], start=True, identity="b")])
        assert totals(next(r.infer_response for r in responses if r.infer_response.id == "b")) == [9]
        await until(lambda: cluster.engines["owner-0"].gauges()["sessions_open"] == 1)


async def test_a_sequence_on_two_streams_at_once() -> None:
    async with served() as (_, stub):
        named = [("lockstep-client", "me")]
        first = stub.ModelStreamInfer(metadata=named)
        await first.write(infer(1, [1], start=True))
        assert totals((await first.read()).infer_response) == [1]
        (other,) = await stream(stub, [infer(1, [1])], metadata=named)
        assert "in use on another stream" in other.error_message
        await first.done_writing()
        assert await first.read() == grpc.aio.EOF
        assert totals((await stream(stub, [infer(1, [1])], metadata=named))[0].infer_response) == [2]


async def test_streams_of_a_client_share_its_sequences_though_it_had_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip, "MIN_NAMED", 1)
    async with served() as (_, stub):
        streams = [stub.ModelStreamInfer(metadata=[("lockstep-client", "me")]) for _ in range(2)]
        for each in streams:
            await each.write(infer(1, [1]))
            assert "START flag" in (await each.read()).error_message
            for i in range(3):
                other = [("lockstep-client", str(i))]
                assert totals(await stub.ModelInfer(infer(1, [1], start=True, end=True), metadata=other)) == [1]
        await streams[0].write(infer(5, [1], start=True))
        assert totals((await streams[0].read()).infer_response) == [1]
        for start in (True, False):
            await streams[1].write(infer(5, [1], start=start))
            assert "in use on another stream" in (await streams[1].read()).error_message
        await streams[0].write(infer(5, [1]))
        assert totals((await streams[0].read()).infer_response) == [2]


async def test_clients_that_use_nothing_are_forgotten() -> None:
    async with local(FloatSumModel(), config=CONFIG, ack_on_receipt=False) as (_, hub):
        server = InferenceServer(hub)
        streams = []
        for i in range(100):
            streams.append(server.space(f"stream {i}"))
            streams[i].join(object())
        for i in range(10_000):
            server.space(f"client {i}")
        assert len(server._named) <= 2 * len(streams)
        assert all(server.space(f"stream {i}") is space for i, space in enumerate(streams))


async def test_a_stream_keeps_no_more_than_some_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests that wait: for a session to open here, and for room in its window."""
    monkeypatch.setattr(grpc_server, "MAX_OUTSTANDING_BYTES", 100)
    monkeypatch.setattr(oip_grpc, "MAX_OUTSTANDING_BYTES", 100)
    taken = list[int]()
    async with served() as (cluster, stub):
        opens, may_open = cluster.open, asyncio.Event()
        ask = oip_grpc.RequestStream._ask

        def counted(stream: oip_grpc.RequestStream, *arguments: Any) -> bool:
            taken.append(stream.outstanding_bytes)
            return ask(stream, *arguments)

        async def slow(*arguments: Any, **options: Any) -> Any:
            await may_open.wait()
            return await opens(*arguments, **options)

        monkeypatch.setattr(cluster, "open", slow)
        monkeypatch.setattr(oip_grpc.RequestStream, "_ask", counted)
        call = stub.ModelStreamInfer()
        for i in range(40):
            await call.write(infer(i % 4 + 1, [1] * 20, start=i < 4, end=i >= 36, identity=str(i)))
        await call.done_writing()
        await until(lambda: bool(taken))
        may_open.set()
        found = [(int(r.infer_response.id), totals(r.infer_response)) async for r in call]
        assert sorted(found) == [(i, [1 + i // 4 * 20 + k for k in range(20)]) for i in range(40)]
        assert max(taken) <= 100 + infer(1, [1] * 20, start=True).ByteSize()  # one may be larger than what is left


async def test_a_stream_that_is_cancelled_leaves_nothing() -> None:
    async with served() as (cluster, stub):
        call = stub.ModelStreamInfer()
        for sequence in range(1, 9):
            await call.write(infer(sequence, [1], start=True))
        for _ in range(8):
            await call.read()
        call.cancel()
        await until(lambda: cluster.engines["owner-0"].gauges()["sessions_open"] == 0)
        assert totals(await stub.ModelInfer(infer(1, [1], start=True, end=True))) == [1]


async def test_requests_wait_for_a_session_that_takes_long_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the window of it takes at once."""
    async with served() as (cluster, stub):
        opens, may_open = cluster.open, asyncio.Event()

        async def slow(*arguments: Any, **options: Any) -> Any:
            await may_open.wait()
            return await opens(*arguments, **options)

        monkeypatch.setattr(cluster, "open", slow)

        def requests() -> Iterator[pb.ModelInferRequest]:
            for i in range(40):
                yield infer(1, [1] * 20, start=i == 0, end=i == 39, identity=str(i))
            may_open.set()

        responses = await stream(stub, requests())
        assert [r.infer_response.id for r in responses] == [str(i) for i in range(40)]
        assert [total for r in responses for total in totals(r.infer_response)] == list(range(1, 801))


async def test_a_half_closed_stream_gets_all_its_answers() -> None:
    async with served() as (_, stub):
        requests = [infer(1 + i % 3, [1] * 20, start=i < 3, identity=str(i)) for i in range(60)]
        responses = await stream(stub, requests)
        assert len(responses) == 60 and not any(r.error_message for r in responses)


async def test_more_than_the_window_waits_instead_of_failing() -> None:
    async with served() as (_, stub):
        count = 2 * MAX_OUTSTANDING
        responses = await stream(stub, [infer(1, [1], start=i == 0, identity=str(i)) for i in range(count)])
        assert [r.infer_response.id for r in responses] == [str(i) for i in range(count)]
        assert totals(responses[-1].infer_response) == [count]


async def test_no_room_for_another_sequence() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=1))
    async with served(config) as (_, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        call = stub.ModelInfer(infer(2, [1], start=True))
        code, _ = await refused(call)
        assert code == "RESOURCE_EXHAUSTED"
        assert ("retry-after", "1") in list(await call.trailing_metadata())
        await stub.ModelInfer(infer(1, [1], end=True))

        async def fits() -> bool:  # once the end has come to the engine
            try:
                return totals(await stub.ModelInfer(infer(2, [1], start=True))) == [1]
            except grpc.aio.AioRpcError:
                return False

        async with asyncio.timeout(5):
            while not await fits():
                await asyncio.sleep(0.01)


async def test_an_idle_sequence_ends_and_its_id_is_free() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, idle_timeout_s=0.05))
    async with served(config) as (cluster, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        await until(lambda: cluster.engines["owner-0"].gauges()["sessions_open"] == 0)
        await until(lambda: cluster.engines["owner-0"].stats.ends["idle"] == 1)
        await asyncio.sleep(0)
        code, _ = await refused(stub.ModelInfer(infer(1, [1])))
        assert code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
        assert totals(await stub.ModelInfer(infer(1, [2], start=True))) == [2]


async def test_statistics_count_what_was_asked() -> None:
    async with served() as (_, stub):
        await stream(stub, [infer(1, [1, 1, 1], start=i == 0) for i in range(10)])
        await refused(stub.ModelInfer(infer(9, [1])))
        (found,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="sum"))).model_stats
        stats = found.inference_stats
        assert (stats.success.count, found.inference_count) == (10, 10)
        assert stats.success.ns >= stats.compute_infer.ns + stats.queue.ns > 0
        assert stats.fail.count == 1
        assert [m.name for m in (await stub.ModelStatistics(pb.ModelStatisticsRequest())).model_stats] == ["sum"]


async def test_statistics_count_sessions() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=2, max_wait_s=5))
    async with served(config) as (_, stub):

        async def sessions() -> pb.SessionStatistics:
            (found,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="sum"))).model_stats
            return found.session_stats

        assert await sessions() == pb.SessionStatistics()
        await stub.ModelInfer(infer(1, [1], start=True))
        call = stub.ModelStreamInfer()
        await call.write(infer(2, [1], start=True))
        await call.read()
        waiting = asyncio.ensure_future(stub.ModelInfer(infer(3, [1], start=True)))
        late = infer(4, [1], start=True)
        late.parameters["timeout"].int64_param = 1
        await refused(stub.ModelInfer(late))
        async with asyncio.timeout(5):
            while await sessions() != pb.SessionStatistics(open=2, waiting=1, opened=2):
                await asyncio.sleep(0.05)
        call.cancel()
        await waiting
        await stub.ModelInfer(infer(1, [1], end=True))
        async with asyncio.timeout(5):
            while await sessions() != pb.SessionStatistics(open=1, opened=3, ended={"closed": 1, "aborted": 1}):
                await asyncio.sleep(0.05)


async def test_a_model_that_is_unloaded_starts_nothing_and_goes_on() -> None:
    async with served() as (_, stub):
        await stub.ModelInfer(infer(1, [1], start=True))
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="sum"))
        (entry,) = (await stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
        assert (entry.name, entry.state, entry.reason) == ("sum", "UNAVAILABLE", "unloaded")
        assert not (await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="sum"))).ready
        assert (await refused(stub.ModelInfer(infer(2, [1], start=True))))[0] == "UNAVAILABLE"
        assert totals(await stub.ModelInfer(infer(1, [1]))) == [2]
        await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="sum"))
        assert totals(await stub.ModelInfer(infer(2, [1], start=True))) == [1]
        assert (await refused(stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="x"))))[
            0
        ] == "NOT_FOUND"


async def test_inputs_and_outputs_in_shared_memory() -> None:
    memory = shared_memory.SharedMemory(create=True, size=64)
    try:
        async with served() as (_, stub):
            register = pb.SystemSharedMemoryRegisterRequest(name="r", key=memory.name, offset=0, byte_size=64)
            await stub.SystemSharedMemoryRegister(register)
            assert (await refused(stub.SystemSharedMemoryRegister(register)))[0] == "ALREADY_EXISTS"
            status = await stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest())
            assert status.regions["r"].byte_size == 64
            memory.buf[:8] = np.array([1, 2], np.float32).tobytes()

            def at(offset: int, size: int) -> dict[str, pb.InferParameter]:
                return {
                    "shared_memory_region": pb.InferParameter(string_param="r"),
                    "shared_memory_offset": pb.InferParameter(int64_param=offset),
                    "shared_memory_byte_size": pb.InferParameter(int64_param=size),
                }

            def request(start: bool, read: int, write: int) -> pb.ModelInferRequest:
                return infer(
                    1, [], start=start, raw_input_contents=[],
                    tensor={"shape": [2, 1], "parameters": at(read, 8)},
                    outputs=[{"name": "total", "parameters": at(32, write)}],
                )  # fmt: skip

            response = await stub.ModelInfer(request(True, 0, 8))
            assert not response.raw_output_contents
            assert np.frombuffer(bytes(memory.buf[32:40]), np.float32).tolist() == [1, 3]
            assert "should be at least 8 bytes" in (await refused(stub.ModelInfer(request(False, 0, 4))))[1]
            await stub.ModelInfer(request(False, 0, 8))
            assert np.frombuffer(bytes(memory.buf[32:40]), np.float32).tolist() == [4, 6], "that has not run"
            os.truncate(f"/dev/shm/{memory.name}", 4)
            assert "was made shorter" in (await refused(stub.ModelInfer(request(False, 0, 8))))[1]
            os.truncate(f"/dev/shm/{memory.name}", 64)
            assert "the region has 64" in (await refused(stub.ModelInfer(request(False, 60, 8))))[1]
            await stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name=""))
            assert (await refused(stub.ModelInfer(request(False, 0, 8))))[0] == "NOT_FOUND"
            wrong = pb.SystemSharedMemoryRegisterRequest(name="s", key="/no/such", byte_size=1)
            assert (await refused(stub.SystemSharedMemoryRegister(wrong)))[0] == "INVALID_ARGUMENT"
    finally:
        memory.close()
        memory.unlink()


async def test_cuda_memory_is_refused() -> None:
    async with served() as (_, stub):
        assert not (await stub.CudaSharedMemoryStatus(pb.CudaSharedMemoryStatusRequest())).regions
        await stub.CudaSharedMemoryUnregister(pb.CudaSharedMemoryUnregisterRequest())
        code, text = await refused(stub.CudaSharedMemoryRegister(pb.CudaSharedMemoryRegisterRequest(name="g")))
        assert (code, "use system shared memory" in text) == ("INVALID_ARGUMENT", True)


async def test_a_model_that_fails_tells_the_request_and_harms_no_other() -> None:
    class Failing(FloatSumModel):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if (x == 666).any():
                raise RuntimeError("such a number")
            return super().forward(x, state)

    async with served(model=Failing()) as (_, stub):
        assert totals(await stub.ModelInfer(infer(1, [1], start=True))) == [1]
        assert totals(await stub.ModelInfer(infer(2, [5], start=True))) == [5]
        code, text = await refused(stub.ModelInfer(infer(1, [666])))
        assert (code, "such a number" in text) == ("INTERNAL", True)
        assert totals(await stub.ModelInfer(infer(1, [1]))) == [2]
        assert totals(await stub.ModelInfer(infer(2, [1]))) == [6]


async def test_nan_is_refused() -> None:
    async with served() as (_, stub):
        code, text = await refused(stub.ModelInfer(infer(1, [float("nan")], start=True)))
        assert (code, "NaN or infinity" in text) == ("INVALID_ARGUMENT", True)


# Stateless models.


def rows(ids: Any, model: str = "masked", identity: str = "", **parameters: Any) -> pb.ModelInferRequest:
    x = np.array(ids, np.int64)
    tensor = {"name": "ids", "datatype": "INT64", "shape": x.shape}
    request = pb.ModelInferRequest(model_name=model, id=identity, inputs=[tensor], raw_input_contents=[x.tobytes()])
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    return request


def outputs_of(response: pb.ModelInferResponse) -> dict[str, Any]:
    kinds = {"FP32": np.float32, "INT64": np.int64}
    return {
        tensor.name: np.frombuffer(raw, kinds[tensor.datatype]).reshape(tensor.shape).tolist()
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }


async def test_a_stateless_model_beside_one_with_sequences() -> None:
    async with (
        LocalModels.of(max_batch_size=8, preferred_batch_sizes=(4,)) as models,
        served(batched=models) as (_, stub),
    ):
        assert (await stub.ModelReady(pb.ModelReadyRequest(name="masked"))).ready
        assert not (await stub.ModelReady(pb.ModelReadyRequest(name="starting"))).ready
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="masked"))
        assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
            ("ids", "INT64", [-1, -1]),
            ("mask", "INT64", [-1, -1]),
        ]
        config = (await stub.ModelConfig(pb.ModelConfigRequest(name="masked"))).config
        assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (8, [4])
        assert [(each.name, list(each.dims), each.optional) for each in config.input] == [
            ("ids", [-1], False),
            ("mask", [-1], True),
        ]
        response = await stub.ModelInfer(rows([[1, 2, 3], [4, 5, 6]], identity="a"))
        assert response.id == "a"
        assert outputs_of(response) == {"total": [6, 15], "sums": [[1, 3, 6], [4, 9, 15]]}
        assert response.parameters["batch_size"].int64_param == 2
        assert totals(await stub.ModelInfer(infer(7, [1, 2], start=True, end=True))) == [1, 3]
        (counted,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name="masked"))).model_stats
        assert (counted.inference_count, counted.execution_count, counted.inference_stats.success.count) == (2, 1, 1)
        code, text = await refused(stub.ModelInfer(rows([[1]], model="starting")))
        assert (code, "no replica of model 'starting' is ready" in text) == ("UNAVAILABLE", True)


async def test_requests_to_a_stateless_model_on_a_stream() -> None:
    async with LocalModels.of(max_batch_size=8) as models, served(batched=models) as (_, stub):
        requests = [rows([[i] * (i % 5 + 1)], identity=str(i)) for i in range(100)]
        requests[7] = rows([[666]], identity="7")
        requests[8] = rows([[1000]], identity="8")
        found = {r.infer_response.id: r for r in await stream(stub, requests)}
        assert len(found) == 100
        assert "a bad row" in found.pop("7").error_message
        assert "id 1000 is out of range" in found.pop("8").error_message
        for name, response in found.items():
            assert outputs_of(response.infer_response)["total"] == [int(name) * (int(name) % 5 + 1)]


BAD_ROWS = {
    "range": (rows([[1, 1000]]), "id 1000 is out of range: expected 0 to 999"),
    "too long": (rows([[1] * 33]), "rows of length 33 arrived, model 'masked' takes 1 to 32"),
    "too many": (rows([[1]] * 9), "a request of 9 rows arrived, model 'masked' takes 1 to 8"),
    "priority": (rows([[1]], priority=3), "priority is 3, model 'masked' has 1 to 1"),
    "shape": (rows([1]), "Expected [-1,-1], got [1]"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
async def test_bad_rows_are_named_and_others_go_on(what: str) -> None:
    request, expected = BAD_ROWS[what]
    async with LocalModels.of(max_batch_size=8) as models, served(batched=models) as (_, stub):
        code, text = await refused(stub.ModelInfer(request))
        assert (code, expected in text) == ("INVALID_ARGUMENT", True), text
        request = rows([[1]])
        request.inputs[0].datatype = "FP32"
        assert "data-type is 'FP32', but model 'masked' expects 'INT64'" in (await refused(stub.ModelInfer(request)))[1]
        assert outputs_of(await stub.ModelInfer(rows([[3]])))["total"] == [3]


async def test_timeouts_and_unloading_of_a_stateless_model() -> None:
    async with LocalModels.of(max_batch_size=8, max_queue_delay_s=60) as models, served(batched=models) as (_, stub):
        code, text = await refused(stub.ModelInfer(rows([[1]], timeout=1000)))
        assert (code, "has waited for 0.0" in text) == ("DEADLINE_EXCEEDED", True)
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="masked"))
        code, text = await refused(stub.ModelInfer(rows([[1]])))
        assert (code, "is unloaded: load it" in text) == ("UNAVAILABLE", True)
        await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="masked"))
        assert outputs_of(await stub.ModelInfer(rows([[1]] * 8)))["total"] == [1] * 8


async def test_texts_as_bytes() -> None:
    async with LocalModels.of("Words") as models, served(batched=models) as (_, stub):
        texts = [b"one", "fünf".encode()]
        tensor = {"name": "text", "datatype": "BYTES", "shape": [2]}
        raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        request = pb.ModelInferRequest(model_name="words", inputs=[tensor], raw_input_contents=[raw])
        assert outputs_of(await stub.ModelInfer(request)) == {"count": [3, 5]}
        contents = {**tensor, "contents": {"bytes_contents": texts}}
        assert outputs_of(await stub.ModelInfer(pb.ModelInferRequest(model_name="words", inputs=[contents])))
        for bad, message in (
            (raw[:-1], "is cut off"),
            (raw[:2], "is cut off"),
            (raw[:7], "has 1 elements, its shape [2] takes 2"),
            (b"\0" * 8, "the text is empty"),
        ):
            request = pb.ModelInferRequest(model_name="words", inputs=[tensor], raw_input_contents=[bad])
            code, text = await refused(stub.ModelInfer(request))
            assert (code, message in text) == ("INVALID_ARGUMENT", True), text


async def test_requests_of_one_form_keep_what_is_their_own() -> None:
    async with served() as (_, stub):
        names: list[Any] = [1, "one", 2**40, 2**62, "two"]
        rounds = [[infer(name, range(at + i), start=at == 1, identity=f"{at} {i}" * 20) for i, name in enumerate(names)]
                  for at in (1, 2, 2, 3)]  # fmt: skip
        responses = await stream(stub, [request for each in rounds for request in each])
        found = {r.infer_response.id: totals(r.infer_response) for r in responses}
        for i in range(len(names)):
            lengths = [1 + i, 2 + i, 2 + i, 3 + i]
            expected = np.cumsum([value for length in lengths for value in range(length)]).tolist()
            assert found[f"3 {i}" * 20] == expected[-lengths[-1] :]


@pytest.mark.parametrize("size", [0, 1, 100, 2**14, 2**18])
async def test_answers_of_one_form_are_what_protobuf_writes(size: int) -> None:
    def response(identity: str, y: np.ndarray, queue_us: int) -> pb.ModelInferResponse:
        output = {"name": "y", "datatype": "FP32", "shape": [size]}
        parameters = {"queue_us": pb.InferParameter(int64_param=queue_us), "last": pb.InferParameter(bool_param=True)}
        fields = {"outputs": [output], "parameters": parameters, "raw_output_contents": [y.tobytes()]}
        return pb.ModelInferResponse(model_name="m", model_version="2", id=identity, **fields)

    template = Template(response("the first", np.zeros(size, np.float32), 1))
    for identity in ("", "7", "ü" * 200):
        y, queue_us = np.random.default_rng(0).random(size, np.float32), 2**40
        answer = Answer(None, "2", {"y": y}, {"queue_us": queue_us, "last": True})  # type: ignore[arg-type]
        found = pb.ModelStreamInferResponse.FromString(template.write(identity, answer))
        assert found == pb.ModelStreamInferResponse(infer_response=response(identity, y, queue_us))


async def test_answers_of_one_form_are_not_kept() -> None:
    y = np.zeros((8, 1024), np.float32)
    output = {"name": "y", "datatype": "FP32", "shape": y.shape}
    template = Template(pb.ModelInferResponse(outputs=[output], raw_output_contents=[y.tobytes()]))
    before = psutil.Process().memory_info().rss
    for i in range(5000):
        template.write(str(i), Answer(None, "", {"y": y}, {}))  # type: ignore[arg-type]
    assert psutil.Process().memory_info().rss - before < 1000 * y.nbytes


async def test_sequences_that_have_ended_leave_no_garbage() -> None:
    """What they hold, a state or a frame's outputs, is free at once."""

    def num_sequences() -> int:
        return sum(type(each) is Sequence for each in gc.get_objects())

    async with served() as (_, stub):
        gc.collect()
        gc.disable()
        try:
            before = num_sequences()  # of other tests
            await stream(stub, [infer(i, [1, 2], start=at == 0, end=at == 2) for i in range(1, 9) for at in range(3)])
            await until(lambda: num_sequences() <= before)
        finally:
            gc.enable()


async def test_what_is_refused_says_the_version_that_was_asked_for() -> None:
    async with served() as (_, stub):
        for version in ("", "1"):
            requests = [
                infer(sequence, [1], model_version=version, identity=str(sequence), start=start)
                for sequence, start in ((1, True), (1, False), (1, False), (2, False))
            ]
            responses = await stream(stub, requests)
            (error,) = [each for each in responses if each.error_message]
            assert (error.infer_response.id, error.infer_response.model_version) == ("2", version)


async def test_what_is_like_the_request_before_is_split_the_same() -> None:
    splitter, message = Splitter(), infer(7, [1, 2], identity="one").SerializeToString()
    others = [infer(7, [3, 4], identity="two"), infer(8, [3, 4], identity="two"), infer(7, [1], identity="four"),
              infer(7, [5, 6], start=True, identity="six"), infer("7", [5, 6], identity="six")]  # fmt: skip
    for other in (message, *(each.SerializeToString() for each in others), message.replace(b"one", b"\xff\xfe\xfd")):
        assert splitter(message) == split(message)
        assert splitter(other) == split(other)
        assert splitter(message[:-1]) == Parts()


async def test_what_a_request_is_split_into() -> None:
    message = infer(7, [1, 2], start=True, identity="x").SerializeToString()
    assert split(message).form == split(infer(2**40, [3, 4], start=True, identity="yz").SerializeToString()).form != b""
    assert split(message)[1:4] == ("x", 7, np.array([1, 2], np.float32).tobytes())
    told = pb.ModelInferRequest(parameters={"note": pb.InferParameter(string_param="a")}).SerializeToString()
    input_at = message.index(b"*")
    first, last = told + message, message[:input_at] + told + message[input_at:]
    assert split(first).form == split(last).form not in (b"", split(message).form), "parameters come in any order"
    for other in (
        infer(7, [1, 2]),
        infer(7, [1], start=True),
        infer("7", [1, 2], start=True),
        infer(None, [1, 2], start=True),
    ):
        assert split(other.SerializeToString()).form not in (b"", split(message).form)
    said_twice = pb.ModelInferRequest(parameters={"sequence_id": pb.InferParameter(int64_param=8)}).SerializeToString()
    values = message.index(bytes([VALUES_TAG, 8]))
    assert split(message[:values] + said_twice + message[values:]) == Parts()
    rng = random.Random(0)
    for _ in range(2000):
        broken = bytearray(message[: rng.randrange(len(message))])
        if broken:
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        assert isinstance(split(bytes(broken)), Parts)
