"""What is known of the directory's processes, and of who reports to it, without Ray."""

import asyncio
from collections import deque
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from serve_app.deployments import transport
from serve_app.deployments.recurrent import Recurrent
from serve_app.deployments.transport import RayDirectory

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
