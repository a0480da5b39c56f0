"""Models are loaded and unloaded while others serve, on a real Ray."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from ray.serve.handle import DeploymentHandle

from clients.client import connect
from serve_app.deployments.serve_models import ServeModels
from serve_app.deployments.transport import RayDirectory
from serve_app.errors import Unavailable
from tests.files import expected, save_onnx
from tests.speech import takes

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "cell.onnx"
    save_onnx(path)
    return path


@pytest.fixture(scope="module")
def run(run_app: Callable[..., DeploymentHandle[Any]], file: Path) -> Callable[[], DeploymentHandle[Any]]:
    """Deploys the application (again)."""
    cell = {
        "name": "file", "path": str(file), "state": [{"name": "h", "next": "h_next"}], "constants": {"scale": 2},
    }  # fmt: skip
    models = {
        "vad": {"model": "silero_vad", "versions": {2: None}},
        "cell": {"model": cell, "replicas": 2},
        "masked": {"model": "tests.stateless:MaskedSum", "versions": {
            1: {"batching": {"max_batch_size": 4}}, 2: {"batching": {"max_batch_size": 2}}
        }},
    }  # fmt: skip
    return partial(run_app, "swap", "/swap", models=models, engine={"slots": 8}, ingress_replicas=2)


@pytest.fixture(scope="module")
def app(run: Callable[[], DeploymentHandle[Any]]) -> DeploymentHandle[Any]:
    return run()


class Repository:
    """The part of the Open Inference Protocol that loads and unloads."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def state(self, model: str) -> str:
        """Of all its versions, or of one: NAME@VERSION."""
        index = (await self.http.post("/repository/index", json={})).json()
        found = {each["state"] for each in index if model in (each["name"], f"{each['name']}@{each['version']}")}
        return "/".join(sorted(found))

    async def post(self, what: str, model: str) -> httpx.Response:
        return await self.http.post(f"/repository/models/{model}/{what}", json={})

    async def rows(self, version: str = "") -> tuple[int, str | None]:
        """The status of a request to `masked`, and the version that has answered."""
        tensor = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [3, 4]}
        path = f"/models/masked{version and '/versions/'}{version}/infer"
        response = await self.http.post(path, json={"inputs": [tensor]})
        return response.status_code, response.json().get("model_version")

    async def answers(self, expected: tuple[int, str | None]) -> bool:
        """Whether each way in gives that; for a moment one may not know what another has loaded, or what has started.

        HAProxy turns from one to the other.
        """
        return {await self.rows() for _ in range(6)} == {expected}


@pytest.fixture
async def repository(app: DeploymentHandle[Any], http_port: int) -> AsyncIterator[Repository]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}/swap/v2", timeout=60) as http:
        yield Repository(http)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 60
    while not await holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


def owners() -> list[psutil.Process]:
    """Processes of this machine with a replica of `cell`."""
    return [p for p in psutil.process_iter(["cmdline"]) if "Recurrent-cell" in " ".join(p.info["cmdline"] or ())]


