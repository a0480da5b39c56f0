"""The session directory at scale: `python -m bench.directory [--idle N] [--moving N] [--json FILE]`.

The directory's actor, in a local Ray, of an application with two replicas. First it is filled with idle sessions that
can be resumed, and a checkpoint of each: what its process has grown by for each of them, less the checkpoints
themselves (`directory_bytes_per_session`). So full, it is asked for new sessions by several processes, many at a time
from each (`directory_opens_per_s`). Then one of two replicas is killed with SIGKILL, and all of its sessions, each of
which has a segment on its way, go to the other: the time until each of them has the outputs of that segment
(`failover_10k_s`), and the 99th percentile of what calls to the directory take meanwhile: of the sender that moves the
sessions (`failover_directory_p99_s`), and of another process that looks sessions up (`failover_lookup_p99_s`).
"""

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import ray
from ray import serve

from bench.report import json_option, save, show_hardware, table
from cluster.local import local_cluster
from serve_app.app import build
from serve_app.checkpoint import Checkpoint, encode_checkpoint
from serve_app.config import DurabilityConfig
from serve_app.deployments.directory_service import DirectoryService
from serve_app.deployments.registration import News
from serve_app.deployments.transport import SERVE_NAMESPACE, RayDirectory
from serve_app.directory import Ask, Grant, Held, Owner
from serve_app.garbage import collect_seldom
from serve_app.ingress.hub import Hub
from serve_app.lease import LEASE_S
from serve_app.session import Session
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec

APP = "directory-bench"
MODEL = "rnn"
MODEL_OPTIONS = {"name": MODEL, "input": 4, "hidden": 8, "layers": 1}
MAX_BYTES = 2**31
"""Of checkpoints."""
IDLE = ModelSpec("idle", TensorSpec((4,)), {"y": TensorSpec((8,))}, state_bytes=64)
"""A model of which there are sessions only."""
APPLICATION = {
    "model": MODEL_OPTIONS,
    "durability.max_bytes": MAX_BYTES,
    "engine.device": "cpu",
    "session.max_sessions": 2**16,
    "replicas": 2,
}
IDLE_OWNERS = 4
CALLERS, AT_ONCE = 4, 64
BURST = 1000
TIMESTEPS = 5
LOOK_EVERY_S = 0.005


class Caller:
    """A process that talks to the directory."""

    def __init__(self, number: int) -> None:
        self._name = f"caller-{number}"
        self._directory = RayDirectory(APP)
        self._took_s: list[float] = []
        self._looking: asyncio.Task[None] | None = None
        self._reporting: asyncio.Task[None] | None = None

    async def fill(self, first: int, end: int) -> int:
        """Open sessions that can be resumed, and keep a checkpoint of each; returns the bytes of these."""
        nbytes = 0
        for at in range(first, end, BURST):
            names = [session_id(self._name, number) for number in range(at, min(at + BURST, end))]
            grants = await asyncio.gather(*(self._open(name, resumable=True) for name in names))
            slab = {grant.session: (Held(grant.epoch, grant.owner.name), record_of(grant)) for grant in grants}
            refused = await self._directory.keep(self._name, slab)
            assert not refused, refused
            nbytes += sum(len(record) for _, record in slab.values())
        return nbytes

    async def open(self, seconds: float) -> float:
        """New sessions, AT_ONCE at a time; returns how many a second."""
        began = time.monotonic()

        async def one_after_another(which: int) -> int:
            count = 0
            while time.monotonic() - began < seconds:
                await self._open(session_id(f"{self._name}-{which}", count))
                count += 1
            return count

        counts = await asyncio.gather(*map(one_after_another, range(AT_ONCE)))
        return sum(counts) / (time.monotonic() - began)

    async def own(self, idle: int) -> None:
        """Register owners of the idle sessions, and report for them from now on; nobody may send to them."""
        for number in range(IDLE_OWNERS):
            limits = SessionLimits(1024, 4096, refuse_nan=True)
            owner = Owner(f"idle-{number}", "nowhere", IDLE, limits, 2 * idle + 2**20, 2**20, checkpoints=True)
            await self._directory.register(owner, DurabilityConfig(max_bytes=MAX_BYTES))
        self._reporting = asyncio.create_task(self._report())

    async def look(self, session: str) -> None:
        """Look a session up now and then, from now on."""
        await self._directory.lookup(session)
        self._looking = asyncio.create_task(self._look(session))

    async def looked(self) -> list[float]:
        """How long each time took."""
        return self._took_s

    async def _report(self) -> None:
        while True:
            for number in range(IDLE_OWNERS):
                await self._directory.report(f"idle-{number}", News([], []), {})
            await asyncio.sleep(LEASE_S / 4)

    async def _look(self, session: str) -> None:
        while True:
            began = time.monotonic()
            await self._directory.lookup(session)
            self._took_s.append(time.monotonic() - began)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _open(self, name: str, *, resumable: bool = False) -> Grant:
        return await self._directory.open(Ask(name, self._name, IDLE.name, {}, resumable))


def start_caller(number: int) -> Any:
    """An actor."""
    return ray.remote(Caller).options(num_cpus=0).remote(number)


