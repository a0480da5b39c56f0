"""Triton's own clients, unmodified, against a running application: in an environment of their own, by tests/serve.

They need an older protobuf than Serve does. The application serves the model `rnn`; EXPECTED is a file with inputs x
[sequences, T, input] and what the local module makes of them, y [sequences, T, hidden].
"""

import asyncio
import os
import queue
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpaio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

GRPC, HTTP, EXPECTED = (os.environ[name] for name in ("LOCKSTEP_GRPC", "LOCKSTEP_HTTP", "LOCKSTEP_EXPECTED"))
FILE = np.load(EXPECTED)
X, Y = FILE["x"], FILE["y"]
INPUTS = X.shape[2]


@pytest.fixture
def grpc_client() -> Iterator[Any]:
    with grpcclient.InferenceServerClient(GRPC) as client:
        yield client


@pytest.fixture
def http_client() -> Iterator[Any]:
    with httpclient.InferenceServerClient(HTTP) as client:
        yield client


def inputs_of(package: Any, x: np.ndarray) -> list[Any]:
    tensor = package.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return [tensor]


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_description(grpc_client: Any, http_client: Any) -> None:
    for client in (grpc_client, http_client):
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("rnn")
        assert not client.is_model_ready("none")
    assert grpc_client.get_server_metadata().name == http_client.get_server_metadata()["name"] == "lockstep"
    assert list(grpc_client.get_model_metadata("rnn").inputs[0].shape) == [-1, INPUTS]
    assert http_client.get_model_metadata("rnn")["inputs"][0]["shape"] == [-1, INPUTS]
    assert grpc_client.get_model_config("rnn").config.HasField("sequence_batching")
    assert http_client.get_model_config("rnn")["input"][0]["data_type"] == "TYPE_FP32"
    assert grpc_client.get_model_repository_index().models[0].state == "READY"
    assert http_client.get_model_repository_index()[0]["name"] == "rnn"
    assert "trace_level" in grpc_client.get_trace_settings().settings
    assert "trace_level" in http_client.get_trace_settings()
    assert "log_error" in grpc_client.get_log_settings().settings
    assert http_client.get_log_settings()["log_error"] is True


@pytest.mark.parametrize("sequence", [7, "seven"])
def test_unary_grpc(grpc_client: Any, sequence: int | str) -> None:
    for at in range(4):
        result = grpc_client.infer(
            "rnn", inputs_of(grpcclient, X[0, at : at + 1]), request_id=str(at), sequence_id=sequence,
            sequence_start=at == 0, sequence_end=at == 3, outputs=[grpcclient.InferRequestedOutput("y")],
        )  # fmt: skip
        assert result.get_response().id == str(at)
        near(result.as_numpy("y"), Y[0, at : at + 1])


@pytest.mark.parametrize("sequence", [8, "eight"])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
def test_unary_http(http_client: Any, sequence: int | str, binary: bool, packed: str | None) -> None:
    for at in (0, 2):
        tensor = httpclient.InferInput("x", [2, INPUTS], "FP32")
        tensor.set_data_from_numpy(X[1, at : at + 2], binary_data=binary)
        result = http_client.infer(
            "rnn", [tensor], sequence_id=sequence, sequence_start=at == 0, sequence_end=at == 2,
            outputs=[httpclient.InferRequestedOutput("y", binary_data=binary)],
            request_compression_algorithm=packed, response_compression_algorithm=packed,
        )  # fmt: skip
        near(result.as_numpy("y"), Y[1, at : at + 2])


def test_a_hundred_interleaved_sequences_on_four_streams() -> None:
    """Segments of any length, in any order between sequences; ids are the same on all streams."""
    rng = random.Random(5)
    clients = [grpcclient.InferenceServerClient(GRPC) for _ in range(4)]
    replies: list[queue.Queue[Any]] = [queue.Queue() for _ in clients]
    for client, replied in zip(clients, replies, strict=True):
        client.start_stream(lambda result, error, replied=replied: replied.put((result, error)))
    at, asked = [0] * len(X), [0] * len(clients)
    running = list(range(len(X)))
    while running:
        sequence = rng.choice(running)
        start, end = at[sequence], min(at[sequence] + rng.randint(1, 7), X.shape[1])
        at[sequence] = end
        if end == X.shape[1]:
            running.remove(sequence)
        clients[sequence % 4].async_stream_infer(
            "rnn", inputs_of(grpcclient, X[sequence, start:end]), request_id=f"{sequence} {start}",
            sequence_id=1 + sequence // 4, sequence_start=start == 0, sequence_end=end == X.shape[1],
        )  # fmt: skip
        asked[sequence % 4] += 1
    found: dict[int, list[np.ndarray]] = {sequence: [] for sequence in range(len(X))}
    for replied, count in zip(replies, asked, strict=True):
        for _ in range(count):
            result, error = replied.get(timeout=60)
            assert error is None, error
            sequence, start = map(int, result.get_response().id.split())
            assert start == sum(map(len, found[sequence]))
            found[sequence].append(result.as_numpy("y"))
    for client in clients:
        client.stop_stream()
        client.close()
    near(np.stack([np.concatenate(found[sequence]) for sequence in range(len(X))]), Y)


