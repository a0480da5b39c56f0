"""Loading and unloading, where Serve's controller is a script of what it says."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID

from serve_app.deployments import serve_models
from serve_app.deployments.serve_models import FAILED, ServeModels
from serve_app.errors import Unavailable

pytestmark = pytest.mark.asyncio


class Controller:
    """Of one deployment, whose replicas fail to start, one after the other, until `is_whole`."""

    def __init__(self) -> None:
        self.target, self.is_whole, self.message = 0, False, ""
        self.replicas: list[str] = []
        self.looks, self.is_stuck = 0, False
        self.get_serve_instance_details = SimpleNamespace(remote=self._look)
        self.update_deployment_replicas = SimpleNamespace(remote=self._update)

    async def _update(self, deployment: DeploymentID, target: int) -> None:
        self.target, self.looks = target, 0
        if target:
            self.replicas = ["STARTING"] * target
        self.replicas = ["STARTING" if target else "STOPPING" for _ in self.replicas]

    async def _look(self) -> dict[str, Any]:
        self.looks += 1
        if self.looks % 3 == 0 and self.replicas and not self.is_stuck:
            if self.target and self.is_whole:
                self.replicas = ["RUNNING"] * self.target
            elif self.replicas.pop() and not self.is_whole:
                self.message = f"{FAILED}: the one with {len(self.replicas)} beside it"
        details = {
            "deployment_config": {"num_replicas": 2}, "target_num_replicas": self.target, "message": self.message,
            "replicas": [{"state": state} for state in self.replicas],
        }  # fmt: skip
        return {"applications": {"app": {"deployments": {"Recurrent": details}}}}


class Directory:
    """Of a model that is unloaded, until it is not."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def load(self, model: str) -> None:
        self.loaded.append(model)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[ServeModels, Controller, Directory]]:
    def build() -> tuple[ServeModels, Controller, Directory]:
        controller, directory = Controller(), Directory()
        monkeypatch.setattr(serve_models, "LOOK_S", 0.0)
        monkeypatch.setattr(serve_models.ray, "get_actor", lambda *_, **__: controller)
        return ServeModels("app", directory, {"rnn": "Recurrent"}), controller, directory  # type: ignore[arg-type]

    return build


async def test_a_model_that_failed_is_loaded_when_it_is_whole_again(
    served: Callable[[], tuple[ServeModels, Controller, Directory]],
) -> None:
    """Both its replicas fail, the second after the first has been told of: that is no failure of the next attempt."""
    models, controller, directory = served()
    with pytest.raises(Unavailable, match=r"model 'rnn' cannot be loaded: .*the one with 1 beside it"):
        await models.load("rnn")
    assert (controller.target, controller.replicas, directory.loaded) == (0, [], [])
    controller.is_whole = True
    await models.load("rnn")
    assert (controller.replicas, directory.loaded) == (["RUNNING"] * 2, ["rnn"])


async def test_replicas_that_do_not_stop_hold_up_the_answer_for_a_while_only(
    served: Callable[[], tuple[ServeModels, Controller, Directory]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models, controller, _ = served()
    monkeypatch.setattr(serve_models, "STOPPED_WITHIN_S", 0.05)

    async def update(deployment: DeploymentID, target: int) -> None:
        await controller._update(deployment, target)
        controller.is_stuck = target == 0

    controller.update_deployment_replicas.remote = update
    async with asyncio.timeout(10):
        with pytest.raises(Unavailable, match="cannot be loaded"):
            await models.load("rnn")
    assert (controller.target, controller.replicas) == (0, ["STOPPING"])


async def test_a_load_that_failed_is_answered_when_another_has_begun(
    served: Callable[[], tuple[ServeModels, Controller, Directory]],
) -> None:
    models, controller, _ = served()

    async def update(deployment: DeploymentID, target: int) -> None:
        await controller._update(deployment, target or 2)
        controller.is_whole = controller.is_stuck = target == 0

    controller.update_deployment_replicas.remote = update
    async with asyncio.timeout(10):
        with pytest.raises(Unavailable, match="cannot be loaded"):
            await models.load("rnn")
    assert (controller.target, controller.replicas) == (2, ["STARTING"] * 2)
