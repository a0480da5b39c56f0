"""One application with several models, on a real Ray."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from clients.client import Client, connect
from clients.session import Session
from serve_app.config import ModelConfig
from serve_app.errors import InvalidInput, UnknownModel
from serve_app.models import registry
from serve_app.segment import Segment

pytestmark = [pytest.mark.serve, pytest.mark.timeout(120)]

MODELS: dict[str, dict[str, Any]] = {
    "vad": {"name": "silero_vad"},
    "gru": {"name": "rnn", "cell": "gru", "input": 8, "hidden": 16, "layers": 2},
}


@pytest.fixture(scope="module")
def app(run_app: Callable[..., DeploymentHandle[Any]]) -> DeploymentHandle[Any]:
    models: dict[str, Any] = {name: {"model": model} for name, model in MODELS.items()}
    models["masked"] = {
        "model": "tests.stateless:MaskedSum",
        "batching": {"max_batch_size": 16, "priorities": [{"max_queue_size": 100}, {}]},
        "replicas": 2,
    }
    return run_app("both", "/both", engine={"slots": 8, "max_batch_size": 4}, models=models)


def inputs(model: str, seed: int, n: int) -> np.ndarray:
    shape = {"vad": (n, 512), "gru": (n, 8)}[model]
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def alone(model: str, x: np.ndarray) -> np.ndarray:
    name, *options = MODELS[model].items()
    loaded = registry.load(ModelConfig(name[1], dict(options)))
    with torch.inference_mode():
        y, _ = loaded.forward(torch.from_numpy(x)[:, None], loaded.initial_state(1))
    return y[:, 0].numpy()  # type: ignore[union-attr]


async def collect(session: Session) -> np.ndarray:
    return np.concatenate([next(iter(outputs.values.values())) async for outputs in session.outputs()])


async def test_sessions_on_both_at_once(app: DeploymentHandle[Any], http_port: int) -> None:
    async def one(client: Client, model: str, seed: int) -> None:
        x = inputs(model, seed, 30)
        async with await client.open(model=model) as session:
            assert session.spec.name == model
            reading = asyncio.create_task(collect(session))
            for part in np.array_split(x, 10):
                await session.wait(session.submit(part.ravel() if session.spec.sample_rate else part))
        np.testing.assert_allclose(await reading, alone(model, x), rtol=1e-4, atol=1e-5)

    async with connect(app) as handle, connect(f"ws://127.0.0.1:{http_port}/both") as websocket:
        for client in (handle, websocket):
            assert (await client.models()).keys() == MODELS.keys()
            with pytest.raises(InvalidInput, match="2 models are served here, say which one: gru, vad"):
                await client.open()
            with pytest.raises(UnknownModel, match="'rnn' is not served here: gru, vad"):
                await client.open(model="rnn")
        clients = [handle, websocket]
        await asyncio.gather(*(one(clients[seed % 2], model, seed) for seed in range(12) for model in MODELS))


async def test_the_open_inference_protocol_knows_both(app: DeploymentHandle[Any], http_port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}/both/v2", timeout=30) as http:
        index = (await http.post("/repository/index", json={})).json()
        assert [model["name"] for model in index] == ["gru", "masked", "vad"]
        for model in MODELS:
            x = inputs(model, 1, 3)
            tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
            parameters = {"sequence_id": 1, "sequence_start": True, "sequence_end": True}
            response = await http.post(f"/models/{model}/infer", json={"inputs": [tensor], "parameters": parameters})
            (output,) = response.json()["outputs"]
            expected = alone(model, x)
            np.testing.assert_allclose(np.reshape(output["data"], expected.shape), expected, rtol=1e-4, atol=1e-5)


async def test_plain_handle_calls_go_to_the_model_of_their_deployment(app: DeploymentHandle[Any]) -> None:
    for model in MODELS:
        handle = serve.get_deployment_handle(f"Recurrent-{model}", "both")
        x = inputs(model, 2, 4)
        await handle.open.remote(f"plain {model}")
        outputs = await handle.segment.remote(Segment(f"plain {model}", x, 0))
        np.testing.assert_allclose(next(iter(outputs.values.values())), alone(model, x), rtol=1e-4, atol=1e-5)
        assert await handle.close.remote(f"plain {model}") == 4


def rows(*ids: list[int]) -> dict[str, Any]:
    x = np.array(ids)
    return {"inputs": [{"name": "ids", "datatype": "INT64", "shape": list(x.shape), "data": x.ravel().tolist()}]}


async def test_a_stateless_model_beside_them(app: DeploymentHandle[Any], http_port: int) -> None:
    """By HTTP and by handle, bad requests among good ones, while sessions of the others run."""

    async def session(client: Client, seed: int) -> None:
        x = inputs("gru", seed, 30)
        async with await client.open(model="gru") as session:
            reading = asyncio.create_task(collect(session))
            for part in np.array_split(x, 10):
                await session.wait(session.submit(part))
        np.testing.assert_allclose(await reading, alone("gru", x), rtol=1e-4, atol=1e-5)

    handle = serve.get_deployment_handle("Batched-masked", "both")
    base = f"http://127.0.0.1:{http_port}/both/v2/models/masked"
    async with connect(app) as client, httpx.AsyncClient(timeout=30) as http:

        async def ask(i: int) -> None:
            if i % 10 == 3:
                response = await http.post(f"{base}/infer", json=rows([666, i]))
                assert (response.status_code, "a bad row" in response.json()["error"]) == (500, True)
            elif i % 10 == 4:
                with pytest.raises(InvalidInput, match="id 1000 is out of range"):
                    await handle.infer.remote({"ids": np.array([[1000]])})
            elif i % 2:
                response = await http.post(f"{base}/infer", json=rows([i] * 3, [i + 1] * 3))
                assert response.json()["outputs"][0]["data"] == [3 * i, 3 * i + 3]
            else:
                values = await handle.infer.remote({"ids": np.full((1, i % 7 + 1), i)}, priority=2)
                assert values["total"].tolist() == [i * (i % 7 + 1)]

        assert (await http.get(base)).json()["inputs"][0]["shape"] == [-1, -1]
        await asyncio.gather(*(session(client, seed) for seed in range(6)), *(ask(i) for i in range(100)))
        counted = (await http.get(f"{base}/stats")).json()["model_stats"][0]
        assert counted["inference_count"] == 80 and counted["inference_stats"]["fail"]["count"] == 10
        with pytest.raises(UnknownModel, match="'masked' is not served here: gru, vad"):
            await client.open(model="masked")
