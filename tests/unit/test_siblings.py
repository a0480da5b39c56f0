"""Several ingresses that clients take for one server: what was told to one, and counted by it. No Ray."""

import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing import shared_memory
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig
from serve_app.ingress.http import build_http
from serve_app.ingress.hub import Hub
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.siblings import Question
from tests.fakes import FloatSumModel
from tests.local import local

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(
    model=ModelConfig("sum"),
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8),
    frame=FrameConfig(answer_within_s=0.2),
)
INFER = "/v2/models/sum/infer"
REGION = "/v2/systemsharedmemory/region/r/"


class Others:
    """See Siblings: the ingresses of a list, but the own one."""

    def __init__(self, all_of_them: "list[InferenceServer]") -> None:
        self.own: InferenceServer | None = None
        self._all = all_of_them

    async def ask(self, question: Question) -> list[Any]:
        """See Siblings; between processes all is pickled."""
        asked: Question = pickle.loads(pickle.dumps(question))
        return [pickle.loads(pickle.dumps(each.tell(asked))) for each in self._all if each is not self.own]


@asynccontextmanager
async def ingresses(count: int) -> AsyncIterator[tuple[list[InferenceServer], list[httpx.AsyncClient]]]:
    """So many, and a client at each."""
    async with local(FloatSumModel(), config=CONFIG, ack_on_receipt=False) as (cluster, first):
        hubs = [first, *(Hub(cluster, ack_on_receipt=False) for _ in range(count - 1))]
        servers: list[InferenceServer] = []
        clients: list[httpx.AsyncClient] = []
        for hub in hubs:
            others = Others(servers)
            others.own = InferenceServer(hub, siblings=others)
            servers.append(others.own)
            transport = httpx.ASGITransport(build_http(hub, others.own))
            clients.append(httpx.AsyncClient(transport=transport, base_url="http://test"))
        try:
            yield servers, clients
        finally:
            for client in clients:
                await client.aclose()
            for hub in hubs[1:]:
                await hub.stop()


def request(sequence: int, tensor: dict[str, Any], **parameters: bool) -> dict[str, Any]:
    named = {"name": "x", "datatype": "FP32", **tensor}
    return {"parameters": {"sequence_id": sequence, **parameters}, "inputs": [named]}


def in_memory(sequence: int) -> dict[str, Any]:
    """Two timesteps of the region `r`; the sequence begins."""
    where = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
    return request(sequence, {"shape": [2, 1], "parameters": where}, sequence_start=True)


async def test_requests_count_wherever_they_came_in() -> None:
    async with ingresses(3) as (_, clients):
        for sequence, client in enumerate([clients[0], clients[0], clients[1]], 1):
            body = request(sequence, {"shape": [2, 1], "data": [1, 2]}, sequence_start=True, sequence_end=True)
            assert (await client.post(INFER, json=body)).status_code == 200
        missing = request(9, {"shape": [1, 1], "data": [1]})
        assert (await clients[2].post(INFER, json=missing)).status_code == 400
        said = [(await client.get("/v2/models/sum/stats")).json()["model_stats"] for client in clients]
        assert said[0] == said[1] == said[2]
        ((counted,), *_) = said
        stats = counted["inference_stats"]
        assert (stats["success"]["count"], stats["fail"]["count"], counted["inference_count"]) == (3, 1, 3)
        parts = sum(stats[part]["ns"] for part in ("queue", "compute_infer", "compute_output"))
        assert 0 < parts == stats["success"]["ns"]


async def test_shared_memory_is_registered_at_all_of_them() -> None:
    memory = shared_memory.SharedMemory(create=True, size=16)
    try:
        memory.buf[:8] = np.array([1, 2], np.float32).tobytes()
        async with ingresses(3) as (_, clients):
            register = {"key": memory.name, "byte_size": 16}
            assert (await clients[0].post(REGION + "register", json=register)).status_code == 200
            for sequence, client in enumerate(clients, 1):
                answer = await client.post(INFER, json=in_memory(sequence))
                assert answer.status_code == 200, answer.text
                assert answer.json()["outputs"][0]["data"] == [1, 3]
                assert [each["key"] for each in (await client.get(REGION + "status")).json()] == [memory.name]
            again = await clients[2].post(REGION + "register", json=register)
            assert (again.status_code, again.json()["error"]) == (
                409,
                "shared memory region 'r' already in manager",
            )
            assert (await clients[1].post(REGION + "unregister")).status_code == 200
            for sequence, client in enumerate(clients, 11):
                assert (await client.post(INFER, json=in_memory(sequence))).status_code == 404
                assert (await client.get(REGION + "status")).status_code == 404
    finally:
        memory.close()
        memory.unlink()


async def test_other_machines_have_regions_of_their_own() -> None:
    memory = shared_memory.SharedMemory(create=True, size=16)
    try:
        async with ingresses(2) as (servers, clients):
            servers[1].memory.identity = "another machine"
            register = {"key": memory.name, "byte_size": 16}
            assert (await clients[0].post(REGION + "register", json=register)).status_code == 200
            missing = await clients[1].post(INFER, json=in_memory(1))
            assert (missing.status_code, missing.json()["error"]) == (404, "Unable to find shared memory region: 'r'")
            assert (await clients[1].post(REGION + "register", json=register)).status_code == 200
            assert (await clients[1].post("/v2/systemsharedmemory/unregister")).status_code == 200
            assert (await clients[0].get(REGION + "status")).status_code == 200
    finally:
        memory.close()
        memory.unlink()


async def test_a_region_that_its_client_has_removed_is_not_found() -> None:
    memory = shared_memory.SharedMemory(create=True, size=16)
    async with ingresses(2) as (servers, clients):
        servers[0].memory.register("r", memory.name, 0, 16)
        memory.close()
        memory.unlink()
        missing = await clients[1].post(INFER, json=in_memory(1))
        assert (missing.status_code, missing.json()["error"]) == (404, "Unable to find shared memory region: 'r'")
