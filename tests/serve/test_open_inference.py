"""Triton's clients against the application as its launcher starts it.

Behind HAProxy, behind Serve's own proxy, and past both, at the ingress's own gRPC port.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
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
SERVES_GRPC_PORTS = range(31500, 32500)
"""That Serve gives ingresses. Neither `free_port` nor the kernel gives them to others, as it does of Serve's own."""
MAX_TRIES = 100
"""Of the requests of a sequence, that are not answered."""


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
    """See `started`."""
    with started(request.param, tmp_path_factory.mktemp("ray"), repository) as (addresses, _):
        yield addresses


@contextmanager
def started(
    proxy: str, folder: Path, repository: Path, ingresses: int = 1
) -> Iterator[tuple[dict[str, str], "subprocess.Popen[bytes]"]]:
    """An application in a Ray of its own. Addresses of gRPC through Serve, and past it, and of HTTP; its launcher."""
    http, rpc, own = free_port(), free_port(), free_port()
    config = folder / "config.yaml"
    application = {
        "name": "lockstep",
        "route_prefix": "/",
        "import_path": "serve_app.app:build",
        "args": {
            "model": MODEL,
            "engine": {"slots": 256, "max_batch_size": 64},
            "grpc": {"port": own},
            "ingress_replicas": ingresses,
        },
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
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(SERVES_GRPC_PORTS.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(SERVES_GRPC_PORTS.stop),
    }
    Path(environment["RAY_TMPDIR"]).mkdir(exist_ok=True)
    log = folder / "log"
    with log.open("w") as out:
        running = subprocess.Popen(
            [sys.executable, "-m", "serve_app", proxy, str(config)],
            cwd=repository, env=environment, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_until(lambda: answers_http(http) and answers_grpc(rpc) and answers_grpc(own), running, log)
            yield {name: f"127.0.0.1:{port}" for name, port in (("serve", rpc), ("own", own), ("http", http))}, running
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


def ask_once(address: str, method: str, message: Any) -> Any:
    """One call over a connection of its own."""
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        return getattr(oip_pb2_grpc.GRPCInferenceServiceStub(channel), method)(message, timeout=20)


class Lost(Exception):
    """A request that was not answered: it may have run."""


class Resend(Exception):
    """The server has said from which timestep."""


def infer_grpc(address: str, sequence: int, x: np.ndarray, start: bool, end: bool) -> np.ndarray:
    """One request over a connection of its own, as any client of the protocol makes it."""
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape}
    request = pb.ModelInferRequest(model_name="rnn", inputs=[tensor], raw_input_contents=[x.tobytes()])
    request.parameters["sequence_id"].int64_param = sequence
    request.parameters["sequence_start"].bool_param, request.parameters["sequence_end"].bool_param = start, end
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            answer = oip_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=20)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise Resend(int(dict(error.trailing_metadata())["expected"])) from error
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED):
                raise Lost(str(error)) from error
            raise
    return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(x), -1)


def infer_http(address: str, sequence: int, x: np.ndarray, start: bool, end: bool) -> np.ndarray:
    """The same."""
    parameters = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    tensor = {"name": "x", "datatype": "FP32", "shape": x.shape, "data": x.ravel().tolist()}
    try:
        answer = httpx.post(
            f"http://{address}/v2/models/rnn/infer", json={"parameters": parameters, "inputs": [tensor]}, timeout=20
        )
    except httpx.TransportError as error:
        raise Lost(str(error)) from error
    if answer.status_code == 409 and "expected" in answer.json():
        raise Resend(answer.json()["expected"])
    if answer.status_code in (500, 502, 503, 504):
        raise Lost(answer.text)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["outputs"][0]["data"], np.float32).reshape(len(x), -1)


def run_session(address: str, name: str, x: np.ndarray, y: np.ndarray) -> int:
    """A session of plain HTTP, each call over a connection of its own; how many calls were not answered."""
    url, lost, got = f"http://{address}/v1/sessions", 0, list[list[float]]()
    httpx.post(url, json={"session": name}).raise_for_status()
    sent = 0
    while len(got) < len(x):
        try:
            if sent < len(x):
                body = {"x": x[sent : sent + 2].tolist(), "start": sent}
                answer = httpx.post(f"{url}/{name}/segments", json=body, timeout=20)
                if answer.status_code == 409:
                    sent = answer.json()["error"]["details"]["expected"]
                    continue
                answer.raise_for_status()
                sent += 2
            answer = httpx.get(f"{url}/{name}/outputs", params={"start": len(got), "wait_s": 2}, timeout=20)
            answer.raise_for_status()
            got += answer.json()["outputs"]["y"]
            sent = max(len(got), min(sent, answer.json()["next"]))
        except (httpx.TransportError, httpx.HTTPStatusError):
            lost += 1
            time.sleep(0.2)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
    return lost


