"""The directory in its two processes; and that its bench runs and reports, never how fast anything is."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from bench.directory import APP, APPLICATION, listening_at, measure, pid_of
from clients.client import Client, connect
from clients.session import Session
from serve_app.deployments.autoscaling import NAMES
from serve_app.deployments.directory_process import Elsewhere
from serve_app.deployments.directory_service import DirectoryService
from serve_app.deployments.transport import NAMESPACE, RayDirectory
from serve_app.errors import Unavailable

pytestmark = [pytest.mark.serve, pytest.mark.timeout(120)]
WITHIN_S = 20.0


async def opened(client: Client) -> Session:
    """A session, as soon as the directory has heard of a replica."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            return await client.open()
        except Unavailable:
            assert time.monotonic() < deadline


def processes() -> dict[int, Any]:
    """Both, when they are there: their actors."""
    deadline = time.monotonic() + WITHIN_S
    actors = [ray.get_actor(name.format(APP), namespace=NAMESPACE) for name in NAMES]
    while True:
        try:
            return {pid_of(actor): actor for actor in actors}
        except RayActorError:
            assert time.monotonic() < deadline


async def takes_over(process: Any) -> str:
    """The directory's address there, as soon as the other process has given it up."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            return await process.ask.remote("address")
        except Elsewhere:
            assert time.monotonic() < deadline


async def test_the_directory_goes_on_in_its_other_process(run_app: Callable[..., DeploymentHandle[Any]]) -> None:
    run_app(APP, **APPLICATION)
    directory = RayDirectory(APP)
    x = np.ones((5, 4), np.float32)
    async with connect(APP) as client:
        session = await client.open()
        for _ in NAMES:  # the one dies, and the other, when the one has started again
            both = processes()
            del both[killed := listening_at(await directory.ask(DirectoryService.address))]
            [(waiting, process)] = both.items()
            psutil.Process(killed).kill()
            assert listening_at(await takes_over(process)) == waiting  # at once: the killed one starts meanwhile
            await session.wait(session.submit(x))
            another = await opened(client)
            await another.wait(another.submit(x))
            assert listening_at(await directory.ask(DirectoryService.address)) == waiting
        assert session.progress == 10


async def test_a_directory_is_filled_and_asked_and_its_owner_killed(
    run_app: Callable[..., DeploymentHandle[Any]],
) -> None:
    """And with its application it ends, until it is asked again."""
    run_app(APP, **APPLICATION)
    figures = await measure(idle=2000, moving=50, seconds=0.2)
    assert figures["failover_sessions"] == 50
    assert figures["directory_sessions"] >= 2000
    assert figures["failover_directory_calls"] >= 50, "each session moves by one call"
    claimed = ("directory_opens_per_s", "failover_10k_s", "failover_directory_p99_s", "failover_lookup_p99_s")
    assert all(figures[name] > 0 for name in claimed)
    directory = RayDirectory(APP)
    assert await directory.ask(DirectoryService.num_sessions)
    before = await asyncio.to_thread(processes)
    await asyncio.to_thread(serve.delete, APP)
    _, alive = await asyncio.to_thread(psutil.wait_procs, [psutil.Process(each) for each in before], WITHIN_S)
    assert alive == []
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            assert await directory.ask(DirectoryService.num_sessions) == {}
            return
        except Unavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
