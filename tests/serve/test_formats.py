"""Models out of files in a real application."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ray.serve.handle import DeploymentHandle

from clients.client import Client, connect
from clients.session import Session
from tests.speech import takes

pytestmark = [pytest.mark.serve, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def app(run_app: Callable[..., DeploymentHandle[Any]], repository: Path) -> DeploymentHandle[Any]:
    (configured,) = yaml.safe_load((repository / "configs/vad_onnx.yaml").read_text())["applications"]
    onnx = configured["args"]["models"]["silero_vad"]
    models = {"onnx": onnx, "port": {"model": "silero_vad"}}
    return run_app("formats", "/formats", engine={"slots": 8, "max_batch_size": 4}, models=models)


async def collect(session: Session) -> np.ndarray:
    return np.concatenate([next(iter(outputs.values.values())) async for outputs in session.outputs()])


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
