"""Kills under load, and whether anybody noticed: `python -m bench.chaos [--seconds S] [--json FILE]`.

Sessions of two models send segments at a steady rate (bench.chaos_load), by a handle client, by WebSockets and by plain
gRPC streams, through a HAProxy on each node and two ingresses, to replicas on the nodes of a local cluster. Whenever
all runs, something is killed with SIGKILL: a replica, an ingress, both at once, a whole worker node, the session
directory, that and a replica, a HAProxy, the Serve controller; or a replica, or all of a node, is stopped by SIGSTOP
for longer than a lease. Gaps are from when a segment was due to when all of its outputs were there, the longest of each
session within the seconds after a kill: of sessions that have got another owner since, or another connection (`gap_…`),
and of all others (`others_…`). Who owns a session by WebSocket or gRPC is not known to its client: it is in neither,
unless its connection broke. Checkpoints are kept in a folder, since what dies may be the directory.

All nodes, and the clients, are on one machine: what starts again takes the cores of those who are measured, which have
machines of their own in life; where it is allowed clients go first. Of each model there are replicas enough that one is
left when a node is killed while another replica starts. A run of 15 minutes has fewer than 20 kills of each kind:
`--earlier FILE` counts in what an earlier run has written by `--json`, which is all that is done with `--seconds 0`.
"""

import asyncio
import itertools
import json
import math
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import click
import numpy as np
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from bench.chaos_load import FOREIGN, HANDLE, PERIOD_S, SOCKET, Line, load_apart, lstm, silero, wrong
from bench.closed_loop import SEED
from bench.directory import listening_at
from bench.report import json_option, save, show_hardware, table
from cluster.local import HAPROXY_PORTS, deploy, free_port, local_cluster
from serve_app.__main__ import find_haproxy
from serve_app.deployments.directory_service import DirectoryService
from serve_app.deployments.transport import SERVE_NAMESPACE, RayDirectory
from serve_app.errors import Unavailable

T = TypeVar("T")
HUNG_S = 10.0
NODES = 3
STOPPED_S, AWAKE_S = 5.0, 2.0
"""A node that was stopped is awake for a while, before it is replaced if Ray has given it up."""
WATCHED_S, WHOLE_WITHIN_S = 8.0, 60.0
"""After a kill; and until all that was lost runs again, which the next kill waits for."""
DIRECTORY_WITHIN_S = 60.0
KINDS = (
    "replica", "ingress", "directory", "ingress and replica", "node", "stopped replica", "proxy",
    "directory and replica", "stopped node", "controller",
)  # fmt: skip
SERVICER = "serve_app.ingress.protos.oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"


class Ports(NamedTuple):
    """Where the HAProxy of a node listens."""

    http: int
    grpc: int


def add_node(cluster: Cluster, cpus: int, ports: Ports) -> Any:
    """A worker node whose HAProxy listens there: all nodes have the ports of one machine."""
    os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(ports.http)
    os.environ["RAY_SERVE_WORKER_PROXY_GRPC_PORT"] = str(ports.grpc)
    os.environ |= {key: str(free_port()) for key in HAPROXY_PORTS}
    return cluster.add_node(num_cpus=cpus)


