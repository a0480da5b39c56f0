"""The directory's two processes: when one dies the other goes on at once, which one that has yet to start cannot."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayError

from serve_app.deployments.directory_service import DirectoryService
from serve_app.errors import Unavailable
from serve_app.garbage import collect_seldom

CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
"""To import it from Serve would take longer than all that is needed here."""
LOOK_EVERY_S = 5.0
LOOKS = 2
"""In which there is neither the application nor an owner, before it is taken to be deleted, and not deployed anew."""


class Elsewhere(Unavailable):
    """The directory is not in this process: ask the other one."""


class DirectoryProcess:
    """An actor that has the directory once it has the lock, and is asked; the other one waits.

    The kernel takes the lock from a dead process at once, and never from a living one: whatever Ray believes of the
    two, there is one directory. Both are on the head node, where the lock is. The one that takes over knows of sessions
    what one that starts again does; see Directory. Both outlive all replicas, and end when the application is deleted.
    """

    def __init__(self, app: str, names: Sequence[str], namespace: str) -> None:
        """names: of both, in that namespace."""
        collect_seldom()
        self._app, self._names, self._namespace = app, names, namespace
        self._directory: DirectoryService | None = None
        context = ray.get_runtime_context()
        folder = Path(context.get_temp_dir()) / context.get_session_name()
        self._lock = FileLock(folder / f"lockstep-directory-{quote(app, safe='')}.lock")

    async def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the directory. Raises what it raises, Elsewhere where the directory is not."""
        return await getattr(self._taken(), method)(*args, **kwargs)

    def _taken(self) -> DirectoryService:
        if self._directory is None:
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise Elsewhere("the directory is in its other process: ask that one") from None
            self._directory = DirectoryService(self._app)
            Thread(target=self._end_with_application, args=(self._directory,), daemon=True).start()
        return self._directory

    def _end_with_application(self, directory: DirectoryService) -> None:
        missed = num_reports = 0
        while missed < LOOKS:
            time.sleep(LOOK_EVERY_S)
            is_used = directory.num_reports > num_reports or self._has_application()
            missed, num_reports = 0 if is_used else missed + 1, directory.num_reports
        this = ray.get_runtime_context().get_actor_id()
        processes = []
        for name in self._names:
            with suppress(ValueError):  # it is gone
                processes.append(ray.get_actor(name, namespace=self._namespace))
        for process in sorted(processes, key=lambda each: each._actor_id.hex() == this):  # this one last
            ray.kill(process)

    def _has_application(self) -> bool:
        """Whether Serve knows it; a controller that starts again may."""
        try:
            controller: Any = ray.get_actor(**CONTROLLER)
            asked = controller.get_ingress_deployment_name.remote(self._app)
            return ray.get(asked, timeout=LOOK_EVERY_S) is not None
        except ValueError:
            return False
        except RayError:
            return True