async def test_models_come_and_go_beside_one_that_serves(
    app: DeploymentHandle[Any], repository: Repository, file: Path
) -> None:
    """Sessions of `vad` have every output, each once. One of `cell` that is open when it is unloaded goes on."""
    stopping, x, whole = asyncio.Event(), takes(4, 512 * 40), whole_of(file)

    async with connect(app) as client:

        async def speak(number: int) -> list[np.ndarray]:
            """Session after session, at about four times the speed of life."""
            found = []
            while not stopping.is_set() or not found:
                async with await client.open(model="vad") as session:
                    for part in np.split(x[number], 10):
                        await session.wait(session.submit(part))
                        await asyncio.sleep(0.03)
                    await session.close()
                    found.append(np.concatenate([o.values["probability"] async for o in session.outputs()]))
            return found

        async def gone() -> bool:
            return [await repository.state(model) for model in ("cell", "masked")] == ["UNAVAILABLE"] * 2

        speaking = [asyncio.create_task(speak(number)) for number in range(4)]
        await until(partial(repository.answers, (200, "2")))
        assert len(owners()) == 2
        async with await client.open(model="cell") as session:
            steps = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))
            await session.wait(session.submit(steps[:2, 0].numpy()))
            for model in ("cell", "masked"):
                assert (await repository.post("unload", model)).status_code == 200
            assert await repository.state("cell") == "UNLOADING"
            with pytest.raises(Unavailable, match="model 'cell' is unloaded: load it"):
                await client.open(model="cell")
            await until(partial(repository.answers, (503, None)))
            await session.wait(session.submit(steps[2:, 0].numpy()))  # and its model stays as long
            assert len(owners()) == 2
            await session.close()
            y = np.concatenate([o.values["y"] async for o in session.outputs()])
        np.testing.assert_allclose(y, expected(steps)[:, 0], rtol=1e-5, atol=1e-5)
        await until(gone)
        assert owners() == [], "its memory is back"
        damage(file)
        response = await repository.post("load", "cell")
        assert (response.status_code, "or is damaged" in response.json()["error"]) == (503, True)
        assert await repository.state("cell") == "UNAVAILABLE"
        damage(file, whole)
        for model in ("cell", "masked"):
            response = await repository.post("load", model)
            assert response.status_code == 200, response.text
            assert await repository.state(model) == "READY"
        await until(partial(repository.answers, (200, "2")))
        assert len(owners()) == 2
        async with await client.open(model="cell") as session:
            await session.wait(session.submit(steps[:, 0].numpy()))
            await session.close()
            y = np.concatenate([o.values["y"] async for o in session.outputs()])
        np.testing.assert_allclose(y, expected(steps)[:, 0], rtol=1e-5, atol=1e-5)
        stopping.set()
        for found in await asyncio.gather(*speaking):
            for each in found:
                assert each.shape == (40,)
                np.testing.assert_allclose(each, found[0], rtol=0, atol=1e-5)


async def test_versions_come_and_go_beside_each_other(app: DeploymentHandle[Any], repository: Repository) -> None:
    """Who names none has the newest that is loaded. No way in asks a version that is gone: that would wait for it."""
    stopping = asyncio.Event()

    async def is_gone() -> bool:
        return await repository.state("masked@2") == "UNAVAILABLE"

    async def ask() -> set[tuple[int, str | None]]:
        found = set()
        while not stopping.is_set():
            async with asyncio.timeout(20):
                found.add(await repository.rows("2"))
            await asyncio.sleep(0.01)
        return found

    assert [await repository.rows(version) for version in ("", "1", "2")] == [(200, "2"), (200, "1"), (200, "2")]
    asking = [asyncio.create_task(ask()) for _ in range(4)]
    await repository.post("unload", "masked@2")
    await until(is_gone)
    stopping.set()
    assert set.union(*await asyncio.gather(*asking)) == {(200, "2"), (503, None)}
    assert [await repository.rows(version) for version in ("", "1", "2")] == [(200, "1"), (200, "1"), (503, None)]
    assert (await repository.post("load", "masked@2")).status_code == 200
    await until(partial(repository.answers, (200, "2")))
    async with connect(app) as client:
        assert {"vad@2", "cell"} == {*await client.models()}
        for model in ("vad", "vad@2"):
            async with await client.open(model=model) as session:
                assert session.spec.name == "vad@2"


async def test_what_one_way_in_unloads_another_may_load_before_it_is_empty(app: DeploymentHandle[Any]) -> None:
    one, other = (ServeModels("swap", RayDirectory("swap"), {"vad@2": "Recurrent-vad@2"}) for _ in range(2))
    async with connect(app) as client, await client.open(model="vad") as session:
        await one.unload("vad@2")
        await other.load("vad@2")
        await one._emptying["vad@2"]  # gives up, though the session never ends
        assert await other.unloaded() == {}
        await session.wait(session.submit(np.zeros(512, np.float32)))


async def test_a_model_that_is_deployed_anew_is_loaded(
    app: DeploymentHandle[Any], run: Callable[[], DeploymentHandle[Any]], repository: Repository
) -> None:
    async def is_state(state: str) -> bool:
        return await repository.state("cell") == state

    await repository.post("unload", "cell")
    await until(partial(is_state, "UNAVAILABLE"))
    await asyncio.to_thread(run)
    await until(partial(is_state, "READY"))
    async with connect(app) as client, await client.open(model="cell") as session:
        await session.wait(session.submit(np.zeros((1, 4), np.float32)))


def whole_of(file: Path) -> bytes:
    return file.read_bytes()


def damage(file: Path, content: bytes | None = None) -> None:
    """Cut the file, or write it again."""
    file.write_bytes(file.read_bytes()[:100] if content is None else content)
