"""Versions of a model side by side: configured, placed, and known to whoever asks, in this process."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import pytest
import torch
import yaml

from clients.client import Client, connect
from serve_app.config import AppConfig, load_models
from serve_app.directory import Claim, Directory
from serve_app.errors import ConfigError, InvalidInput, StateLost, Unavailable, UnknownModel
from serve_app.ingress import oip
from serve_app.ingress.http import build_http
from serve_app.ingress.hub import Hub
from serve_app.ingress.model_control import Marks
from serve_app.ingress.oip import InferenceServer, Input
from serve_app.ingress.oip_grpc import InferenceService
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc
from serve_app.rows import BatchedSpec, RowsRequest, RowsResult
from tests.fakes import FloatSumModel
from tests.local import LocalCluster, local
from tests.stateless import LocalModels
from tests.unit.test_directory import owner
from tests.unit.test_oip_grpc import CONFIG, infer, outputs_of, refused, rows, totals

# Configuration.

VERSIONS = """
engine: {slots: 64}
models:
  vad:
    model: silero_vad
    replicas: 2
    versions:
      1:
      10: {engine: {slots: 32}}
      2: {model: {sample_rate: 8000}, replicas: 1}
  rnn:
"""
FLAT = {
    "engine.slots": "64",
    "models.vad.model": "silero_vad",
    "models.vad.replicas": "2",
    "models.vad.versions.1": None,
    "models.vad.versions.10.engine.slots": "32",
    "models.vad.versions.2.model.sample_rate": "8000",
    "models.vad.versions.2.replicas": "1",
    "models.rnn": None,
}


def test_each_version_has_a_tree_of_its_own_over_that_of_its_model() -> None:
    models = load_models(yaml.safe_load(VERSIONS))
    assert models == load_models(FLAT)
    assert list(models) == ["vad@1", "vad@10", "vad@2", "rnn"]
    assert [config.model.name for config in models.values()] == ["silero_vad"] * 3 + ["rnn"]
    assert [config.model.options.get("sample_rate") for config in models.values()] == [16000, 16000, 8000, None]
    assert [config.engine.slots for config in models.values()] == [64, 32, 64, 64]
    assert [config.replicas for config in models.values()] == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"vad": {"versions": {}}}, ["models.vad.versions is {}", "models.vad.versions.1"]),
        ({"vad": {"versions": [1]}}, ["models.vad.versions is [1]", "a section for each"]),
        ({"rnn": {"versions": {0: None}}}, ["models.rnn.versions has '0'", "a whole number from 1 on"]),
        ({"rnn": {"versions": {"v2": None}}}, ["models.rnn.versions has 'v2'", "a whole number from 1 on"]),
        ({"rnn": {"versions": {1: 3}}}, ["models.rnn.versions.1: it is 3", "expected a section"]),
        ({"rnn": {"versions": {1: {"engine": {"slot": 1}}}}}, ["models.rnn.versions.1: engine.slot is not"]),
        ({"rnn": {"versions": {1: {"durability": {}}}}}, ["models.rnn.versions.1: durability is the same"]),
        ({"rnn": {"grpc": {}, "versions": {1: None}}}, ["models.rnn: grpc is the same", "move it to the top"]),
        ({"rnn": {"versions": {1: {"versions": {}}}}}, ["models.rnn.versions.1: versions is not"]),
        ({"vda": {"versions": {2: None}}}, ["models.vda.versions.2: model=vda is not known"]),
    ],
    ids=str,
)
def test_an_error_names_the_version(models: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_models({"models": models})
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message


# Placement.


@pytest.fixture
def directory() -> Directory:
    """Owners `new` (version 10), `old` (2) and `other`."""
    directory, models = Directory(1), ("sum@2", "sum@10", "other")
    for name, model in (("old", "sum@2"), ("new", "sum@10"), ("other", "other")):
        directory.register(owner(name, model=model, models=models, fingerprint=name))
    return directory


def place(directory: Directory, model: str | None, **ask: Any) -> str:
    """The owner of a new session, which is given back."""
    grant = directory.open("s", "sender", model, **ask)
    directory.release("s", grant.epoch)
    return grant.owner.name


def test_who_names_no_version_is_placed_at_the_newest_that_can_be_asked(directory: Directory) -> None:
    assert [place(directory, model) for model in ("sum", "sum@2", "sum@10")] == ["new", "old", "new"]
    directory.unload("sum@10")
    assert place(directory, "sum") == "old"
    with pytest.raises(Unavailable, match="model 'sum@10' is unloaded: load it"):
        place(directory, "sum@10")
    directory.unload("sum@2")
    for _ in range(2):
        with pytest.raises(Unavailable, match=r"model 'sum(@10)?' is unloaded: load it"):
            place(directory, "sum")
        directory.unregister("new")
        directory.unregister("old")
    directory.load("sum@2")
    directory.register(owner("old", model="sum@2"))
    assert place(directory, "sum") == "old"


def test_a_version_whose_replicas_are_gone_leaves_its_sessions_to_the_other(directory: Directory) -> None:
    directory.unregister("new")
    assert place(directory, "sum") == "old"
    with pytest.raises(Unavailable, match="no replica of model 'sum@10' is ready"):
        place(directory, "sum@10")


def test_a_state_goes_to_the_version_that_it_is_of(directory: Directory) -> None:
    assert place(directory, "sum", claim=Claim(0, "old")) == "old"
    directory.unload("sum@2")
    assert place(directory, "sum", claim=Claim(1, "old")) == "old", "what runs goes on"
    with pytest.raises(StateLost, match="fingerprint gone, the one that is served has new, old"):
        place(directory, "sum", claim=Claim(0, "gone"))
    with pytest.raises(StateLost, match="'sum@10' with fingerprint old"):
        place(directory, "sum@10", claim=Claim(0, "old"))


def test_names_that_are_none_of_its_versions(directory: Directory) -> None:
    for model in ("sum@3", "sum@", "su", "other@1"):
        with pytest.raises(UnknownModel, match=f"model '{model}' is not served here: other, sum@10, sum@2"):
            directory.open("s", "sender", model)
    with pytest.raises(InvalidInput, match="2 models are served here, say which one"):
        directory.open("s", "sender")
    directory = Directory(1)
    for name in ("sum@2", "sum@10"):
        directory.register(owner(name, model=name))
    assert place(directory, None) == "sum@10", "one model needs no name"


# Ways in.


class Tenfold(FloatSumModel):
    """Version 2: ten times what version 1 gives."""

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = super().forward(x, state)
        return 10 * y, state


class Control(Marks):
    """The directory knows it too, as on Ray."""

    def __init__(self, directory: Directory) -> None:
        super().__init__(["sum@1", "sum@2"])
        self._directory = directory
        self.fails = False

    async def unloaded(self) -> Mapping[str, bool]:
        if self.fails:
            self.fails = False
            raise OSError("of no kind that anybody knows")
        return await super().unloaded()

    async def load(self, model: str) -> None:
        await super().load(model)
        self._directory.load(model)

    async def unload(self, model: str) -> None:
        await super().unload(model)
        self._directory.unload(model)


class TwoVersions:
    """Two of a stateless model, version 2 with fewer rows a request (see ingress.batched.BatchedModels)."""

    def __init__(self, old: LocalModels, new: LocalModels) -> None:
        self._models = {"masked@1": old, "masked@2": new}

    def specs(self) -> dict[str, BatchedSpec | None]:
        return {name: replace(models.batcher.spec, name=name) for name, models in self._models.items()}

    async def infer(self, model: str, request: RowsRequest) -> RowsResult:
        return await self._models[model].infer("masked", request)


class System(NamedTuple):
    """Versions 1 and 2 of `sum`, by gRPC, HTTP, and a client of ours."""

    cluster: LocalCluster
    hub: Hub
    stub: Any
    http: httpx.AsyncClient
    client: Client


def version(number: int) -> AppConfig:
    return replace(CONFIG, model=replace(CONFIG.model, served_as=f"sum@{number}"))


@asynccontextmanager
async def served(batched: TwoVersions | None = None) -> AsyncIterator[System]:
    async with local(FloatSumModel(), config=version(1), ack_on_receipt=False) as (cluster, hub):
        cluster.add(Tenfold(), version(2))
        service = InferenceService()
        service.inference = InferenceServer(hub, batched, Control(cluster.directory))
        server = service.server()
        port = await server.start("127.0.0.1", 0)
        app = httpx.ASGITransport(build_http(hub, service.inference))
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            httpx.AsyncClient(transport=app, base_url="http://lockstep") as http,
            connect(f"grpc://127.0.0.1:{port}") as client,
        ):
            try:
                yield System(cluster, hub, oip_pb2_grpc.GRPCInferenceServiceStub(channel), http, client)
            finally:
                server.stop()


async def answer(sut: System, *args: Any, asked: str = "", **changes: Any) -> tuple[str, list[float]]:
    """The version that a call was answered by, and with what."""
    response = await sut.stub.ModelInfer(infer(*args, model_version=asked, **changes))
    return response.model_version, totals(response)


def masked(ids: Any, asked: str = "") -> pb.ModelInferRequest:
    request = rows(ids)
    request.model_version = asked
    return request


async def load(sut: System, what: str, model: str) -> None:
    await getattr(sut.stub, f"RepositoryModel{what}")(getattr(pb, f"RepositoryModel{what}Request")(model_name=model))


async def test_each_version_is_asked_by_its_number_and_the_newest_by_none() -> None:
    async with served() as sut:
        assert await answer(sut, "a", [1], start=True) == ("2", [10])
        assert await answer(sut, "a", [1], start=True, asked="1") == ("1", [1])
        assert await answer(sut, "b", [1], start=True, asked="2") == ("2", [10])
        assert await answer(sut, "a", [1]) == ("2", [20])
        assert await answer(sut, "a", [1], asked="1") == ("1", [2])
        assert await answer(sut, "c", [1], start=True, model_name="sum@1") == ("1", [1])
        assert await refused(sut.stub.ModelInfer(infer("d", [1], start=True, model_version="3"))) == (
            "NOT_FOUND", "Request for unknown model: 'sum' version 3 is not found"
        )  # fmt: skip
        stream = sut.stub.ModelStreamInfer()
        asks = [("sum", ""), ("sum", "1"), ("sum@2", ""), ("sum", "2"), ("sum@1", "")]
        for sequence in range(1, 4):  # from the second on in forms that are known
            for model, asked in asks:
                await stream.write(infer(sequence, [1], start=True, end=True, model_name=model, model_version=asked))
                response = (await stream.read()).infer_response
                number = asked or (model.partition("@")[2] or "2")
                assert (response.model_name, response.model_version) == (model, number)
                assert totals(response) == [1 if number == "1" else 10]
        stream.cancel()


async def test_what_is_said_of_each_version() -> None:
    async with served() as sut:
        assert [*(await sut.stub.ModelMetadata(pb.ModelMetadataRequest(name="sum"))).versions] == ["1", "2"]
        for asked, ready in (("", True), ("1", True), ("2", True), ("3", False)):
            assert (await sut.stub.ModelReady(pb.ModelReadyRequest(name="sum", version=asked))).ready == ready
        index = (await sut.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
        assert [(each.name, each.version, each.state) for each in index] == [
            ("sum", "1", "READY"), ("sum", "2", "READY")
        ]  # fmt: skip
        await answer(sut, "a", [1, 1], start=True, asked="1")
        for _ in range(2):
            await answer(sut, "b", [1], start=True, end=True)
        for asked, expected in (("", {"1": 1, "2": 2}), ("1", {"1": 1}), ("2", {"2": 2})):
            request = pb.ModelStatisticsRequest(name="sum", version=asked)
            found = (await sut.stub.ModelStatistics(request)).model_stats
            assert {each.version: each.inference_count for each in found} == expected
            assert {each.version: each.session_stats.opened for each in found} == expected
            assert {each.name for each in found} == {"sum"}
        code, _ = await refused(sut.stub.ModelStatistics(pb.ModelStatisticsRequest(name="sum", version="3")))
        assert code == "NOT_FOUND"


async def test_a_sequence_stays_where_it_began_while_versions_come_and_go() -> None:
    async with served() as sut:
        assert await answer(sut, "a", [1], start=True) == ("2", [10])
        await load(sut, "Unload", "sum@2")
        assert await answer(sut, "a", [1]) == ("2", [20])
        assert await answer(sut, "b", [1], start=True) == ("1", [1])
        code, text = await refused(sut.stub.ModelInfer(infer("c", [1], start=True, model_version="2")))
        assert (code, "is unloaded: load it" in text) == ("UNAVAILABLE", True)
        assert (await sut.stub.ModelReady(pb.ModelReadyRequest(name="sum"))).ready
        assert not (await sut.stub.ModelReady(pb.ModelReadyRequest(name="sum", version="2"))).ready
        await load(sut, "Load", "sum@2")
        assert await answer(sut, "b", [1]) == ("1", [2])
        assert await answer(sut, "c", [1], start=True) == ("2", [10])
        await load(sut, "Unload", "sum")
        assert [await answer(sut, each, [1]) for each in "abc"] == [("2", [30]), ("1", [3]), ("2", [20])]
        for asked in ("", "1", "2"):
            code, _ = await refused(sut.stub.ModelInfer(infer("d", [1], start=True, model_version=asked)))
            assert code == "UNAVAILABLE"
            assert not (await sut.stub.ModelReady(pb.ModelReadyRequest(name="sum", version=asked))).ready
        await load(sut, "Load", "sum")
        assert await answer(sut, "d", [1], start=True) == ("2", [10])
        assert await answer(sut, "b", [1]) == ("1", [4])  # in the form of others that version 2 has answered
        code, _ = await refused(sut.stub.ModelInfer(infer("e", [1], start=True, model_name="sum@2", model_version="1")))
        assert code == "NOT_FOUND"
        for what in ("Load", "Unload"):
            for name in ("sum@3", "su"):
                with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
                    await load(sut, what, name)


async def test_sequences_go_on_while_the_directory_knows_no_replica_of_theirs() -> None:
    """As when it has just started again; others have looked which models there are meanwhile."""
    async with served() as sut:
        assert await answer(sut, "a", [1], start=True) == ("2", [10])
        sut.cluster.directory.unregister("owner-1")
        assert not (await sut.stub.ModelReady(pb.ModelReadyRequest(name="sum", version="2"))).ready
        assert await answer(sut, "a", [1]) == ("2", [20])
        assert await answer(sut, "b", [1], start=True) == ("1", [1])


class Renamed(FloatSumModel):
    """Another version's output has another name."""

    outputs = {"sum": FloatSumModel.outputs["total"]}


