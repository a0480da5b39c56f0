"""One Ray for all tests here, on ports and in a folder of its own; applications end with their module or their test."""

import gc
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.local import free_port
from serve_app.app import build


@pytest.fixture(scope="session")
def http_port() -> int:
    return free_port()


RAY_ENV = {
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # What nobody looks at here, and takes a tenth of two cores:
    "LOG_NAME_UPDATE_INTERVAL_S": "60",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


@pytest.fixture(scope="session")
def cluster(http_port: int) -> Iterator[None]:
    os.environ |= RAY_ENV
    with tempfile.TemporaryDirectory(prefix="ls", dir="/tmp") as folder:  # short: Ray puts sockets there
        ray.init(
            num_cpus=32,  # not of this machine: it only has to hold all test applications
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
            namespace="lockstep-tests",
        )
        serve.start(http_options={"port": http_port}, logging_config={"log_level": "ERROR"})
        yield
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def run_app(cluster: None) -> Iterator[Callable[..., DeploymentHandle[Any]]]:
    """Start an application, by name and arguments; it is deleted at the module's end."""
    yield from _deployed()


@pytest.fixture
def run_alone(cluster: None) -> Iterator[Callable[..., DeploymentHandle[Any]]]:
    """As `run_app`; it is deleted at the test's end."""
    yield from _deployed()


def _deployed() -> Iterator[Callable[..., DeploymentHandle[Any]]]:
    names = []

    def run(name: str, route_prefix: str | None = None, **args: Any) -> DeploymentHandle[Any]:
        names.append(name)
        return serve.run(build(args), name=name, route_prefix=route_prefix, external_scaler_enabled=True)

    yield run
    for name in dict.fromkeys(names):
        serve.delete(name)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    """What a test leaves open is found at its own end, not at that of the test during which Python happens to look."""
    yield
    gc.collect()
