"""Models out of files, and pipelines, in a real application."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ray.serve.handle import DeploymentHandle

from clients.client import Client, connect
from clients.session import Session
from serve_app.config import load_config
from serve_app.models import registry
from tests.speech import takes

pytestmark = [pytest.mark.serve, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def app(run_app: Callable[..., DeploymentHandle[Any]], repository: Path) -> DeploymentHandle[Any]:
    args = {
        name: yaml.safe_load((repository / f"configs/{name}.yaml").read_text())["applications"][0]["args"]
        for name in ("vad_onnx", "pipeline")
    }
    models = {
        "onnx": args["vad_onnx"]["models"]["silero_vad"],
        "port": {"model": "silero_vad"},
        "pipeline": {"model": args["pipeline"]["model"]},
    }
    return run_app("formats", "/formats", engine={"slots": 8, "max_batch_size": 4}, models=models)


async def every(session: Session) -> dict[str, np.ndarray]:
    found = [outputs.values async for outputs in session.outputs()]
    return {name: np.concatenate([values[name] for values in found]) for name in session.spec.outputs}


async def collect(session: Session) -> np.ndarray:
    (values,) = (await every(session)).values()
    return values


async def test_sileros_onnx_file_equals_the_port(app: DeploymentHandle[Any], http_port: int) -> None:
    """Real speech, more sessions than slots, by handle and by WebSocket, in segments that end anywhere."""
    samples = takes(10, 512 * 50)

    async def one(client: Client, model: str, number: int) -> np.ndarray:
        async with await client.open(model=model) as session:
            reading = asyncio.create_task(collect(session))
            for part in np.split(samples[number], range(1700 + 300 * number, samples.shape[1], 4096)):
                await session.wait(session.submit(part))
        return (await reading).reshape(-1)

    async with connect(app) as handle, connect(f"ws://127.0.0.1:{http_port}/formats") as websocket:
        clients = [handle, websocket]
        found = await asyncio.gather(
            *(one(clients[i % 2], model, i) for model in ("onnx", "port") for i in range(len(samples)))
        )
    onnx, port = np.stack(found[:10]), np.stack(found[10:])
    assert port.shape == (10, 50) and port.min() < 0.1 and port.max() > 0.9
    np.testing.assert_allclose(onnx, port, rtol=0, atol=1e-5)


async def test_three_models_on_one_session(app: DeploymentHandle[Any], http_port: int, repository: Path) -> None:
    """Audio in, and both what is said when and by whom: as the model does it here."""
    args = yaml.safe_load((repository / "configs/pipeline.yaml").read_text())["applications"][0]["args"]
    model = registry.load(load_config(args).model)
    samples = takes(3, 2560 * 20)
    with torch.inference_mode():
        x = torch.from_numpy(samples).view(3, 20, 2560).transpose(0, 1)
        due, _ = model.forward(x, model.initial_state(3))
    assert isinstance(due, dict)

    async def one(client: Client, number: int) -> None:
        async with await client.open(model="pipeline") as session:
            assert session.spec.sample_rate == 16000
            reading = asyncio.create_task(every(session))
            for part in np.array_split(samples[number], 7):
                session.submit(part)
        for name, values in (await reading).items():
            np.testing.assert_allclose(values, due[name][:, number], rtol=1e-4, atol=1e-4)

    async with connect(f"ws://127.0.0.1:{http_port}/formats") as client:
        await asyncio.gather(*(one(client, number) for number in range(3)))