def send(signal_number: int, processes: Sequence[psutil.Process]) -> None:
    """To each that still is there."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal_number)


class Killer:
    """Knows what there is to kill. nodes: the worker nodes, by the ports of their HAProxy. owners: how many."""

    def __init__(self, cluster: Cluster, nodes: dict[Ports, Any], cpus: int, owners: int, rng: random.Random) -> None:
        self._cluster, self._nodes, self._cpus, self._num_owners, self._rng = cluster, nodes, cpus, owners, rng
        self._directory = RayDirectory("lockstep")

    def kill(self, kind: str) -> None:
        """Kill one of that kind, and see that another can come."""
        if kind.endswith("node"):
            self._kill_node(self._rng.choice(list(self._nodes)), stops=kind.startswith("stopped"))
        elif kind == "stopped replica":
            self._stop([psutil.Process(self._process("replica"))])
        elif kind == "proxy":
            nodes = [node.node_id for node in (self._cluster.head_node, *self._nodes.values())]
            send(signal.SIGKILL, self._rng.choice([found for node in nodes if (found := find_haproxy(node))]))
        else:
            send(signal.SIGKILL, [psutil.Process(self._process(what)) for what in kind.split(" and ")])

    def wait_for(self, sessions: int) -> None:
        """So many are open. Raises TimeoutError."""
        self._ask(DirectoryService.num_sessions, lambda held: sum(held.values()) >= sessions)

    def missing(self) -> list[str]:
        """What there is not, of: all replicas and ways in run, and the directory knows all owners."""
        try:
            status = serve.status()
            owners = asyncio.run(self._directory.ask(DirectoryService.num_sessions))
        except (RayError, RayServeException, Unavailable) as error:
            return [str(error)]
        deployments = status.applications["lockstep"].deployments
        found = [
            f"{name} {each.replica_states}"
            for name, each in deployments.items()
            if [*each.replica_states] != ["RUNNING"]
        ]
        ways = list(status.proxies.values())
        if ways != ["HEALTHY"] * NODES:
            found.append(f"proxies {ways}")
        if len(owners) != self._num_owners:
            found.append(f"the directory knows {', '.join(owners)}")
        return found

    def _stop(self, processes: Sequence[psutil.Process]) -> None:
        send(signal.SIGSTOP, processes)
        time.sleep(STOPPED_S)
        send(signal.SIGCONT, processes)

    def _kill_node(self, ports: Ports, *, stops: bool) -> None:
        """All processes of a node at once, as when its machine is gone; or only for a while, as when its network is."""
        node = self._nodes[ports]
        roots = [psutil.Process(each.process.pid) for kind in node.all_processes.values() for each in kind]
        processes = [*roots, *(child for root in roots for child in root.children(recursive=True))]
        if stops:
            self._stop(processes)
            time.sleep(AWAKE_S)
            if any(each["NodeID"] == node.node_id and each["Alive"] for each in ray.nodes()):  # type: ignore[no-untyped-call]
                return
        send(signal.SIGKILL, processes)
        send(signal.SIGKILL, find_haproxy(node.node_id))  # also one that was just being started
        self._cluster.remove_node(node, allow_graceful=False)
        self._nodes[ports] = add_node(self._cluster, self._cpus, ports)

    def _process(self, kind: str) -> int:
        if kind == "directory":
            return listening_at(self._ask(DirectoryService.address))
        if kind == "controller":
            actor: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace=SERVE_NAMESPACE)
        elif kind == "ingress":
            actor = ray.get_actor(self._named("SERVE_REPLICA::lockstep#Ingress#"), namespace=SERVE_NAMESPACE)
        else:
            held = self._ask(DirectoryService.num_sessions)
            owner = self._rng.choice([owner for owner, count in held.items() if count] or list(held))
            actor = ray.get_actor(self._named(f"#{owner}"), namespace=SERVE_NAMESPACE)
        return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=30))

    def _ask(self, method: Callable[[DirectoryService], Awaitable[T]], is_it: Callable[[T], bool] = bool) -> T:
        """What the directory says, once it is that: it may just start. Raises TimeoutError."""
        deadline = time.monotonic() + DIRECTORY_WITHIN_S
        while time.monotonic() < deadline:
            with suppress(Unavailable):
                if is_it(found := asyncio.run(self._directory.ask(method))):
                    return found
            time.sleep(0.1)
        raise TimeoutError(f"the directory has not known of what it should for {DIRECTORY_WITHIN_S} s")

    def _named(self, part: str) -> str:
        """The name of a replica that there is, or will be in a moment."""
        while True:
            names = [str(actor["name"]) for actor in ray.util.list_named_actors(all_namespaces=True)]
            if found := [name for name in names if part in name]:
                return self._rng.choice(found)
            time.sleep(0.1)


def deploy_models(replicas: int, store: str) -> None:
    """The application of both models, so that no node has all replicas of any deployment."""
    models = {
        "rnn": {"model": {"name": "rnn", "seed": SEED}, "replicas": replicas},
        "vad": {"model": {"name": "silero_vad"}, "replicas": replicas - 1},
    }
    most = {"Ingress": 1, "Recurrent-rnn": replicas // 2, "Recurrent-vad": -(-(replicas - 1) // NODES)}
    app = {
        "name": "lockstep",
        "route_prefix": "/",
        "import_path": "serve_app.app:build",
        "args": {
            "engine": {"device": "cpu"}, "ingress_replicas": 2, "durability": {"store": store}, "models": models,
        },
        "deployments": [{"name": name, "max_replicas_per_node": count} for name, count in most.items()],
    }  # fmt: skip
    deploy(ServeDeploySchema.model_validate({"applications": [app]}))


def run(
    cluster: str, killer: Killer, lines: Sequence[Line], ports: Sequence[Ports], kinds: Sequence[str], seconds: float
) -> tuple[Sequence[Line], list[tuple[str, float]]]:
    """All sessions, as they end, and kills of each kind in turn: what was killed when.

    After so many seconds, and each kind at least once, nothing is killed any more, and the load ends.

    Nodes are started by forks of this process, which gRPC in it would not survive: the clients are in another one.
    """
    kills: list[tuple[str, float]] = []
    sockets = ",".join(f"ws://127.0.0.1:{each.http}" for each in ports)
    rpc = [f"127.0.0.1:{each.grpc}" for each in ports]
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as processes:
        over = Path(folder) / "over"
        loading = processes.submit(load_apart, cluster, lines, sockets, rpc, over)
        try:
            killer.wait_for(len(lines))
            began = time.monotonic()
            for kind in itertools.cycle(kinds):
                wait([loading], WATCHED_S)
                deadline = time.monotonic() + WHOLE_WITHIN_S
                while (missing := killer.missing()) and not loading.done() and time.monotonic() < deadline:
                    time.sleep(0.2)
                now = time.monotonic()
                if loading.done() or (len(kills) >= len(kinds) and now > began + seconds):
                    click.echo(f"{now - began:4.0f} s: the load ends")
                    break
                click.echo(" ".join((f"{now - began:4.0f} s: {kind}", *(f"(missing: {each})" for each in missing))))
                kills.append((kind, now))
                killer.kill(kind)
        finally:
            over.touch()
        return loading.result(), kills


@click.command()
@click.option("--seconds", default=90.0, show_default=True, help="0: no run, see --earlier.")
@click.option("--sessions", default=500, show_default=True)
@click.option("--period", default=PERIOD_S, show_default=True, help="Seconds from one segment to the next.")
@click.option("--segment", default=5, show_default=True, help="Timesteps of one of the LSTM.")
@click.option("--speech", default=100, show_default=True, help="Of the sessions, of Silero.")
@click.option("--sockets", default=100, show_default=True, help="Of the sessions, by WebSocket.")
@click.option("--foreign", default=25, show_default=True, help="Of the sessions, by plain gRPC.")
@click.option("--named", default=12, show_default=True, help="Of those by plain gRPC, whose client has a name.")
@click.option(
    "--replicas", default=4, show_default=True, type=click.IntRange(4), help="Of the LSTM; of Silero one less."
)
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--earlier",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What an earlier run wrote by --json, to be counted in. May be given several times.",
)
@json_option
def main(
    seconds: float, sessions: int, period: float, segment: int, speech: int, sockets: int, foreign: int, named: int,
    replicas: int, kinds: str, seed: int, earlier: tuple[Path, ...], json_file: Path | None,
) -> None:  # fmt: skip
    """Kill things under load, and look at every output."""
    show_hardware()
    ways = [SOCKET] * sockets + [FOREIGN] * foreign + [HANDLE] * (sessions - sockets - foreign)
    works = [
        silero(period) if i * speech // sessions < (i + 1) * speech // sessions else lstm(segment, period)
        for i in range(sessions)
    ]
    lines: Sequence[Line] = [
        Line(1000 * seed + i, work, way) for i, (work, way) in enumerate(zip(works, ways, strict=True))
    ]
    for line in lines[sockets : sockets + named]:
        line.has_name = True
    lines, kills = chaos(lines, replicas, kinds.split(","), seconds, seed) if seconds else ([], [])
    for line in lines:
        if line.error is not None:
            click.echo(f"session {line.seed} by {line.way} has ended at timestep {line.received}: {line.error}")
    tell_hung(lines, kills)
    figures, delays = figures_of(lines, kills), delays_of(lines, kills)
    for line in lines:
        if line.wrong_at is not None:
            moves = " ".join(f"{at - line.epochs[0][0]:.1f}" for at, _ in line.epochs)
            click.echo(
                f"session {line.seed} by {line.way} is wrong at timestep {line.wrong_at} by {line.wrong_by:.2g}; "
                f"seconds at which it moved: {moves}"
            )
    for file in earlier:
        add_run(json.loads(file.read_text()), figures, delays)
    figures |= percentiles_of(delays)
    rows = [(name, value) for name, value in figures.items()]
    click.echo(table(("figure", "value"), rows))
    gaps = {kind: " ".join(map(str, found)) for kind, found in delays["gap"].items()}
    save(figures, json_file, gaps=gaps)


def chaos(
    lines: Sequence[Line], replicas: int, kinds: Sequence[str], seconds: float, seed: int
) -> tuple[Sequence[Line], list[tuple[str, float]]]:
    """See `run`, on a cluster that is there for it."""
    head, *ports = (Ports(free_port(), free_port()) for _ in range(NODES))
    cpus = replicas  # of a node; two can hold all replicas
    rpc = {"port": head.grpc, "grpc_servicer_functions": [SERVICER]}
    with (
        TemporaryDirectory() as store,
        local_cluster(0, cpus, head.http, cpus, rpc, proxies="EveryNode") as (cluster, _),
    ):
        nodes = {each: add_node(cluster, cpus, each) for each in ports}
        deploy_models(replicas, store)
        killer = Killer(cluster, nodes, cpus, 2 * replicas - 1, random.Random(seed))
        return run(cluster.address, killer, lines, [head, *ports], kinds, seconds)


def tell_hung(lines: Sequence[Line], kills: list[tuple[str, float]]) -> None:
    """Whose outputs were due for too long after which kill."""
    for number, (kind, at) in enumerate(kills, 1):
        until = kills[number][1] if number < len(kills) else math.inf
        hung = Counter(f"{line.work.model} by {line.way}" for line in lines if line.gap(at, until) > HUNG_S)
        if hung:
            click.echo(f"hung after kill {number}, {kind}: {', '.join(f'{n} of {who}' for who, n in hung.items())}")


def add_run(report: Mapping[str, Any], figures: dict[str, float], delays: "Delays") -> None:
    """Count an earlier run in: its figures but the sessions', which are as many each time, and its gaps."""
    figures["sessions"] = max(figures["sessions"], report["figures"]["sessions"])
    counted = ("timesteps", "failed", "lost", "doubled", "wrong", "hung")
    for name, value in report["figures"].items():
        if name in counted or name.startswith("kills_"):
            figures[name] = figures.get(name, 0) + value
    for kind, gaps in report["gaps"].items():
        delays["gap"].setdefault(kind, []).extend(map(float, gaps.split()))


