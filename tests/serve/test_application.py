"""The application on a real Ray: handle client, plain handle calls, failures, the dashboard's metrics."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
import ray
import torch
from ray import serve
from ray.serve._private.common import DeploymentID, RequestMetadata
from ray.serve._private.constants import SERVE_CONTROLLER_NAME
from ray.serve.handle import DeploymentHandle

from clients.blocking import BlockingClient
from clients.client import Client, connect
from clients.session import Session
from serve_app.deployments.transport import SERVE_NAMESPACE
from serve_app.errors import (
    InvalidInput,
    SessionEnded,
    StateLost,
    StepFailed,
    TooManySessions,
    Unavailable,
    UnknownModel,
    WindowFull,
)
from serve_app.ingress.outbox import Outbox
from serve_app.models.options import RnnOptions
from serve_app.models.rnn import Rnn
from serve_app.segment import Segment
from serve_app.session import Session as Line

pytestmark = [pytest.mark.serve, pytest.mark.timeout(120)]

MODEL = {"name": "rnn", "input": 8, "hidden": 16, "layers": 2, "seed": 3}
SMALL = {"slots": 8, "max_batch_size": 4}


@pytest.fixture(scope="module")
def app(run_app: Callable[..., DeploymentHandle[Any]]) -> DeploymentHandle[Any]:
    """Two replicas with few slots, so that sessions move between them and host memory."""
    return run_app(
        "lstm",
        "/lstm",
        model=MODEL,
        engine=SMALL,
        replicas=2,
        session={"max_window_timesteps": 256, "max_segment_timesteps": 64},
    )


@pytest.fixture(scope="module")
def others(run_app: Callable[..., DeploymentHandle[Any]]) -> DeploymentHandle[Any]:
    """Three models: that of `app`, without checkpoints; one with other weights; one of these tests."""
    models = {
        "brief": {"model": MODEL, "session": {"checkpoint_timesteps": 0}},
        "other": {"model": {**MODEL, "seed": 4}},
        "picky": {"model": {"name": "tests.serve.models:Picky", "limit": 10}},
    }
    return run_app("others", models=models, engine=SMALL)


def alone(x: np.ndarray) -> np.ndarray:
    model = Rnn(RnnOptions(input=8, hidden=16, layers=2, seed=3))
    with torch.inference_mode():
        y, _ = model(torch.from_numpy(x)[:, None], model.initial_state(1))
    return y[:, 0].numpy()


def noise(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 8), np.float32)


async def collect(session: Session) -> np.ndarray:
    return np.concatenate([outputs.values["y"] async for outputs in session.outputs()])


async def test_sessions_over_two_replicas_equal_alone(app: DeploymentHandle[Any]) -> None:
    async with connect(app) as client:

        async def one(seed: int) -> None:
            rng, x, at = random.Random(seed), noise(seed, 100), 0
            async with await client.open(f"session {seed}") as session:
                reading = asyncio.create_task(collect(session))
                while at < len(x):
                    end = min(len(x), at + rng.randint(1, 30))
                    assert session.submit(x[at:end]) == end
                    at = end
                    if rng.random() < 0.3:
                        await session.wait(end)
            np.testing.assert_allclose(await reading, alone(x), rtol=1e-5, atol=1e-5)

        await asyncio.gather(*(one(seed) for seed in range(48)))


async def test_bad_input_is_refused_where_it_is_submitted(app: DeploymentHandle[Any]) -> None:
    async with connect(app) as client:
        with pytest.raises(UnknownModel, match="'bert' is not served here: rnn"):
            await client.open(model="bert")
        async with await client.open() as session:
            for x, message in (
                (np.zeros((1, 9), np.float32), "shape"),
                (np.zeros((1, 8)), "float64"),
                (noise(0, 0), "empty"),
                (noise(0, 65), "limit is 64"),
                (np.full((1, 8), np.nan, np.float32), "NaN"),
            ):
                with pytest.raises(InvalidInput, match=message):
                    session.submit(x)
            for _ in range(4):
                session.submit(noise(0, 64))
            with pytest.raises(WindowFull, match="limit is 256"):
                session.submit(noise(0, 1))


async def test_plain_handle_calls_reach_the_session_from_any_replica(app: DeploymentHandle[Any]) -> None:
    handle = serve.get_deployment_handle("Recurrent", "lstm")
    x = {f"plain {i}": noise(i, 6) for i in range(8)}
    for name in x:
        assert await handle.open.remote(name) == name
    for at in (0, 2, 4):
        results = await asyncio.gather(*(handle.segment.remote(Segment(name, x[name][at : at + 2], at)) for name in x))
        for name, outputs in zip(x, results, strict=True):
            assert outputs.start == at
            np.testing.assert_allclose(outputs.values["y"], alone(x[name])[at : at + 2], rtol=1e-5, atol=1e-5)
    ahead = [handle.segment.remote(Segment("plain 0", x["plain 0"][4:], 4)) for _ in range(4)]  # resends
    assert [(await each).end for each in ahead] == [6] * 4
    again = await handle.segment.remote(Segment("plain 0", x["plain 0"][4:], 4))
    np.testing.assert_allclose(again.values["y"], alone(x["plain 0"])[4:], rtol=1e-5, atol=1e-5)
    assert await asyncio.gather(*(handle.close.remote(name) for name in x)) == [6] * len(x)
    with pytest.raises(Exception, match=r"has ended|is not open") as caught:
        await handle.segment.remote(Segment("plain 0", x["plain 0"][:1]))
    assert "plain 0" in str(caught.value)


def test_blocking_client(app: DeploymentHandle[Any]) -> None:
    with BlockingClient(app, timeout_s=30) as client:
        assert list(client.models()) == ["rnn"]
        with client.open() as session:
            assert session.submit(noise(1, 5)) == 5
            assert session.wait(5) == session.progress == 5
            assert session.submit(noise(1, 10)[5:]) == 10
        values = np.concatenate([outputs.values["y"] for outputs in session.outputs()])
        np.testing.assert_allclose(values, alone(noise(1, 10)), rtol=1e-5, atol=1e-5)
        with pytest.raises(SessionEnded):
            session.submit(noise(1, 1))


async def test_a_client_that_leaves_costs_the_others_nothing(app: DeploymentHandle[Any]) -> None:
    async with connect(app) as stays, connect(app) as leaves:
        x = noise(5, 200)
        sessions = [await stays.open() for _ in range(8)]
        gone = [await leaves.open() for _ in range(8)]
        for at in range(0, 200, 50):
            for session in (*sessions, *gone):
                session.submit(x[at : at + 50])
            if at == 50:
                await leaves.stop()
                gone = []
        for session in sessions:
            await session.close()
            np.testing.assert_allclose(await collect(session), alone(x), rtol=1e-5, atol=1e-5)


async def test_websocket_clients_that_vanish_cost_the_others_nothing(
    app: DeploymentHandle[Any], http_port: int
) -> None:
    """Through Serve's own proxy, with the segments of those who stay in the same frames."""
    x = noise(6, 120)
    async with connect(f"ws://127.0.0.1:{http_port}/lstm") as stays:
        sessions = [await stays.open() for _ in range(6)]
        leaves = connect(f"ws://127.0.0.1:{http_port}/lstm")
        gone = [await leaves.open(f"gone {i}") for i in range(6)]
        for at in range(0, 120, 10):
            for session in (*sessions, *gone):
                session.submit(x[at : at + 10])
            await sessions[0].wait(at)
            if at == 50:
                for session in gone:
                    session._line.carrier._stopped = True  # type: ignore[attr-defined]  # it does not come back
                    session._line.carrier._websocket.transport.abort()  # type: ignore[attr-defined]  # no goodbye
                gone = []
        for session in sessions:
            await session.close()
            np.testing.assert_allclose(await collect(session), alone(x), rtol=1e-5, atol=1e-5)


