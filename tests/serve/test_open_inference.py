"""Triton's clients against the application as its launcher starts it.

Behind HAProxy, behind Serve's own proxy, and past both, at the ingress's own gRPC port.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import torch
import yaml

from cluster.local import free_port
from serve_app.config import ModelConfig
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc
from serve_app.models import registry

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]

MODEL = {"name": "rnn", "cell": "lstm", "input": 8, "hidden": 16, "layers": 2}
SERVICER = "serve_app.ingress.protos.oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
CLIENTS = Path(".venv-tritonclient/bin/python")
SEQUENCES, TIMESTEPS = 100, 20


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of sequences, and what the local module makes of them."""
    options = {name: value for name, value in MODEL.items() if name != "name"}
    model = registry.load(ModelConfig("rnn", options))
    x = torch.randn(TIMESTEPS, SEQUENCES, 8)
    with torch.inference_mode():
        y, _ = model.forward(x, model.initial_state(SEQUENCES))
    assert isinstance(y, torch.Tensor)
    path = tmp_path_factory.mktemp("expected") / "sequences.npz"
    np.savez(path, x=x.transpose(0, 1).contiguous().numpy(), y=y.transpose(0, 1).numpy())
    return path


@pytest.fixture(scope="module", params=["--haproxy", "--no-haproxy"])
def application(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repository: Path
) -> Iterator[dict[str, str]]:
    """Addresses of an application in a Ray of its own: of gRPC through Serve, and past it, and of HTTP."""
    folder = tmp_path_factory.mktemp("ray")
    http, rpc, own = free_port(), free_port(), free_port()
    config = folder / "config.yaml"
    application = {
        "name": "lockstep",
        "route_prefix": "/",
        "import_path": "serve_app.app:build",
        "args": {"model": MODEL, "engine": {"slots": 256, "max_batch_size": 64}, "grpc": {"port": own}},
    }
    config.write_text(
        yaml.dump(
            {
                "http_options": {"host": "127.0.0.1", "port": http},
                "grpc_options": {"port": rpc, "grpc_servicer_functions": [SERVICER]},
                "applications": [application],
            }
        )
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_TMPDIR": f"/tmp/lt{os.getpid()}",  # short: Ray puts sockets there
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
    log = folder / "log"
    with log.open("w") as out:
        running = subprocess.Popen(
            [sys.executable, "-m", "serve_app", request.param, str(config)],
            cwd=repository, env=environment, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_until(lambda: answers_http(http) and answers_grpc(rpc) and answers_grpc(own), running, log)
            yield {name: f"127.0.0.1:{port}" for name, port in (("serve", rpc), ("own", own), ("http", http))}
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(60)


def wait_until(holds: Callable[[], bool], running: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert running.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def answers_http(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/v2/models/rnn/ready").status_code == 200
    except httpx.TransportError:
        return False


def answers_grpc(port: int) -> bool:
    """HAProxy leads gRPC to the replicas some seconds after HTTP."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            ready = oip_pb2_grpc.GRPCInferenceServiceStub(channel).ModelReady(pb.ModelReadyRequest(name="rnn"))
        except grpc.RpcError:
            return False
        return bool(ready.ready)


@pytest.mark.parametrize("way", ["serve", "own"])
def test_tritons_clients(application: dict[str, str], way: str, expected: Path, repository: Path) -> None:
    addresses = {"LOCKSTEP_GRPC": application[way], "LOCKSTEP_HTTP": application["http"]}
    command = [str(repository / CLIENTS), "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(repository / "tests/tritonclient/check_clients.py")],
        env={**os.environ, **addresses, "LOCKSTEP_EXPECTED": str(expected)},
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
