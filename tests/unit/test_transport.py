"""What is known of the directory's processes, and of who reports to it, without Ray."""

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID

from serve_app.deployments import transport
from serve_app.deployments.directory_service import STRAIGHT, Question, Reply
from serve_app.deployments.messages import CallServer
from serve_app.deployments.recurrent import Recurrent
from serve_app.deployments.registration import News, Standing
from serve_app.deployments.transport import OtherReplicas, RayDirectory
from serve_app.errors import StateLost
from serve_app.policy.autoscaling import IDLE

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("dead", [{"one", "other"}, {"one"}, {"other"}])
async def test_whether_the_directory_is_down_while_its_processes_take_turns(
    dead: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = object.__new__(RayDirectory)
    directory._processes = deque(["one", "other"])

    def is_dead(process: str) -> bool:
        directory._processes.rotate()  # a call that comes back from the one that is dead
        return process in dead

    monkeypatch.setattr(transport, "_is_dead", is_dead)
    assert await directory.is_down() == (dead == {"one", "other"})


async def test_a_report_is_heard_though_its_way_to_the_directory_breaks_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Straight to the directory's port; by Ray, where it may be in the other process, when that connection is lost."""
    straight: list[Any] = []
    by_ray: list[str] = []

    async def answer(question: Question) -> Reply:
        straight.append(question)
        if len(straight) == 2:
            for caller in list(server._callers):
                caller.close()
        return Standing(1, is_known=True)

    async def remote(method: str, *args: Any) -> Any:
        by_ray.append(method)
        return address if method == "address" else Standing(2, is_known=True)

    server = CallServer(STRAIGHT, answer)
    address = await server.start("127.0.0.1")
    process = SimpleNamespace(ask=SimpleNamespace(remote=remote))
    monkeypatch.setattr(transport, "_processes", lambda app: deque([process]))
    directory, news = RayDirectory("app"), News([(1, "a")], [2, 3])
    assert [await directory.report("owner", news, {}) for _ in range(3)] == [
        Standing(incarnation, is_known=True) for incarnation in (1, 2, 1)
    ]
    assert straight == [("owner", news, {}, IDLE)] * 3
    assert by_ray == ["address", "report", "address"]
    await directory.close()
    await server.stop()


async def test_replicas_that_do_not_answer_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ReplicaID("own", DeploymentID("Ingress", "app"))
    of = own.to_full_id_str().removesuffix("own")

    class Replica:
        def __init__(self, name: str) -> None:
            self.name = name.removeprefix(of)

        async def call(self, method: str, question: str) -> str:
            if self.name == "gone":
                raise StateLost("it is gone")
            if self.name == "standing":
                await asyncio.Event().wait()
            return f"{self.name} {method} {question}"

    names = [of + each for each in ("own", "one", "gone", "standing", "other")]
    found = [{"name": each, "namespace": "serve"} for each in [*names, "SERVE_REPLICA::app#Recurrent#x", "directory"]]
    elsewhere = [{"name": of + "not_serves", "namespace": "lockstep"}]
    monkeypatch.setattr(transport.ray.util, "list_named_actors", lambda all_namespaces: found + elsewhere)
    monkeypatch.setattr(transport, "ReplicaActor", Replica)
    monkeypatch.setattr(transport, "ANSWER_WITHIN_S", 0.05)
    assert sorted(await OtherReplicas(own, "tell").ask("it")) == ["one tell it", "other tell it"]


async def test_a_replica_that_does_not_report_any_more_is_not_healthy() -> None:
    """The directory would never hear of it again."""

    async def report(error: Exception | None) -> None:
        if error is not None:
            raise error

    replica: Any = SimpleNamespace(_serving=Mock(), _reporter=asyncio.create_task(report(None)))
    Recurrent.check_health(replica)
    await replica._reporter
    Recurrent.check_health(replica)  # it has stopped in order
    replica._reporter = asyncio.create_task(report(RuntimeError("deque mutated during iteration")))
    await asyncio.wait([replica._reporter])
    with pytest.raises(RuntimeError, match="mutated"):
        Recurrent.check_health(replica)