async def test_versions_of_unequal_outputs_harm_nobody_else() -> None:
    """A sequence without a version goes on at the old one; what it gets of the new one's outputs is an error."""
    async with served() as sut:
        bystander = await sut.client.open(model="sum@1")
        await load(sut, "Unload", "sum@2")
        assert await answer(sut, "a", [1], start=True) == ("1", [1])
        sut.cluster.add(Renamed(), version(3))
        await sut.stub.RepositoryIndex(pb.RepositoryIndexRequest())
        code, text = await refused(sut.stub.ModelInfer(infer("a", [1])))
        assert (code, "version 1 has no output 'sum'" in text) == ("INVALID_ARGUMENT", True)
        response = await sut.stub.ModelInfer(infer("b", [1], start=True))
        assert (response.model_version, response.outputs[0].name) == ("3", "sum")
        await bystander.wait(bystander.submit(np.ones((1, 1), np.float32)))


async def test_versions_in_paths() -> None:
    async with served() as sut:
        for path, number, factor in (("", "2", 10), ("/versions/1", "1", 1), ("/versions/2", "2", 10)):
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}
            parameters = {"sequence_id": 1, "sequence_start": True, "sequence_end": True}
            body = {"inputs": [tensor], "parameters": parameters}
            found = (await sut.http.post(f"/v2/models/sum{path}/infer", json=body)).json()
            assert (found["model_name"], found["model_version"]) == ("sum", number)
            assert found["outputs"][0]["data"] == [factor]
            stats = (await sut.http.get(f"/v2/models/sum{path}/stats")).json()["model_stats"]
            assert [each["version"] for each in stats] == ([number] if path else ["2", "1"])
            assert (await sut.http.get(f"/v2/models/sum{path}/ready")).status_code == 200
        assert (await sut.http.get("/v2/models/sum")).json()["versions"] == ["1", "2"]
        assert (await sut.http.get("/v2/models/sum/versions/3")).status_code == 404
        assert (await sut.http.post("/v2/repository/models/sum@2/unload", json={})).status_code == 200
        assert (await sut.http.get("/v2/models/sum/versions/2/ready")).status_code == 400
        assert (await sut.http.get("/v1/health/ready")).json()["models"] == ["sum"]
        session = (await sut.http.post("/v1/sessions", json={"model": "sum"})).json()
        assert session["model"] == "sum@1"


