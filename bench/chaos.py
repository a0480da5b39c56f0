"""Kills under load, and whether anybody noticed: `python -m bench.chaos [--seconds S] [--json FILE]`.

Sessions of the 2x256 LSTM send segments at a steady rate, by a handle client, and some of them by WebSockets through
HAProxy and two ingresses, to replicas on the nodes of a local cluster. Every few seconds something is killed with
SIGKILL: a replica, an ingress, both at once, a whole worker node, the session directory, that and a replica, HAProxy,
the Serve controller; or a replica is stopped by SIGSTOP for longer than its lease. Every output of every session is
compared with the bare module's, and each timestep has to come once, in order. Gaps are from when a segment was due to
when all of its outputs were there, the longest of each session within the seconds after a kill: of sessions that have
got another owner since, or another connection (`gap_…`), and of all others (`others_…`). Who owns a session by
WebSocket is not known to its client: it is in neither, unless its connection broke. Checkpoints are kept in a folder,
since what dies may be the directory.
"""

import asyncio
import itertools
import os
import random
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import psutil
import ray
import torch
from ray import serve
from ray.cluster_utils import Cluster

from bench.closed_loop import INPUT, SEED, TOLERANCE, plain_module
from bench.report import json_option, save, show_hardware, table
from clients.client import Client, connect
from clients.session import Session
from cluster.local import free_port, local_cluster
from serve_app.__main__ import find_haproxy
from serve_app.app import build
from serve_app.deployments.transport import NAMESPACE, SERVE_NAMESPACE

SEGMENT, PERIOD_S = 5, 0.5
KEPT = 8
"""Columns of an output that are compared."""
HUNG_S = 10.0
STOPPED_S = 5.0
WATCHED_S = 8.0
"""After a kill."""
KINDS = (
    "replica", "ingress", "node", "directory", "ingress and replica", "stopped replica", "proxy",
    "directory and replica", "controller",
)  # fmt: skip
RESUME_WITHIN_S = 60.0


@dataclass
class Line:
    """One session: what it has sent, what came back, and how late."""

    seed: int
    by_socket: bool = False
    epochs: list[tuple[float, int]] = field(default_factory=list)
    due: deque[tuple[int, float]] = field(default_factory=deque)
    outputs: list[np.ndarray] = field(default_factory=list)
    received: int = 0
    submitted: int = 0
    doubled: int = 0
    delays: list[tuple[float, float]] = field(default_factory=list)  # when due, how late

    def inputs(self, timesteps: int) -> np.ndarray:
        """x [timesteps, INPUT]; the first are the same, however many."""
        return np.random.default_rng(self.seed).standard_normal((timesteps, INPUT), np.float32)

    def longest(self, begin: float, end: float) -> float:
        """Of the segments that were due then, the longest delay; of those that never came, until now."""
        found = [late for due, late in self.delays if begin <= due < end]
        found += [time.monotonic() - due for _, due in self.due if begin <= due < end]
        return max(found, default=0.0)

    def hit(self, at: float) -> bool:
        """Whether a kill was of its owner, or its way in: it has got another since."""
        return any(at <= then < at + WATCHED_S for then, _ in self.epochs[1:])


async def run_session(client: Client, line: Line, until: float, model: str | None = None) -> None:
    """Send segments when they are due, take outputs as they come."""
    session = await client.open(model=model)
    reader = asyncio.create_task(read(session, line))
    x = line.inputs(int((until - time.monotonic()) / PERIOD_S + 10) * SEGMENT)
    due = time.monotonic() + random.Random(line.seed).random() * PERIOD_S
    while due < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        line.submitted = session.submit(x[line.submitted : line.submitted + SEGMENT])
        line.due.append((line.submitted, due))
        due += PERIOD_S
        if not line.epochs or line.epochs[-1][1] != session.epoch:
            line.epochs.append((time.monotonic(), session.epoch))
    await session.close()
    await reader


async def read(session: Session, line: Line) -> None:
    async for outputs in session.outputs():
        now = time.monotonic()
        line.doubled += max(0, line.received - outputs.start)
        assert outputs.start <= line.received, "outputs come in order"
        line.outputs.append(outputs.values["y"][line.received - outputs.start :, :KEPT])
        line.received = outputs.end
        while line.due and line.due[0][0] <= line.received:
            _, due = line.due.popleft()
            line.delays.append((due, now - due))


def wrong(line: Line) -> bool:
    """Whether an output is not the bare module's."""
    x = torch.from_numpy(line.inputs(line.submitted)[: line.received])[:, None]
    expected, _ = plain_module()(x)
    found = np.concatenate([np.empty((0, KEPT), np.float32), *line.outputs])
    return not np.abs(found - expected[:, 0, :KEPT].numpy()).max(initial=0.0) <= TOLERANCE


