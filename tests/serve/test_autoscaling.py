"""Replicas come when sessions do, get their share of them, and go with them: no output is lost, doubled or wrong."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from ray import serve
from ray.serve.handle import DeploymentHandle

from bench.chaos_load import PERIOD_S, Line, lstm, run_session, wrong
from bench.closed_loop import SEED
from bench.drain import Replays
from clients.client import connect
from serve_app.deployments.directory_service import DirectoryService
from serve_app.deployments.serve_models import ServeModels
from serve_app.deployments.transport import RayDirectory

pytestmark = [pytest.mark.serve, pytest.mark.timeout(180)]

APP = "scaled"
WITHIN_S = 60.0


def running() -> int:
    """Replicas that run, and no others."""
    states = serve.status().applications[APP].deployments["Recurrent"].replica_states
    return states.get("RUNNING", 0) if len(states) == 1 else -1


async def sessions_become(count: int, level: bool) -> None:
    """There are so many replicas; `level`: with about as many sessions each."""
    directory = RayDirectory(APP)
    deadline, held, found = time.monotonic() + WITHIN_S, [], 0
    while time.monotonic() < deadline:
        held = list((await directory.ask(DirectoryService.num_sessions)).values())
        found = await asyncio.to_thread(running)
        if found == len(held) == count and (not level or max(held) - min(held) <= 3):
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"{found} replicas run, with {held} sessions, after {WITHIN_S} s: not {count}")


async def test_replicas_come_and_go_with_sessions_which_are_spread_over_them(
    run_alone: Callable[..., DeploymentHandle[Any]],
) -> None:
    run_alone(
        APP,
        model={"name": "rnn", "seed": SEED},
        engine={"device": "cpu"},
        session={"max_sessions": 20, "max_wait_s": WITHIN_S},
        autoscaling={"max_replicas": 3, "upscale_delay_s": 0.5, "downscale_delay_s": 1},
    )
    replays, lines = Replays(), [Line(seed, lstm()) for seed in range(44)]
    many, few = asyncio.Event(), asyncio.Event()
    async with connect(APP) as client:
        assert await asyncio.to_thread(running) == 1
        work = [
            asyncio.create_task(run_session(client, line, (many if line.seed % 4 else few).is_set)) for line in lines
        ]
        await sessions_become(3, level=True)
        await asyncio.sleep(2 * PERIOD_S)
        many.set()
        await sessions_become(1, level=False)
        await asyncio.sleep(2 * PERIOD_S)
        few.set()
        await asyncio.gather(*work)
        models = ServeModels(APP, RayDirectory(APP), {"rnn": "Recurrent"})
        await models.unload("rnn")
        await models._emptying["rnn"]  # until it has tried
        assert await asyncio.to_thread(running) == 1, "those that are scaled stay when the model is unloaded"
        await models.load("rnn")
        await models.stop()
        await (await client.open()).close()
    assert replays.moves >= 8, "to the two replicas that came, and back to the one that is left"
    assert replays.timesteps == 0, "nothing runs again"
    assert wrong(lines) == 0
    for line in lines:
        assert (line.received, line.doubled, line.error) == (line.submitted, 0, None)
        assert line.submitted > 0