async def test_a_client_of_ours_names_versions() -> None:
    async with served() as sut:
        assert [*await sut.client.models()] == ["sum@1", "sum@2"]
        for model, factor in ((None, 10), ("sum", 10), ("sum@1", 1), ("sum@2", 10)):
            async with await sut.client.open(model=model) as session:
                await session.wait(session.submit(np.ones((1, 1), np.float32)))
                await session.close()
                assert [outputs.values["total"].item() async for outputs in session.outputs()] == [factor]


async def test_versions_of_a_stateless_model() -> None:
    async with (
        LocalModels.of(max_batch_size=8) as old,
        LocalModels.of(max_batch_size=2) as new,
        served(TwoVersions(old, new)) as sut,
    ):
        for asked, number in (("", "2"), ("1", "1"), ("2", "2")):
            response = await sut.stub.ModelInfer(masked([[3, 4]], asked))
            assert (response.model_version, outputs_of(response)["total"]) == (number, [7])
        code, text = await refused(sut.stub.ModelInfer(masked([[1]] * 3)))
        assert (code, "model 'masked@2' takes 1 to 2" in text) == ("INVALID_ARGUMENT", True)
        await sut.stub.ModelInfer(masked([[1]] * 3, "1"))
        statistics = (await sut.stub.ModelStatistics(pb.ModelStatisticsRequest(name="masked"))).model_stats
        assert {each.version: each.inference_count for each in statistics} == {"1": 4, "2": 2}
        config = (await sut.stub.ModelConfig(pb.ModelConfigRequest(name="masked", version="1"))).config
        assert (config.name, config.max_batch_size) == ("masked", 8)


async def test_a_way_in_learns_what_another_has_unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it could not look once."""
    monkeypatch.setattr(oip, "WATCH_S", 0.01)
    async with local(FloatSumModel(), config=version(1), ack_on_receipt=False) as (cluster, hub):
        cluster.add(Tenfold(), version(2))
        control = Control(cluster.directory)
        server, other = InferenceServer(hub, None, control), InferenceServer(hub, None, control)
        start = {"sequence_id": 1, "sequence_start": True}
        ask = partial(server.read, "sum", "", "", start, [Input("x", "FP32", [1, 1], [1.0])], {})
        await server.look()
        assert ask().spec.name == "sum@2"
        await other.unload("sum@2")
        control.fails = True
        watching = asyncio.create_task(server.watch())
        async with asyncio.timeout(5):
            while ask().spec.name != "sum@1":
                await asyncio.sleep(0.01)
        watching.cancel()