def run_sequence(
    infer: Callable[..., np.ndarray], address: str, sequence: int, x: np.ndarray, y: np.ndarray
) -> tuple[int, int]:
    """All of a sequence; how many requests were not answered, and how often it was told to resend."""
    at = lost = told = 0
    why: list[str] = []
    while at < len(x):
        assert len(why) < MAX_TRIES, why[-3:]
        end = min(len(x), at + 1 + (sequence + at) % 3)
        try:
            found = infer(address, sequence, x[at:end], at == 0, end == len(x))
        except Lost as error:
            lost += 1
            why.append(f"at {at} lost: {error}")
            time.sleep(0.2)
        except Resend as error:
            told += 1
            why.append(f"at {at} told {error}: {error.__cause__}")
            (at,) = error.args
        else:
            np.testing.assert_allclose(found, y[at:end], rtol=1e-5, atol=1e-5)
            at = end
            time.sleep(0.03)
    return lost, told


def serves_ports(ingress: psutil.Process) -> set[int]:
    """Those that it listens at for Serve's gRPC."""
    found = {each.laddr.port for each in ingress.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
    return found & {*SERVES_GRPC_PORTS}


def can_be_shared(port: int) -> bool:
    """Whether another process can listen at the port of one that does."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            other.bind(("0.0.0.0", port))
        except OSError:
            return False
        return True


def test_sequences_come_in_through_any_ingress_and_outlive_it(expected: Path, tmp_path: Path, repository: Path) -> None:
    """Two ingresses, every request over a connection of its own; one ingress is killed in between."""
    file = np.load(expected)
    x, y = file["x"], file["y"]
    with (
        started("--haproxy", tmp_path, repository, ingresses=2) as (addresses, launcher),
        ThreadPoolExecutor(16) as pool,
    ):

        def sequences(count: int, first: int) -> "list[Future[tuple[int, int]]]":
            ways = ((infer_grpc, "serve"), (infer_grpc, "own"), (infer_http, "http"))
            return [
                pool.submit(run_sequence, infer, addresses[way], first + i, x[i], y[i])
                for i in range(count)
                for infer, way in [ways[i % 3]]
            ]

        ingresses = [
            process
            for process in psutil.Process(launcher.pid).children(recursive=True)
            if process.cmdline()[:1] == ["ray::ServeReplica:lockstep:Ingress"]
        ]
        assert len(ingresses) == 2
        wait_until(lambda: all(map(serves_ports, ingresses)), launcher, tmp_path / "log")
        assert not any(can_be_shared(port) for each in ingresses for port in serves_ports(each)), (
            "an ingress of another node or cluster would get some of its clients"
        )
        assert {each.result() for each in sequences(12, 1)} == {(0, 0)}
        ask = pb.ModelStatisticsRequest(name="rnn")
        answers = [ask_once(addresses["own"], "ModelStatistics", ask) for _ in range(8)]  # of either ingress
        counts = {answer.model_stats[0].inference_count for answer in answers}
        assert len(counts) == 1, "each counts for itself"
        assert counts.pop() >= 12 * TIMESTEPS / 3
        memory = shared_memory.SharedMemory(create=True, size=64)
        try:
            region = pb.SystemSharedMemoryRegisterRequest(name="r", key=memory.name, byte_size=64)
            ask_once(addresses["own"], "SystemSharedMemoryRegister", region)
            for _ in range(8):
                known = ask_once(addresses["own"], "SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest())
                assert known.regions["r"].key == memory.name
        finally:
            memory.close()
            memory.unlink()

        running = sequences(12, 101)
        session = pool.submit(run_session, addresses["http"], "a", x[0], y[0])
        time.sleep(0.5)
        ingresses[0].kill()
        told = sum(told for _, told in (each.result() for each in running))
        assert 0 < told <= 3 * len(running)  # those whose ingress it was
        session.result()
        assert ask_once(addresses["own"], "ModelStatistics", ask).model_stats[0].inference_count > 0


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