class TimedDirectory(RayDirectory):
    """A directory whose calls are timed."""

    def __init__(self, app: str) -> None:
        super().__init__(app)
        self.took_s: list[float] = []

    async def open(self, ask: Ask) -> Grant:
        """See RayDirectory."""
        began = time.monotonic()
        grant = await super().open(ask)
        self.took_s.append(time.monotonic() - began)
        return grant

    async def lost(self, owner: str) -> None:
        """See RayDirectory."""
        began = time.monotonic()
        await super().lost(owner)
        self.took_s.append(time.monotonic() - began)


def session_id(prefix: str, number: int) -> str:
    """As long as those that sessions get by themselves."""
    return f"{prefix}-{number}".ljust(32, "-")


def record_of(grant: Grant) -> bytes:
    state = (np.zeros((1, 8), np.float32),)
    return encode_checkpoint(Checkpoint(grant.session, IDLE.name, "", grant.epoch, 100, state))


async def fill_and_open(directory: RayDirectory, idle: int, seconds: float) -> dict[str, float]:
    """Fill the directory, then open more."""
    callers = [start_caller(number) for number in range(CALLERS)]
    process = psutil.Process(listening_at(await directory.ask(DirectoryService.address)))
    before = process.memory_info().rss
    began = time.monotonic()
    share = -(-idle // CALLERS)
    nbytes = sum(
        await asyncio.gather(*(caller.fill.remote(0, min(share, idle - i * share)) for i, caller in enumerate(callers)))
    )
    filled_s = time.monotonic() - began
    grown = process.memory_info().rss - before
    rates = await asyncio.gather(*(caller.open.remote(seconds) for caller in callers))
    return {
        "directory_sessions": float(sum((await directory.ask(DirectoryService.num_sessions)).values())),
        "directory_fill_s": filled_s,
        "directory_bytes_per_session": (grown - nbytes) / idle,
        "directory_opens_per_s": sum(rates),
    }


async def fail_over(moving: int) -> dict[str, float]:
    """Kill a replica that has `moving` sessions."""
    collect_seldom()  # as an ingress does
    directory = TimedDirectory(APP)
    hub = Hub(directory, ack_on_receipt=True)
    looker = start_caller(CALLERS)
    try:
        sessions: list[Session] = []
        while len(sessions) < 2 * moving:
            some = min(BURST, 2 * moving - len(sessions))
            sessions += await asyncio.gather(*(hub.open(model=MODEL) for _ in range(some)))
        await asyncio.gather(*(run(session) for session in sessions))
        victim = Counter(session.owner for session in sessions).most_common(1)[0][0]
        hit = [session for session in sessions if session.owner == victim]
        await looker.look.remote(next(session.name for session in sessions if session.owner != victim))
        directory.took_s.clear()
        pid = pid_of(ray.get_actor(f"SERVE_REPLICA::{APP}#Recurrent#{victim}", namespace=SERVE_NAMESPACE))
        began = time.monotonic()
        psutil.Process(pid).kill()
        await asyncio.gather(*(run(session) for session in hit))
        took_s = time.monotonic() - began
        looked_s = await looker.looked.remote()
        assert all(session.progress == 2 * TIMESTEPS and session.owner != victim for session in hit)
        return {
            "failover_sessions": float(len(hit)),
            "failover_10k_s": took_s,
            "failover_directory_p99_s": float(np.percentile(directory.took_s, 99)),
            "failover_directory_calls": float(len(directory.took_s)),
            "failover_lookup_p99_s": float(np.percentile(looked_s, 99)),
        }
    finally:
        await hub.stop()
        await directory.close()


async def run(session: Session) -> None:
    """A segment, and all of its outputs."""
    await session.wait(session.submit(np.ones((TIMESTEPS, *session.spec.input.shape), np.float32)))


def pid_of(actor: Any) -> int:
    """The process of an actor."""
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=10))


def listening_at(address: str) -> int:
    """The process of this machine that takes calls there."""
    port = int(address.rpartition(":")[2])
    listening = (each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN)
    return next(each.pid for each in listening if each.pid and each.laddr[1:] == (port,))


async def measure(idle: int, moving: int, seconds: float) -> dict[str, float]:
    """All figures, of the application that runs."""
    directory = RayDirectory(APP)
    owners = start_caller(CALLERS + 1)  # a process that does nothing else, as they would lose their lease if it did
    try:
        await owners.own.remote(idle)
        figures = await fill_and_open(directory, idle, seconds) | await fail_over(moving)
        held = await directory.ask(DirectoryService.num_sessions)
        assert all(f"idle-{number}" in held for number in range(IDLE_OWNERS)), "giving one up costs seconds"
        return figures
    finally:
        await directory.close()


@click.command()
@click.option("--idle", default=1_000_000, show_default=True, help="Sessions that the directory holds.")
@click.option("--moving", default=10_000, show_default=True, help="Sessions of the replica that is killed.")
@click.option("--seconds", default=10.0, show_default=True, help="For which new sessions are opened.")
@json_option
def main(idle: int, moving: int, seconds: float, json_file: Path | None) -> None:
    """Measure the directory: how many sessions it opens, holds and moves."""
    show_hardware()
    with local_cluster(num_nodes=1, cpus=4):
        serve.run(build(APPLICATION), name=APP, route_prefix=None)
        figures = asyncio.run(measure(idle, moving, seconds))
    click.echo(table(("figure", "value"), list(figures.items())))
    save(figures, json_file)


if __name__ == "__main__":
    main()
