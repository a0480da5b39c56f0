"""The Open Inference Protocol over HTTP, in front of engines in this process: no ports, no Ray."""

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing import shared_memory
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig, SessionConfig
from serve_app.ingress.batched import BatchedModels
from serve_app.ingress.http import build_http
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.oip_http import MAX_JSON
from tests.fakes import FloatSumModel
from tests.local import local
from tests.stateless import LocalModels

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(
    model=ModelConfig("sum"),
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(max_sessions=64, max_segment_timesteps=64, max_window_timesteps=256),
    frame=FrameConfig(answer_within_s=0.2),
)
INFER = "/v2/models/sum/infer"
LENGTH = "inference-header-content-length"


@asynccontextmanager
async def served(batched: BatchedModels | None = None) -> AsyncIterator[httpx.AsyncClient]:
    async with local(FloatSumModel(), config=CONFIG, ack_on_receipt=False) as (_, hub):
        transport = httpx.ASGITransport(build_http(hub, InferenceServer(hub, batched)))
        async with httpx.AsyncClient(transport=transport, base_url="http://lockstep") as client:
            yield client


def body(sequence: int | str = 1, data: Any = (), *, start: bool = False, end: bool = False, **tensor: Any) -> Any:
    return {
        "id": "42",
        "parameters": {"sequence_id": sequence, "sequence_start": start, "sequence_end": end},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [len(data or ()), 1], "data": data, **tensor}],
    }


def totals(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    (output,) = response.json()["outputs"]
    found: list[float] = output["data"]
    return found


async def refused(client: httpx.AsyncClient, path: str, **request: Any) -> tuple[int, str]:
    response = await client.post(path, **request)
    error: str = response.json()["error"]
    return response.status_code, error


async def test_what_the_server_says_of_itself() -> None:
    async with served() as client:
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        for path in ("/v2", "/v2/"):
            assert (await client.get(path)).json()["name"] == "lockstep"
        assert (await client.get("/v2/models/sum/ready")).status_code == 200
        assert (await client.get("/v2/models/sum/versions/2/ready")).status_code == 400
        metadata = (await client.get("/v2/models/sum")).json()
        assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}]
        config = (await client.get("/v2/models/sum/versions/1/config")).json()
        assert config["input"][0]["dims"] == [-1, 1] and "sequence_batching" in config
        missing = await client.get("/v2/models/other")
        assert (missing.status_code, missing.json()["error"]) == (
            404,
            "Request for unknown model: 'other' is not found",
        )
        assert (await client.post("/v2/repository/index", json={})).json()[0]["state"] == "READY"
        assert (await client.get("/v2/trace/setting")).json()["trace_level"] == ["OFF"]
        assert (await client.get("/v2/logging")).json()["log_error"] is True


async def test_a_sequence_in_json() -> None:
    async with served() as client:
        first = await client.post(INFER, json=body("s", [[1], [2]], start=True))
        assert totals(first) == [1, 3]
        assert first.json()["id"] == "42"
        assert first.json()["parameters"]["batch_size"] == 1
        assert totals(await client.post(INFER, json=body("s", [4], end=True))) == [7]
        status, error = await refused(client, INFER, json=body("s", [4]))
        assert (status, "must specify the START flag" in error) == (400, True)