Delays = dict[str, dict[str, list[float]]]
"""Gaps ("gap") and what others waited ("others"), by kind of kill."""


def delays_of(lines: Sequence[Line], kills: list[tuple[str, float]]) -> Delays:
    """The longest delay of each session after each kill."""
    delays: Delays = {"gap": {}, "others": {}}
    for kind, at in kills:
        for line in lines:
            what = "gap" if line.hit(at, WATCHED_S) else "others" if line.way == HANDLE else None
            if what is not None:
                delays[what].setdefault(kind, []).append(round(line.gap(at, at + WATCHED_S), 3))
    return delays


def figures_of(lines: Sequence[Line], kills: list[tuple[str, float]]) -> dict[str, float]:
    """What was lost, doubled, hung or wrong, and how often each kind was killed."""
    counts = Counter(kind for kind, _ in kills)
    return {
        "sessions": len(lines),
        "timesteps": sum(line.submitted for line in lines),
        "failed": sum(line.error is not None for line in lines),
        "lost": sum(line.submitted - line.received for line in lines),
        "doubled": sum(line.doubled for line in lines),
        "wrong": wrong(lines),
        "hung": sum(late > HUNG_S for line in lines for _, late in line.delays) + sum(len(line.due) for line in lines),
        **{f"kills_{_name(kind)}": count for kind, count in counts.items()},
    }


def percentiles_of(delays: Delays) -> dict[str, float]:
    """How long gaps were, by kind of kill and over all."""
    figures: dict[str, float] = {}
    for what, by_kind in delays.items():
        for kind, found in by_kind.items():
            p50, p99 = np.percentile(found, [50, 99]).tolist()
            figures |= {f"{what}_p50_s_{_name(kind)}": p50, f"{what}_p99_s_{_name(kind)}": p99}
    figures |= {f"hit_{_name(kind)}": len(found) for kind, found in delays["gap"].items()}
    if gaps := [gap for found in delays["gap"].values() for gap in found]:
        p50, p99 = np.percentile(gaps, [50, 99]).tolist()
        figures |= {"gap_p50_s": p50, "gap_p99_s": p99}
    return figures


def _name(kind: str) -> str:
    return kind.replace(" ", "_")


if __name__ == "__main__":
    main()