def replicas(app: str, deployment: str = "Recurrent") -> list[str]:
    """The actors' names of an application's owners, or of another of its deployments."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in actors if f"{app}#{deployment}" in actor["name"])


def process_of(replica: str) -> int:
    """Of the actor with that name; Serve's replicas tell it."""
    actor = ray.get_actor(replica, namespace=SERVE_NAMESPACE)
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


@pytest.fixture(scope="module")
def lasting(run_app: Callable[..., DeploymentHandle[Any]]) -> Callable[..., tuple[str, DeploymentHandle[Any]]]:
    """The name and the handle of an application with that many replicas; `again` deploys it once more."""
    running = {}

    def run(replicas: int, again: bool = False) -> tuple[str, DeploymentHandle[Any]]:
        if again or replicas not in running:
            name, session, engine = f"lasting{replicas}", {"checkpoint_timesteps": 20}, {"slots": 64 + again}
            handle = run_app(name, f"/{name}", model=MODEL, replicas=replicas, session=session, engine=engine)
            running[replicas] = name, handle
        return running[replicas]

    return run


@pytest.mark.parametrize(
    "what",
    [
        "one of two is killed",
        "the ingress is killed",
        "the ingress and one of one are killed",
        "all are replaced",
    ],
)
async def test_sessions_outlive_their_replicas(
    lasting: Callable[..., tuple[str, DeploymentHandle[Any]]], http_port: int, what: str
) -> None:
    """Under sessions of handle and WebSocket clients; kills twice. Serve starts another where there was one replica."""
    killed = [deployment for deployment, word in (("Ingress", "ingress"), ("Recurrent", "one of")) if word in what]
    num_replicas = 1 if "one of one" in what else 2
    name, app = lasting(num_replicas)
    rng = random.Random(what)

    async def one(client: Client, seed: int, until: asyncio.Event) -> int:
        x = noise(seed, 3000)
        async with await client.open(f"{what} {seed}") as session:
            reading = asyncio.create_task(collect(session))
            while not until.is_set() or session.submitted < 100:
                session.submit(x[session.submitted : session.submitted + rng.randint(1, 5)])
                await session.wait()
                await asyncio.sleep(rng.random() * 0.05)
            end = session.submitted
        np.testing.assert_allclose(await reading, alone(x[:end]), rtol=1e-5, atol=1e-5)
        return end

    async def disturb(until: asyncio.Event) -> None:
        await asyncio.sleep(1)
        if not killed:
            await asyncio.to_thread(lasting, num_replicas, again=True)
        for _ in range(2 if killed else 0):
            victims = [rng.choice(replicas(name, deployment)) for deployment in killed]
            for process in await asyncio.to_thread(lambda names: list(map(process_of, names)), victims):
                os.kill(process, signal.SIGKILL)
            await asyncio.sleep(4)
        until.set()

    async with connect(app) as handle, connect(f"ws://127.0.0.1:{http_port}/{name}") as websocket:
        until = asyncio.Event()
        clients = [handle, websocket] if killed else [handle]  # the ingress is replaced as well
        *ended, _ = await asyncio.gather(
            *(one(clients[seed % len(clients)], seed, until) for seed in range(30)), disturb(until)
        )
    assert all(end >= 100 for end in ended)