class Killer:
    """Knows what there is to kill. `haproxy`: the folder with the files of the one in front."""

    def __init__(self, cluster: Cluster, nodes: list[Any], cpus: int, haproxy: str, rng: random.Random) -> None:
        self._cluster, self._nodes, self._cpus, self._haproxy, self._rng = cluster, nodes, cpus, haproxy, rng

    def kill(self, kind: str) -> None:
        """Kill one of that kind, and see that another can come."""
        if kind == "node":
            node = self._nodes.pop(self._rng.randrange(len(self._nodes)))
            self._cluster.remove_node(node, allow_graceful=False)
            self._nodes.append(self._cluster.add_node(num_cpus=self._cpus))
            return
        if kind == "proxy":
            processes = find_haproxy(self._haproxy)
        else:
            processes = [psutil.Process(self._process(what)) for what in kind.split(" and ")]
        for process in processes:
            if kind == "stopped replica":
                process.suspend()
                time.sleep(STOPPED_S)
                process.resume()
            else:
                process.kill()

    def _process(self, kind: str) -> int:
        directory: Any = ray.get_actor("directory:lockstep", namespace=NAMESPACE)
        if kind == "directory":
            actor = directory
        elif kind == "controller":
            actor = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace=SERVE_NAMESPACE)
        elif kind == "ingress":
            actor = ray.get_actor(self._ingress(), namespace=SERVE_NAMESPACE)
        else:
            held = ray.get(directory.num_sessions.remote(), timeout=10)
            owner = self._rng.choice([owner for owner, count in held.items() if count] or list(held))
            actor = ray.get_actor(f"SERVE_REPLICA::lockstep#Recurrent#{owner}", namespace=SERVE_NAMESPACE)
        return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=30))

    def _ingress(self) -> str:
        """The name of one that there is, or will be in a moment."""
        while True:
            names = [str(actor["name"]) for actor in ray.util.list_named_actors(all_namespaces=True)]
            if found := [name for name in names if name.startswith("SERVE_REPLICA::lockstep#Ingress#")]:
                return self._rng.choice(found)
            time.sleep(0.1)


async def load(lines: list[Line], address: str, until: float) -> None:
    """All sessions."""
    async with connect("lockstep") as by_handle, connect(address, resume_within_s=RESUME_WITHIN_S) as by_socket:
        await asyncio.gather(*(run_session(by_socket if line.by_socket else by_handle, line, until) for line in lines))


def run(
    killer: Killer, lines: list[Line], address: str, kinds: tuple[str, ...], seconds: float
) -> list[tuple[str, float]]:
    """All sessions, and kills of each kind in turn; returns what was killed when."""
    kills: list[tuple[str, float]] = []
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(1) as threads:  # nodes can be added by the main thread only
        loading = threads.submit(asyncio.run, load(lines, address, until))
        for kind in itertools.cycle(kinds):
            wait([loading], WATCHED_S)
            if loading.done() or time.monotonic() > until - WATCHED_S:
                break
            kills.append((kind, time.monotonic()))
            killer.kill(kind)
        loading.result()
    return kills


@click.command()
@click.option("--seconds", default=90.0, show_default=True)
@click.option("--sessions", default=500, show_default=True)
@click.option("--sockets", default=100, show_default=True, help="Of the sessions, by WebSocket.")
@click.option("--replicas", default=4, show_default=True)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--seed", default=0, show_default=True)
@json_option
def main(
    seconds: float, sessions: int, sockets: int, replicas: int, kinds: str, seed: int, json_file: Path | None
) -> None:
    """Kill things under load, and look at every output."""
    show_hardware()
    lines = [Line(1000 * seed + i, by_socket=i < sockets) for i in range(sessions)]
    port = free_port()
    with (
        TemporaryDirectory() as store,
        local_cluster(num_nodes=2, cpus=replicas, http_port=port) as (cluster, nodes),
    ):
        model = {"name": "rnn", "seed": SEED}
        arguments = {"model": model, "engine.device": "cpu", "replicas": replicas, "ingress_replicas": 2}
        serve.run(build({**arguments, "durability.store": store}), name="lockstep", route_prefix="/")
        killer = Killer(cluster, nodes, replicas, os.environ["RAY_TMPDIR"], random.Random(seed))
        kills = run(killer, lines, f"ws://127.0.0.1:{port}", tuple(kinds.split(",")), seconds)
    figures = figures_of(lines, kills)
    rows = [(name, value) for name, value in figures.items()]
    click.echo(table(("figure", "value"), rows))
    save(figures, json_file)


def figures_of(lines: list[Line], kills: list[tuple[str, float]]) -> dict[str, float]:
    """What was lost, doubled, hung or wrong, and how long gaps were, by kind of kill and over all."""
    figures: dict[str, float] = {
        "sessions": len(lines),
        "timesteps": sum(line.submitted for line in lines),
        "lost": sum(line.submitted - line.received for line in lines),
        "doubled": sum(line.doubled for line in lines),
        "wrong": sum(map(wrong, lines)),
        "hung": sum(late > HUNG_S for line in lines for _, late in line.delays) + sum(len(line.due) for line in lines),
    }
    gaps: list[float] = []
    for kind in dict.fromkeys(kind for kind, _ in kills):
        times = [at for each, at in kills if each == kind]
        found = [(line, at, line.longest(at - PERIOD_S, at + WATCHED_S)) for at in times for line in lines]
        hit = [late for line, at, late in found if line.hit(at)]
        others = [late for line, at, late in found if not (line.by_socket or line.hit(at))]
        name = kind.replace(" ", "_")
        figures |= {f"kills_{name}": len(times), f"hit_{name}": len(hit)}
        for what, delays in (("gap", hit), ("others", others)):
            if delays:
                p50, p99 = np.percentile(delays, [50, 99]).tolist()
                figures |= {f"{what}_p50_s_{name}": p50, f"{what}_p99_s_{name}": p99}
        gaps += hit
    if gaps:
        p50, p99 = np.percentile(gaps, [50, 99]).tolist()
        figures |= {"gap_p50_s": p50, "gap_p99_s": p99}
    return figures


if __name__ == "__main__":
    main()
