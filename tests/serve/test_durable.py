"""Everything is killed at once, Ray too, and started again: sessions go on from the store."""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest

from clients.client import Client, connect
from clients.session import Session
from cluster.local import free_port
from serve_app.errors import LockstepError
from tests.serve.test_application import alone, collect, noise

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]


@asynccontextmanager
async def running(repository: Path, port: int, store: Path) -> AsyncIterator[None]:
    """A cluster, which is killed with all its processes."""
    with tempfile.TemporaryDirectory(prefix="ld", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "tests.serve.restart", folder, str(port), str(store)]
        driver = await asyncio.create_subprocess_exec(*command, cwd=repository)
        try:
            yield
        finally:
            processes = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
            for process in processes:
                process.kill()
            await driver.wait()
            await asyncio.to_thread(psutil.wait_procs, processes)


async def opened(client: Client) -> Session:
    """A session, as soon as there is a way to open one."""
    while True:
        try:
            return await client.open()
        except LockstepError:  # it is still starting
            await asyncio.sleep(0.2)


async def test_sessions_outlive_the_whole_cluster(repository: Path, tmp_path: Path) -> None:
    port = free_port()
    async with connect(f"ws://127.0.0.1:{port}", resume_within_s=120) as client:

        async def run(session: Session, x: np.ndarray, timesteps: int) -> None:
            for at in range(session.submitted, session.submitted + timesteps, 5):
                await session.wait(session.submit(x[at : at + 5]))

        async with running(repository, port, tmp_path):
            sessions = [await opened(client) for _ in range(10)]
            xs = [noise(seed, 400) for seed in range(10)]
            await asyncio.gather(*(run(session, x, 100) for session, x in zip(sessions, xs, strict=True)))
            for session, x in zip(sessions, xs, strict=True):
                session.submit(x[100:110])  # and has no answer, most likely
        async with running(repository, port, tmp_path):
            await asyncio.gather(*(run(session, x, 100) for session, x in zip(sessions, xs, strict=True)))
            for session, x in zip(sessions, xs, strict=True):
                await session.close()
                np.testing.assert_allclose(await collect(session), alone(x[:210]), rtol=1e-5, atol=1e-5)