def test_asynchronous_grpc() -> None:
    async def run() -> None:
        async with grpcaio.InferenceServerClient(GRPC) as client:
            assert await client.is_model_ready("rnn")

            async def requests() -> Any:
                for at in range(5):
                    yield {
                        "model_name": "rnn", "inputs": inputs_of(grpcaio, X[2, at : at + 1]), "sequence_id": 3,
                        "sequence_start": at == 0, "sequence_end": at == 4, "request_id": str(at),
                    }  # fmt: skip

            results = [pair async for pair in client.stream_infer(requests())]
            assert [error for _, error in results] == [None] * 5
            near(np.concatenate([result.as_numpy("y") for result, _ in results]), Y[2, :5])
            result = await client.infer(
                "rnn", inputs_of(grpcaio, X[3, :2]), sequence_id="aio", sequence_start=True, sequence_end=True
            )
            near(result.as_numpy("y"), Y[3, :2])

    asyncio.run(run())


def test_asynchronous_http() -> None:
    async def run() -> None:
        async with httpaio.InferenceServerClient(HTTP) as client:
            assert await client.is_server_live()
            result = await client.infer(
                "rnn", inputs_of(httpaio, X[3, :2]), sequence_id="haio", sequence_start=True, sequence_end=True
            )
            near(result.as_numpy("y"), Y[3, :2])

    asyncio.run(run())


@pytest.mark.parametrize("package", [grpcclient, httpclient])
def test_system_shared_memory(package: Any) -> None:
    client = package.InferenceServerClient(GRPC if package is grpcclient else HTTP)
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    x, size = X[4, :3], X[4, :3].nbytes
    out_size = Y[4, :3].nbytes
    inside = shm.create_shared_memory_region("inside", "/lockstep_in", size)
    outside = shm.create_shared_memory_region("outside", "/lockstep_out", out_size)
    try:
        shm.set_shared_memory_region(inside, [x])
        client.register_system_shared_memory("inside", "/lockstep_in", size)
        client.register_system_shared_memory("outside", "/lockstep_out", out_size)
        tensor = package.InferInput("x", [3, INPUTS], "FP32")
        tensor.set_shared_memory("inside", size)
        output = package.InferRequestedOutput("y")
        output.set_shared_memory("outside", out_size)
        client.infer("rnn", [tensor], outputs=[output], sequence_id=44, sequence_start=True, sequence_end=True)
        near(shm.get_contents_as_numpy(outside, np.float32, [3, Y.shape[2]]), Y[4, :3])
        client.unregister_system_shared_memory()
    finally:
        shm.destroy_shared_memory_region(inside)
        shm.destroy_shared_memory_region(outside)
        client.close()


@pytest.mark.parametrize("package", [grpcclient, httpclient])
def test_errors_are_told(package: Any) -> None:
    client = package.InferenceServerClient(GRPC if package is grpcclient else HTTP)
    with pytest.raises(InferenceServerException, match="must specify the START flag"):
        client.infer("rnn", inputs_of(package, X[0, :1]), sequence_id=999)
    with pytest.raises(InferenceServerException, match="non-zero or non-empty correlation ID"):
        client.infer("rnn", inputs_of(package, X[0, :1]))
    with pytest.raises(InferenceServerException, match="unknown model: 'none'"):
        client.infer("none", inputs_of(package, X[0, :1]), sequence_id=999, sequence_start=True)
    wrong = np.zeros((1, INPUTS + 1), np.float32)
    with pytest.raises(InferenceServerException, match="Expected \\[-1,"):
        client.infer("rnn", inputs_of(package, wrong), sequence_id=999, sequence_start=True)
    client.close()


def test_statistics(grpc_client: Any, http_client: Any) -> None:
    def counted() -> int:
        return int(grpc_client.get_inference_statistics("rnn").model_stats[0].inference_stats.success.count)

    before = counted()
    for start in (True, False):
        grpc_client.infer(
            "rnn", inputs_of(grpcclient, X[0, :1]), sequence_id=71, sequence_start=start, sequence_end=not start
        )
    assert counted() == before + 2
    (found,) = http_client.get_inference_statistics("rnn")["model_stats"]
    assert found["inference_stats"]["success"]["count"] == before + 2