@pytest.mark.parametrize("encoding", ["", "gzip", "deflate"])
async def test_tensors_as_bytes_behind_the_json(encoding: str) -> None:
    x = np.array([1, 2, 3], "<f4")
    request = body(7, start=True, shape=[3, 1], parameters={"binary_data_size": 12})
    del request["inputs"][0]["data"]
    request["outputs"] = [{"name": "total", "parameters": {"binary_data": True}}]
    head = json.dumps(request).encode()
    packed = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[encoding](head + x.tobytes())
    headers = {LENGTH: str(len(head)), "accept-encoding": encoding or "identity"}
    if encoding:
        headers["content-encoding"] = encoding
    async with served() as client:
        response = await client.post(INFER, content=packed, headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers.get("content-encoding", "") == encoding
        length = int(response.headers[LENGTH])
        (output,) = json.loads(response.content[:length])["outputs"]
        assert output["parameters"] == {"binary_data_size": 12} and "data" not in output
        assert np.frombuffer(response.content[length:], "<f4").tolist() == [1, 3, 6]


async def test_all_outputs_as_bytes() -> None:
    async with served() as client:
        request = body(7, [1], start=True)
        request["parameters"]["binary_data_output"] = True
        response = await client.post(INFER, json=request)
        assert np.frombuffer(response.content[int(response.headers[LENGTH]) :], "<f4").tolist() == [1]


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no json": ({"content": b"{"}, 400, "failed to parse the request JSON"),
    "no object": ({"content": b"[]"}, 400, "has to be an object"),
    "deep": ({"content": b"[" * 100_000}, 400, "failed to parse the request JSON"),
    "length": ({"content": b"{}", "headers": {LENGTH: "9"}}, 400, "is 9, the body has 2 bytes"),
    "length is no number": ({"content": b"{}", "headers": {LENGTH: "-1"}}, 400, "is -1"),
    "no gzip": ({"content": b"{}", "headers": {"content-encoding": "gzip"}}, 400, "the body is no gzip"),
    "cut gzip": (
        {"content": gzip.compress(b"{}" * 99)[:-9], "headers": {"content-encoding": "gzip"}},
        400,
        "the body is cut off",
    ),
    "encoding": ({"content": b"{}", "headers": {"content-encoding": "br"}}, 415, "expected gzip or deflate"),
    "inputs": ({"json": {**body(), "inputs": 5}}, 400, "inputs has to be a list"),
    "no data": ({"json": body(1, None, shape=[1, 1])}, 400, "neither data"),
    "shape": ({"json": body(1, [1], shape="1")}, 400, "has no shape"),
    "fewer": ({"json": body(1, [1], shape=[2, 1])}, 400, "has 1 elements, its shape [2, 1] takes 2"),
    "text": ({"json": body(1, ["a"])}, 400, "holds what is no FP32"),
    "ragged": ({"json": body(1, [[1], 2])}, 400, "holds what is no FP32"),
    "binary": ({"json": body(1, [1], parameters={"binary_data_size": 4})}, 400, "0 bytes are left behind the JSON"),
    "behind": (
        {
            "content": json.dumps(body(1, [1])).encode() + b"1234",
            "headers": {LENGTH: str(len(json.dumps(body(1, [1]))))},
        },
        400,
        "4 bytes behind the JSON belong to no input",
    ),
    "id": ({"json": {**body(1, [1]), "id": 5}}, 400, "id is 5, expected a text"),
    "sequence": ({"json": {**body(1, [1]), "parameters": {"sequence_id": 1.5}}}, 400, "sequence_id is 1.5"),
    "json": ({"content": b" " * (MAX_JSON + 1)}, 413, f"the limit is {MAX_JSON}"),
    "many digits": ({"content": b"{}", "headers": {LENGTH: "9" * 5000}}, 400, "is 999"),
    "null": ({"json": body(1, [None])}, 400, "holds what is no FP32"),
    "number as text": ({"json": body(1, ["1.5"])}, 400, "holds what is no FP32"),
    "axes": ({"json": body(1, [], shape=[0, 2**31 - 1, 2**31 - 1])}, 400, "has the shape [0, 2147483647"),
    "list as id": ({"json": {**body(1, [1]), "parameters": {"sequence_id": [1]}}}, 400, "sequence_id is [1]"),
    "huge id": ({"json": {**body(1, [1]), "parameters": {"sequence_id": 10**400}}}, 400, "an integer of 64 bits"),
    "half a character": ({"content": json.dumps(body("\ud800", [1], start=True))}, 400, "sequence_id is '\\ud800'"),
    "long id": ({"json": body("a" * 257, [1], start=True)}, 400, "a string of at most 256 characters"),
    "timeout": (
        {"json": {**body(1, [1]), "parameters": {"sequence_id": 1, "timeout": 10**400}}},
        400,
        "timeout is 1000",
    ),
    "region": ({"json": body(1, [1], parameters={"shared_memory_region": "r"})}, 400, "needs shared_memory_region"),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_input_is_named_and_the_sequence_goes_on(what: str) -> None:
    request, status, expected = BAD[what]
    async with served() as client:
        assert totals(await client.post(INFER, json=body(1, [1], start=True))) == [1]
        found, error = await refused(client, INFER, **request)
        assert found == status, error
        assert expected in error
        assert totals(await client.post(INFER, json=body(1, [1], end=True))) == [2]


async def test_what_is_not_there() -> None:
    async with served() as client:
        assert (await refused(client, "/v2/models/other/infer", json=body(1, [1], start=True)))[0] == 404
        assert (await client.get("/v2/nothing")).status_code == 404


async def test_statistics_have_all_keys() -> None:
    async with served() as client:
        await client.post(INFER, json=body(1, [1], start=True))
        (found,) = (await client.get("/v2/models/sum/stats")).json()["model_stats"]
        keys = {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output"}
        assert found["inference_stats"].keys() == keys | {"cache_hit", "cache_miss"}
        assert found["inference_stats"]["success"]["count"] == 1
        assert (await client.get("/v2/models/stats")).json()["model_stats"] == [found]


async def test_unload_and_load() -> None:
    async with served() as client:
        assert (await client.post("/v2/repository/models/sum/unload", json={})).status_code == 200
        status, error = await refused(client, INFER, json=body(1, [1], start=True))
        assert (status, "is unloaded" in error) == (503, True)
        assert (await client.post("/v2/repository/models/sum/load", json={})).status_code == 200
        assert totals(await client.post(INFER, json=body(1, [1], start=True))) == [1]
        assert (await client.post("/v2/repository/models/no/load", json={})).status_code == 404


async def test_shared_memory() -> None:
    memory = shared_memory.SharedMemory(create=True, size=16)
    try:
        async with served() as client:
            region = "/v2/systemsharedmemory/region/r/"
            made = await client.post(f"{region}register", json={"key": f"/{memory.name}", "byte_size": 16})
            assert made.status_code == 200, made.text
            assert (await client.get("/v2/systemsharedmemory/status")).json()[0]["byte_size"] == 16
            for key in ("a\0b", "\ud800", "none"):
                wanted = json.dumps({"key": key, "byte_size": 1})
                status, error = await refused(client, region.replace("/r/", "/x/register"), content=wanted)
                assert (status, "Unable to open shared memory region" in error) == (400, True)
            assert (
                await client.post(f"{region}register", json={"key": memory.name, "byte_size": 16})
            ).status_code == 409
            memory.buf[:8] = np.array([1, 2], np.float32).tobytes()
            place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
            request = body(1, start=True, shape=[2, 1], parameters=place)
            request["outputs"] = [{"name": "total", "parameters": {**place, "shared_memory_offset": 8}}]
            response = await client.post(INFER, json=request)
            assert response.status_code == 200, response.text
            assert np.frombuffer(bytes(memory.buf[8:16]), np.float32).tolist() == [1, 3]
            assert (await client.post("/v2/systemsharedmemory/unregister")).status_code == 200
            assert (await client.get("/v2/systemsharedmemory/status")).json() == []
            assert (await client.post("/v2/cudasharedmemory/unregister")).status_code == 200
            assert (await client.post("/v2/cudasharedmemory/region/g/register", json={})).status_code == 400
    finally:
        memory.close()
        memory.unlink()


async def test_a_stateless_model() -> None:
    def rows(data: Any, shape: list[int], **tensor: Any) -> Any:
        return {"inputs": [{"name": "ids", "datatype": "INT64", "shape": shape, "data": data, **tensor}]}

    path = "/v2/models/masked/infer"
    async with LocalModels.of(max_batch_size=8) as models, served(models) as client:
        assert (await client.get("/v1/health/ready")).json()["models"] == ["masked", "sum"]
        assert "dynamic_batching" in (await client.get("/v2/models/masked/config")).json()
        response = (await client.post(path, json=rows([[1, 2], [3, 4]], [2, 2]))).json()
        assert {output["name"]: output["data"] for output in response["outputs"]} == {
            "total": [3, 7],
            "sums": [1, 3, 3, 7],
        }
        for request, message in (
            (rows([["a"]], [1, 1]), "holds what is no INT64"),
            (rows([[1, -1]], [1, 2]), "id -1 is out of range"),
            (rows([], [1, 0]), "rows of length 0"),
            (rows([1, 2], [1, 1]), "has 2 elements"),
        ):
            status, error = await refused(client, path, json=request)
            assert (status, message in error) == (400, True), error
        status, _ = await refused(client, "/v2/models/starting/infer", json=rows([[1]], [1, 1]))
        assert status == 503
        status, error = await refused(client, path, json=rows([[666]], [1, 1]))
        assert (status, "a bad row" in error) == (500, True)


async def test_texts_in_json() -> None:
    async with LocalModels.of("Words") as models, served(models) as client:
        tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["one", "fünf"]}
        response = (await client.post("/v2/models/words/infer", json={"inputs": [tensor]})).json()
        assert response["outputs"][0]["data"] == [3, 5]
        for data, message in ((["one", 5], "what is no BYTES: 5"), (["one"], "has 1 elements")):
            status, error = await refused(client, "/v2/models/words/infer", json={"inputs": [{**tensor, "data": data}]})
            assert (status, message in error) == (400, True), error
