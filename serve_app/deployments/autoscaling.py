"""What Serve's controller asks how many replicas a model is to have: the directory, which knows all that it takes.

Serve carries this file to its controller as it is, so nothing of this package is imported here.
"""

from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.config import AutoscalingContext

ASK_EVERY_S = 0.5
NAMES = ("directory:{}", "directory:{}:standby")
"""Of the directory's two processes."""


class DirectoryPolicy:
    """An autoscaling policy of Serve, called at each turn of its control loop, which must not wait.

    While the directory does not answer, as when it starts again, the number of replicas stays.
    """

    def __init__(self, model: str, namespace: str) -> None:
        """namespace: of the directory."""
        self._model, self._namespace = model, namespace
        self._directory: Any = None
        self._turn = 0
        self._asked: Future[int] | None = None
        self._asked_at = 0.0
        self._wanted: int | None = None

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """How many there are to be; Serve waits for as long as its delays say before it does that."""
        target, now = context.target_num_replicas, context.current_time or 0.0
        if self._asked is not None and self._asked.done():
            try:
                self._wanted = self._asked.result()
            except RayError:  # it is gone, or in its other process
                self._wanted = self._directory = None
                self._turn += 1
            self._asked = None
        if self._asked is None and now - self._asked_at > ASK_EVERY_S:
            self._asked_at = now
            try:
                if self._directory is None:
                    name = NAMES[self._turn % len(NAMES)].format(context.app_name)
                    self._directory = ray.get_actor(name, namespace=self._namespace)
                self._asked = self._directory.ask.remote("wanted_replicas", self._model, target).future()
            except (ValueError, RayError):  # no replica has made one yet
                self._wanted = None
        return target if self._wanted is None else self._wanted, {}
