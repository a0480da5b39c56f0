"""The directory's two processes: when one dies the other goes on at once, which one that has yet to start cannot."""

import time
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayError

from serve_app.deployments.directory_service import DirectoryService
from serve_app.errors import Unavailable

CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}
"""To import it from Serve would take longer than all that is needed here."""
LOOK_EVERY_S = 5.0
LOOKS = 2
"""In which the application is not there, before it is taken to be deleted; it may be deployed anew at once."""


class Elsewhere(Unavailable):
    """The directory is not in this process: ask the other one."""


class DirectoryProcess:
    """An actor that has the directory once it has the lock, and is asked; the other one waits.

    The kernel takes the lock from a dead process at once, and never from a living one: whatever Ray believes of the
    two, there is one directory. Both are on the head node, where the lock is. The one that takes over knows of sessions
    what one that starts again does; see Directory. Both outlive all replicas, and end when the application is deleted.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        self._directory: DirectoryService | None = None
        context = ray.get_runtime_context()
        folder = Path(context.get_temp_dir()) / context.get_session_name()
        self._lock = FileLock(folder / f"lockstep-directory-{quote(app, safe='')}.lock")
        Thread(target=self._end_with_application, args=(context.current_actor,), daemon=True).start()

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
        return self._directory

    def _end_with_application(self, this: Any) -> None:
        missed = 0
        while missed < LOOKS:
            time.sleep(LOOK_EVERY_S)
            missed = 0 if self._has_application() else missed + 1
        ray.kill(this)

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
