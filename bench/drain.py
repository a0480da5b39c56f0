"""Scaling and a node that drains, under load: `python -m bench.drain [--json FILE]`.

The load of bench.chaos. The application goes from all replicas to one and back, then a node is drained (as a cloud does
with one that it will take back). Replicas that leave hand their sessions over, and those that come get their share:
`drain_gap_…` is the longest delay, from when a segment was due to when its outputs were there, of each session that
changed hands, around the time at which it did; processes that start meanwhile share the same cores. `replayed` counts
timesteps that ran twice.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import click
import numpy as np
from ray._private.state import actors
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from bench.chaos_load import PERIOD_S, Line, lstm, run_session, wrong
from bench.closed_loop import SEED
from bench.report import json_option, save, show_hardware, table
from clients.client import connect
from cluster.local import local_cluster
from serve_app.deployments.directory_service import DirectoryService
from serve_app.deployments.transport import RayDirectory
from serve_app.ingress.outbox import Outbox
from serve_app.session import Session

AROUND_S = 3 * PERIOD_S
"""Before and after a session changed hands; when it did is known with its next segment."""
SETTLED_S = 8.0
DRAIN_WITHIN_S = 60.0


class Replays:
    """Counts what runs again of sessions that move, in this process."""

    def __init__(self) -> None:
        self.timesteps = self.moves = 0
        moved: Callable[[Session, Outbox, int], None] = Session.moved

        def counted(session: Session, carrier: Outbox, timestep: int) -> None:
            self.moves += 1
            self.timesteps += session.progress - timestep
            moved(session, carrier, timestep)

        Session.moved = counted  # type: ignore[method-assign, assignment]


def scale(replicas: int) -> None:
    """Deploy as `serve deploy` does, with so many replicas as an override, and wait for them."""
    app = {
        "name": "lockstep",
        "route_prefix": None,
        "import_path": "serve_app.app:build",
        "args": {"model": {"name": "rnn", "seed": SEED}, "engine": {"device": "cpu"}},
        "deployments": [{"name": "Recurrent", "num_replicas": replicas}],
    }
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [app]}), _blocking=True)


def drain(address: str, node: str) -> None:
    """Have Ray drain the node, which is to be gone after a while. Raises RuntimeError if it does not."""
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = time.time_ns() // 10**6 + int(1000 * DRAIN_WITHIN_S)
    accepted, why = GcsClient(address=address).drain_node(node, reason, "bench", deadline_ms)
    if not accepted:
        raise RuntimeError(f"node {node} is not drained: {why}")


def owners_by_node() -> Counter[str]:
    """How many owners with sessions each node has."""
    held = asyncio.run(RayDirectory("lockstep").ask(DirectoryService.num_sessions))
    nodes = {actor["Name"].rpartition("#")[2]: actor["Address"]["NodeID"] for actor in actors().values()}
    return Counter(nodes[owner] for owner, count in held.items() if count)


async def load(lines: list[Line], over: Event) -> None:
    """All sessions."""
    async with connect("lockstep") as client:
        await asyncio.gather(*(run_session(client, line, over.is_set) for line in lines))


def run(lines: list[Line], replicas: int) -> dict[str, tuple[float, float]]:
    """All sessions; scale down and up, drain; when each began and ended."""
    windows: dict[str, tuple[float, float]] = {}
    with local_cluster(num_nodes=2, cpus=2 * replicas, head_cpus=0) as (cluster, nodes):
        scale(replicas)
        over = Event()
        with ThreadPoolExecutor(1) as threads:
            loading = threads.submit(asyncio.run, load(lines, over))
            try:
                time.sleep(SETTLED_S)
                for name, count in (("scale_down", 1), ("scale_up", replicas)):
                    began = time.monotonic()
                    scale(count)
                    time.sleep(SETTLED_S)
                    windows[name] = began, time.monotonic()
                owners = owners_by_node()
                node = max((node.node_id for node in nodes), key=lambda node: owners[node])
                left = owners[node]
                began = time.monotonic()
                drain(cluster.address, node)
                while left and time.monotonic() < began + DRAIN_WITHIN_S:
                    time.sleep(0.5)
                    left = owners_by_node()[node]
                emptied = time.monotonic()
                time.sleep(SETTLED_S / 2)
                windows["node"] = began, time.monotonic()
            finally:
                over.set()
            loading.result()
    if left or not owners[node]:
        raise RuntimeError(
            f"of {owners[node]} replicas with sessions on the node {left} were there {emptied - began:.0f} s after it "
            "began to drain"
        )
    return windows


def figures_of(lines: list[Line], windows: dict[str, tuple[float, float]], replays: Replays) -> dict[str, float]:
    """What was lost or ran twice, and how long gaps were, by what was done and over all."""
    figures: dict[str, float] = {
        "sessions": len(lines),
        "timesteps": sum(line.submitted for line in lines),
        "lost": sum(line.submitted - line.received for line in lines),
        "doubled": sum(line.doubled for line in lines),
        "wrong": wrong(lines),
        "moves": replays.moves,
        "replayed": replays.timesteps,
    }
    gaps: list[float] = []
    for name, (began, ended) in windows.items():
        moves = [(line, at) for line in lines for at, _ in line.epochs[1:] if began <= at < ended]
        found = [line.longest(at - AROUND_S, at + AROUND_S) for line, at in moves]
        figures[f"moved_{name}"] = len(found)
        if found:
            figures |= _percentiles(found, f"_{name}")
        gaps += found
    return figures | _percentiles(gaps, "")


def _percentiles(gaps: list[float], what: str) -> dict[str, float]:
    p50, p99 = np.percentile(gaps, [50, 99]).tolist()
    return {f"drain_gap_p50_s{what}": p50, f"drain_gap_p99_s{what}": p99}


@click.command()
@click.option("--sessions", default=500, show_default=True)
@click.option("--replicas", default=4, show_default=True)
@json_option
def main(sessions: int, replicas: int, json_file: Path | None) -> None:
    """Scale and drain under load, and look at every output."""
    show_hardware()
    lines, replays = [Line(i, lstm()) for i in range(sessions)], Replays()
    figures = figures_of(lines, run(lines, replicas), replays)
    click.echo(table(("figure", "value"), list(figures.items())))
    save(figures, json_file)


if __name__ == "__main__":
    main()
