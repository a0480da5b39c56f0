"""Loading and unloading of models: by the number of replicas of their deployments, which disturbs no other one."""

import asyncio
import contextvars
import logging
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve._private.exceptions import ExternalScalerDisabledError

from serve_app.deployments.transport import RayDirectory
from serve_app.errors import LockstepError, Unavailable, UnknownModel
from serve_app.ingress.model_control import WATCH_S

logger = logging.getLogger("ray.serve")

LOOK_S = 0.2
KNOWN_S = 2 * WATCH_S
"""Until every way in knows that there is nothing to ask: at a deployment without replicas a request waits for ever."""
STOPPED_WITHIN_S = 30.0
FAILED = "A replica failed to start"
"""In what Serve says of a deployment."""


class ServeModels:
    """See ingress.model_control.ModelControl: of one application.

    The directory knows what is unloaded, and places no new sessions of it. Replicas go when the last session has ended.
    Serve changes their number only where the application has `external_scaler_enabled`, and the model no autoscaling;
    where not, they stay.
    """

    def __init__(self, app: str, directory: RayDirectory, deployments: Mapping[str, str]) -> None:
        """deployments: by the name of their model."""
        self._app = app
        self._directory = directory
        self._deployments = deployments
        self._controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        self._emptying: dict[str, asyncio.Task[None]] = {}

    @property
    def configured(self) -> Collection[str]:
        """See ModelControl."""
        return self._deployments.keys()

    async def unloaded(self) -> Mapping[str, bool]:
        """See ModelControl."""
        return await self._directory.unloaded()

    async def load(self, model: str) -> None:
        """See ModelControl."""
        deployment = self._deployment(model)
        await self._stop_emptying(model)
        before = await self._details(deployment)
        replicas = before["deployment_config"].get("num_replicas", 0)  # none where Serve scales
        if before["target_num_replicas"] == 0 and await self._scale(deployment, replicas):
            try:
                await self._running(model, replicas, before["message"])
            except Unavailable:
                await self._scale(deployment, 0)
                await self._stopped(deployment)
                raise
        await self._directory.load(model)

    async def unload(self, model: str) -> None:
        """See ModelControl."""
        self._deployment(model)
        await self._directory.unload(model)
        await self._stop_emptying(model)
        in_no_request = contextvars.Context()  # or Serve would end it with the one that asked for it
        self._emptying[model] = asyncio.get_running_loop().create_task(self._empty(model), context=in_no_request)

    async def stop(self) -> None:
        """Wait for no more sessions to end: a model that still has some stays until it is unloaded again."""
        for model in list(self._emptying):
            await self._stop_emptying(model)

    def _deployment(self, model: str) -> str:
        if model not in self._deployments:
            raise UnknownModel(f"model {model!r} is not one of this application's: {', '.join(self._deployments)}")
        return self._deployments[model]

    async def _stop_emptying(self, model: str) -> None:
        task = self._emptying.pop(model, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _empty(self, model: str) -> None:
        """When the model's last session has ended let its replicas go."""
        deployment, going = self._deployment(model), False
        await asyncio.sleep(KNOWN_S)
        while True:
            try:
                if model not in await self._directory.unloaded():
                    return  # loaded again, here or by another way in
                sessions = (await self._directory.statistics()).get(model)
                if not going and not (sessions and sessions.open):
                    going = await self._scale(deployment, 0)
                    if not going:
                        logger.warning(
                            "model %r is unloaded and keeps its memory: the application's section needs "
                            "external_scaler_enabled: true, and the model no autoscaling",
                            model,
                        )
                        return
                if going and not (await self._details(deployment))["replicas"]:
                    await self._directory.unload(model, gone=True)
                    return
            except (LockstepError, RayError) as error:
                logger.warning("model %r is not unloaded yet, trying again: %s", model, error)
            await asyncio.sleep(LOOK_S)

    async def _running(self, model: str, replicas: int, said: str) -> None:
        """Wait until so many replicas run. Raises Unavailable when one fails to start: Serve would try for ever.

        said: what Serve has said before; a message names the process that failed, so none is the same as another.
        """
        while True:
            found = await self._details(self._deployment(model))
            if sum(replica["state"] == "RUNNING" for replica in found["replicas"]) >= replicas:
                return
            if FAILED in found["message"] and found["message"] != said:
                raise Unavailable(f"model {model!r} cannot be loaded: {found['message'][-1000:]}")
            await asyncio.sleep(LOOK_S)

    async def _stopped(self, deployment: str) -> None:
        """Wait until no replica is left: one that fails later would be taken for one of the next attempt."""
        try:
            async with asyncio.timeout(STOPPED_WITHIN_S):
                while True:
                    found = await self._details(deployment)
                    if found["target_num_replicas"] or not found["replicas"]:  # somebody loads it again
                        return
                    await asyncio.sleep(LOOK_S)
        except (TimeoutError, RayError) as error:
            logger.warning("deployment %r may have replicas that did not start, and do not stop: %r", deployment, error)

    async def _scale(self, deployment: str, replicas: int) -> bool:
        """Let Serve start or stop replicas; False where the application is not configured for that, or Serve scales."""
        if (await self._details(deployment))["deployment_config"].get("autoscaling_config"):
            return False
        try:
            await self._controller.update_deployment_replicas.remote(DeploymentID(deployment, self._app), replicas)
        except RayTaskError as error:
            if isinstance(error.cause, ExternalScalerDisabledError):
                return False
            raise
        return True

    async def _details(self, deployment: str) -> dict[str, Any]:
        """What Serve's dashboard shows of a deployment."""
        found = await self._controller.get_serve_instance_details.remote()
        details: dict[str, Any] = found["applications"][self._app]["deployments"][deployment]
        return details
