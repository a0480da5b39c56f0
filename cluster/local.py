"""A cluster of several nodes on this machine: `python -m cluster.local --nodes 2 --cpus 4 configs/vad.yaml`.

Each node is a Ray of its own (`ray.cluster_utils.Cluster`), so replicas are placed, lost and moved as on machines of
their own. HAProxy is at the head alone, as one machine has each port once. Control-C ends all that was started.
"""

import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from serve_app.__main__ import end_haproxy, haproxy_env, interrupt

HAPROXY_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
FALLBACK_PORTS = ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT")
"""Besides those for clients: others on this machine may have Ray's own."""
_given: set[int] = set()  # by `free_port`


@contextmanager
def local_cluster(
    num_nodes: int,
    cpus: int,
    http_port: int | None = None,
    head_cpus: int = 1,
    grpc_options: dict[str, Any] | None = None,
    log: bool = False,
    proxies: str = "HeadOnly",
) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head, where the driver and Serve's controller are, and HAProxy if it has a port; and worker nodes.

    log: whether this process prints the warnings of Serve and of replicas. proxies: where HAProxy is; with "EveryNode"
    each node that is added needs ports of its own.
    """
    with TemporaryDirectory(prefix="lc", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        if http_port is not None:
            ports = {key: str(free_port()) for key in (*HAPROXY_PORTS, *FALLBACK_PORTS)}
            os.environ |= {**haproxy_env(Path(folder)), **ports}
            # An ingress that ends would stay for half a minute, for clients that HAProxy may still send there.
            os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0"
        os.environ["RAY_TMPDIR"] = folder  # Ray writes there which cluster is the current one
        health = {
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 3,
            "health_check_initial_delay_ms": 500,
            "worker_niceness": 0,  # or a node that starts, with agents of 0, would hold up all others on these cores
        }
        head = {"num_cpus": head_cpus, "_system_config": health, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = [cluster.add_node(num_cpus=cpus) for _ in range(num_nodes)]
            ray.init(address=cluster.address, namespace="cluster", log_to_driver=log)
            proxy = {"location": "NoServer"} if http_port is None else {"location": proxies, "port": http_port}
            logs = {"log_level": "WARNING" if log else "ERROR"}
            serve.start(http_options=proxy, grpc_options=grpc_options, logging_config=logs)
            yield cluster, nodes
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]
            end_haproxy(folder)


def free_port() -> int:
    """One that nobody listens at now, of those that the kernel gives to nobody either: it is free until it is used."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


def deploy(config: ServeDeploySchema) -> None:
    """Deploy as `serve deploy` does, and wait until all applications run. Raises RuntimeError if one does not."""
    client: Any = _get_global_client()
    client.deploy_apps(config)
    while True:
        found = serve.status().applications
        states = {app.name: found[app.name] for app in config.applications if app.name in found}
        for name, state in states.items():
            if state.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise RuntimeError(f"application {name!r} is {state.status}: {state.message}")
        if [state.status for state in states.values()] == [ApplicationStatus.RUNNING] * len(config.applications):
            return
        time.sleep(0.2)


@click.command()
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(1), help="Besides the head.")
@click.option("--cpus", default=4, show_default=True, type=click.IntRange(1), help="Of each node, as Ray counts them.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(nodes: int, cpus: int, file: Path) -> None:
    """Run the configuration in FILE on several nodes, all of them on this machine, until Control-C."""
    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    except (ValidationError, yaml.YAMLError) as error:
        raise click.ClickException(f"{file} is no configuration of Serve: {error}") from error
    for end in (signal.SIGINT, signal.SIGTERM):
        signal.signal(end, interrupt)
    port = config.http_options.port
    try:
        with local_cluster(nodes, cpus, port, 0, config.grpc_options.model_dump(), log=True) as (cluster, _):
            deploy(config)
            click.echo(f"{nodes} nodes of {cpus} CPUs. Clients: ws://127.0.0.1:{port}; Ray: {cluster.address}")
            signal.pause()
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