async def test_a_replica_gives_its_sessions_back_though_a_handle_call_of_it_never_ends(
    run_alone: Callable[..., DeploymentHandle[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve then waits, and kills it without a word."""
    ran_again = []
    moved = Line.moved

    def noticed(line: Line, carrier: Outbox, timestep: int) -> None:
        ran_again.append(line.progress - timestep)
        moved(line, carrier, timestep)

    def hang(replica: Any) -> None:
        replica._replica_impl._metrics_manager.inc_num_ongoing_requests(RequestMetadata("", ""))

    monkeypatch.setattr(Line, "moved", noticed)
    app = run_alone("busy", model=MODEL, engine=SMALL, replicas=2)
    async with connect(app) as client:
        sessions = [await client.open() for _ in range(6)]
        for seed, session in enumerate(sessions):
            session.submit(noise(seed, 40))
            await session.wait()
        for name in replicas("busy"):
            await ray.get_actor(name, namespace=SERVE_NAMESPACE).__ray_call__.remote(hang)
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        await controller.update_deployment_replicas.remote(DeploymentID("Recurrent", "busy"), 1)
        async with asyncio.timeout(5):
            while len(ran_again) < 3:
                await asyncio.sleep(0.05)
        for seed, session in enumerate(sessions):
            session.submit(noise(seed, 60)[40:])
            await session.close()
            np.testing.assert_allclose(await collect(session), alone(noise(seed, 60)), rtol=1e-5, atol=1e-5)
    assert ran_again == [0, 0, 0]
    for name in replicas("busy"):  # or the test would end when Serve does not wait any more
        ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))


async def test_a_killed_replica_ends_its_sessions_clearly_and_is_replaced(
    others: DeploymentHandle[Any],
) -> None:
    async with connect(others) as client:
        session = await client.open("a", model="brief")
        session.submit(noise(1, 3))
        await session.wait()
        (owner,) = replicas("others", "Recurrent-brief")
        ray.kill(ray.get_actor(owner, namespace=SERVE_NAMESPACE))

        async def talk() -> None:
            while True:
                session.submit(noise(1, 1))
                await session.wait()
                session.read()

        with pytest.raises(StateLost, match="sessions"):
            await talk()

        async def reopened() -> Session:
            while True:
                try:
                    return await client.open("a", model="brief")
                except (Unavailable, TooManySessions):
                    await asyncio.sleep(0.2)

        session = await asyncio.wait_for(reopened(), 60)
        session.submit(noise(1, 3))
        assert await session.wait() == 3


async def test_own_model_and_a_failing_step(others: DeploymentHandle[Any]) -> None:
    async with connect(others) as client:
        async with await client.open(model="picky") as session:
            session.submit(np.array([[1.0], [2.0]], np.float32))
            await session.wait()
            session.submit(np.array([[11.0]], np.float32))
            with pytest.raises(StepFailed, match="resend from 2"):
                await session.wait()
            session.submit(np.array([[4.0]], np.float32))
            await session.close()
        outputs = session.read()
        assert outputs is not None
        assert outputs.values["total"].tolist() == [[1.0], [3.0], [7.0]]


async def test_http_and_metrics(app: DeploymentHandle[Any], http_port: int) -> None:
    base = f"http://127.0.0.1:{http_port}/lstm/v1"
    x = noise(9, 7)
    async with httpx.AsyncClient(timeout=30) as http:
        assert (await http.get(f"{base}/health/ready")).status_code == 200
        opened = (await http.post(f"{base}/sessions", json={"session": "h"})).json()
        assert opened["session"] == "h"
        sent = await http.post(f"{base}/sessions/h/segments", json={"x": x.tolist()})
        assert (sent.status_code, sent.json()["end"]) == (202, 7)
        values: list[list[float]] = []
        while len(values) < 7:
            got = await http.get(f"{base}/sessions/h/outputs", params={"start": len(values), "wait_s": 10})
            values += got.json()["outputs"]["y"]
        np.testing.assert_allclose(values, alone(x), rtol=1e-4, atol=1e-5)
        assert (await http.delete(f"{base}/sessions/h")).json()["reason"] == "closed"
        assert (await http.post(f"{base}/sessions/nobody/segments", json={"x": x.tolist()})).status_code == 404

        seen = await asyncio.wait_for(_metrics(http, {"lockstep_steps", 'reason="closed"', "lockstep_batch_size"}), 60)
        assert 'model="rnn"' in seen["lockstep_steps"]
        assert "lockstep_session_ends" in seen['reason="closed"']


async def test_the_command_line_ends_a_session_of_another_client(app: DeploymentHandle[Any], http_port: int) -> None:
    address = f"ws://127.0.0.1:{http_port}/lstm"

    async def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "clients", "sessions", *arguments, "--address", address]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        return str(done.stdout)

    async with connect(app) as by_handle, connect(address) as by_socket:
        dropped, stays = await by_handle.open("dropped"), await by_socket.open("stays")
        listed = {line.split()[0]: line.endswith("resumable") for line in (await call("list")).splitlines()}
        assert (listed["dropped"], listed["stays"]) == (False, True)
        assert await call("drop", "dropped") == "dropped: aborted\n"
        with pytest.raises(SessionEnded, match="aborted"):
            await dropped.wait(dropped.submit(noise(1, 5)))
        await stays.wait(stays.submit(noise(1, 5)))
        while "dropped" in await call("list"):  # its owner tells the directory soon
            pass


async def test_a_session_is_taken_along_from_one_application_to_another(
    app: DeploymentHandle[Any], others: DeploymentHandle[Any], http_port: int
) -> None:
    x = noise(2, 60)
    here = connect(f"ws://127.0.0.1:{http_port}/lstm")
    async with here, connect(others) as by_handle:
        session = await here.open()
        session.submit(x[:30])
        record = await session.export()
        for client, model in ((by_handle, "brief"), (here, "rnn")):
            again = await client.open(model=model, checkpoint=record)
            again.submit(x[30:])
            await again.close()
            np.testing.assert_allclose(await collect(again), alone(x)[30:], rtol=1e-5, atol=1e-5)
        with pytest.raises(StateLost, match="other weights, options or dtype"):
            await by_handle.open(model="other", checkpoint=record)


async def _metrics(http: httpx.AsyncClient, names: set[str]) -> dict[str, str]:
    """The first line with each name of a metric or label, as Prometheus would read it, once all are there."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    while True:
        text = (await http.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics")).text
        lines = [line for line in text.splitlines() if 'application="lstm"' in line]
        seen = {name: next((line for line in lines if name in line), "") for name in names}
        if all(seen.values()):
            return seen
        await asyncio.sleep(0.5)
