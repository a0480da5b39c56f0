"""A cluster of several nodes on this machine."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from serve_app.__main__ import end_haproxy, haproxy_env

HAPROXY_PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
"""Besides the one for clients: others on this machine may have Ray's own."""


@contextmanager
def local_cluster(
    num_nodes: int, cpus: int, http_port: int | None = None, head_cpus: int = 1
) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head, where the driver and Serve's controller are, and HAProxy if it has a port; and worker nodes."""
    with TemporaryDirectory(prefix="lc", dir="/tmp") as folder:
        (Path(folder) / "ray").mkdir()
        if http_port is not None:
            os.environ |= {**haproxy_env(Path(folder)), **{key: str(free_port()) for key in HAPROXY_PORTS}}
        os.environ["RAY_TMPDIR"] = folder  # Ray writes there which cluster is the current one
        health = {
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 1000,
            "health_check_failure_threshold": 3,
            "health_check_initial_delay_ms": 500,
        }
        head = {"num_cpus": head_cpus, "_system_config": health, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            nodes = [cluster.add_node(num_cpus=cpus) for _ in range(num_nodes)]
            ray.init(address=cluster.address, namespace="chaos", log_to_driver=False)
            proxy = {"location": "NoServer"} if http_port is None else {"location": "HeadOnly", "port": http_port}
            serve.start(http_options=proxy, logging_config={"log_level": "ERROR"})
            yield cluster, nodes
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
            cluster.shutdown()  # type: ignore[no-untyped-call]
            end_haproxy(folder)


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
