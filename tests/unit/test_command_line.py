"""The command line, against an ingress in this process."""

import asyncio

import numpy as np
import pytest
from click.testing import CliRunner, Result

from clients.__main__ import main
from clients.websocket import open_websocket
from serve_app.errors import UnknownSession
from tests.fakes import SumModel
from tests.unit.test_durable import ingresses
from tests.unit.test_websocket import ones

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


async def run(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, arguments)


async def test_sessions_are_listed_shown_and_dropped() -> None:
    async with ingresses() as system:
        first, second = system.alive
        session = await open_websocket(first, session="a/b")
        session.submit(np.array(ones(7)))
        await session.wait()
        held = system.hubs[first].get("a/b")
        listed = await run("sessions", "list", "--address", second)
        assert listed.output == f"a/b  silero_vad  owner-0  {held.epoch}  resumable\n"
        assert "progress: 7" in (await run("sessions", "show", "a/b", "--address", first)).output
        assert "progress" not in (await run("sessions", "show", "a/b", "--address", second)).output
        dropped = await run("sessions", "drop", "a/b", "--address", second)
        assert (dropped.exit_code, dropped.output) == (0, "a/b: aborted\n")
        assert await session.closed() == "aborted"
        assert (await run("sessions", "list", "--address", first, "--after", "a/b")).output == ""


async def test_a_session_is_moved_to_another_replica() -> None:
    async with ingresses() as system:
        first, second = system.alive
        system.cluster.add(SumModel())
        session = await open_websocket(first, session="a")
        await session.wait(session.submit(np.array(ones(3))))
        owner = system.hubs[first].get("a").owner
        to = "owner-1" if owner == "owner-0" else "owner-0"
        moved = await run("sessions", "migrate", "a", "--to", to, "--address", second)
        assert (moved.exit_code, moved.output) == (0, f"a: leaves {owner}\n")
        await session.wait(session.submit(np.array(ones(3))))
        assert system.hubs[first].get("a").owner == to
        assert sum(engine.stats.timesteps for engine in system.cluster.engines.values()) == 6
        refused = await run("sessions", "migrate", "a", "--to", "nowhere", "--address", second)
        assert refused.exit_code == 1 and f"cannot go to 'nowhere', choose one of: {owner}" in refused.output


async def test_a_session_that_waits_is_dropped_with_its_checkpoint() -> None:
    async with ingresses() as system:
        first, second = system.alive
        session = await system.hubs[first].open("a", resumable=True)
        while not system.cluster.directory._kept:
            await asyncio.sleep(0.005)
        system.cluster.directory.release("a", session.epoch)
        listed = await run("sessions", "list", "--address", second)
        assert listed.output == f"a  -  waits to be resumed  {session.epoch}  resumable\n"
        assert (await run("sessions", "drop", "a", "--address", second)).output == "a: aborted\n"
        with pytest.raises(UnknownSession):
            await system.cluster.fetch("a")


async def test_what_goes_wrong_is_said_in_a_line() -> None:
    async with ingresses() as system:
        unknown = await run("sessions", "drop", "nobody", "--address", system.alive[0])
        assert (unknown.exit_code, unknown.output) == (
            1, "Error: session 'nobody' is not open: open it first\n",
        )  # fmt: skip
    nowhere = await run("sessions", "list", "--address", "ws://127.0.0.1:9")
    assert nowhere.exit_code == 1 and "no answer from http://127.0.0.1:9/v1/sessions" in nowhere.output
    name = await run("sessions", "list", "--address", "lockstep")
    assert name.exit_code == 1 and "expected one like ws://host:8000" in name.output
