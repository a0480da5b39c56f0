"""Servers to be measured side by side: Lockstep, and Triton in its configurations. Each runs alone, then stops."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
import psutil
import yaml

from bench.peers.fetch import ROOT, fetch_triton
from cluster.local import free_port
from serve_app.engine.host_env import REPLICA_ENV
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc

MODEL = {"input": 256, "hidden": 256, "layers": 2, "seed": 0}
START_WITHIN_S = 240
SERVICER = "serve_app.ingress.protos.oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
STRATEGIES = {
    "oldest": "oldest { max_candidate_sequences: 1024 }",
    "direct": "direct { }",
}


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs: its gRPC port, its model's name, its processes."""

    port: int
    model: str
    process: psutil.Process
    #: Processes that its own are not the parents of.
    others: list[psutil.Process] = field(default_factory=list)

    def cpu_s(self) -> float:
        """Seconds of CPU that its processes have used."""
        return self._sum(lambda process: sum(process.cpu_times()[:2]))

    def memory_mib(self) -> float:
        """Memory of its processes that they share with no other."""
        return self._sum(lambda process: process.memory_full_info().uss / 2**20)

    def _sum(self, of: Callable[[psutil.Process], float]) -> float:
        total = 0.0
        for process in [self.process, *self.process.children(recursive=True), *self.others]:
            with suppress(psutil.NoSuchProcess):
                total += of(process)
        return total

    def counts(self) -> tuple[int, int]:
        """Requests answered, and failed, since it has started, as it says itself."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            request = pb.ModelStatisticsRequest(name=self.model)
            (found,) = _stub(channel).ModelStatistics(request).model_stats
            return int(found.inference_stats.success.count), int(found.inference_stats.fail.count)


@contextmanager
def lockstep(way: Literal["own", "haproxy", "proxy"] = "own") -> Iterator[Server]:
    """Lockstep with the model of MODEL: at the gRPC port of its ingress, behind HAProxy, or Serve's own proxy."""
    port = free_port()
    args = {
        "model": {"name": "rnn", "cell": "lstm", **MODEL},
        "engine": {"slots": 1024, "max_batch_size": 256},
        "grpc": {"port": port},
    }
    with application(
        "serve_app.app:build", args, haproxy=way != "proxy", port=port if way == "own" else None
    ) as server:
        yield server


@contextmanager
def naive() -> Iterator[Server]:
    """The naive application (bench.peers.naive) behind Serve's own proxy."""
    with application("bench.peers.naive:build", {}, haproxy=False) as server:
        yield server


@contextmanager
def application(
    import_path: str,
    args: dict[str, Any],
    *,
    haproxy: bool = True,
    port: int | None = None,
    served_as: str = "rnn",
    num_cpus: int = 0,
) -> Iterator[Server]:
    """An application as our launcher starts it.

    port: of its gRPC, where it is not that of Serve. served_as: a model that is waited for. num_cpus: what Ray takes
    this machine for (0: what it is).
    """
    http, rpc = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="lb", dir="/tmp") as folder:
        config = Path(folder) / "config.yaml"
        served = {"name": "lockstep", "route_prefix": "/", "import_path": import_path, "args": args}
        config.write_text(
            yaml.dump(
                {
                    "http_options": {"host": "127.0.0.1", "port": http},
                    "grpc_options": {"port": rpc, "grpc_servicer_functions": [SERVICER]},
                    "applications": [served],
                }
            )
        )
        environment = {
            **os.environ,
            "RAY_TMPDIR": folder,
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            **({"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": num_cpus})} if num_cpus else {}),
        }
        command = [sys.executable, "-m", "serve_app", "--haproxy" if haproxy else "--no-haproxy", str(config)]
        with running(command, environment, port or rpc, served_as, Path(folder) / "log") as server:
            yield server


@contextmanager
def triton(
    version: str, strategy: str, *, ragged: bool = False, max_batch_size: int = 64, as_it_comes: bool = False
) -> Iterator[Server]:
    """Triton's server with the same model through its Python backend.

    ragged: requests of unequal length may be merged, and the model pads them. as_it_comes: without the allocator
    settings of our replicas; its speed is one of two then, by the luck of its heap at the start, most often the slow.
    """
    binaries, port = fetch_triton(version), free_port()
    with tempfile.TemporaryDirectory(prefix="triton") as folder:
        model = Path(folder) / "models" / "lstm"
        (model / "1").mkdir(parents=True)
        (model / "1" / "model.py").write_text((Path(__file__).parent / "model" / "model.py").read_text())
        parameters = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in MODEL.items())
        (model / "config.pbtxt").write_text(f"""name: "lstm"
backend: "python"
max_batch_size: {max_batch_size}
input {{ name: "x" data_type: TYPE_FP32 dims: [-1, {MODEL["input"]}] {"allow_ragged_batch: true" if ragged else ""} }}
output {{ name: "y" data_type: TYPE_FP32 dims: [-1, {MODEL["hidden"]}] }}
instance_group {{ count: 1 kind: KIND_CPU }}
sequence_batching {{ max_sequence_idle_microseconds: 2000000 {STRATEGIES[strategy]} }}
{parameters}""")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
            "PYTHONHOME": sys.base_prefix,
            "LOCKSTEP_PEERS_PATH": sysconfig.get_path("purelib"),
            "OMP_NUM_THREADS": "1",
            **({} if as_it_comes else REPLICA_ENV),
        }
        command = [
            str(binaries / "bin" / "tritonserver"), f"--model-repository={model.parent}",
            f"--backend-directory={binaries / 'backends'}", f"--grpc-port={port}", "--allow-http=false",
            "--allow-metrics=false", "--disable-auto-complete-config", "--exit-timeout-secs=1",
        ]  # fmt: skip
        with running(command, environment, port, "lstm", Path(folder) / "log") as server:
            yield server


@contextmanager
def running(command: list[str], environment: dict[str, str], port: int, model: str, log: Path) -> Iterator[Server]:
    """The server that a command starts, from when its model is ready. Raises RuntimeError with what it has logged."""
    before = set(psutil.pids())
    with log.open("w") as out:
        program = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_WITHIN_S
        while not _ready(port, model):
            if program.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} has not started:\n{log.read_text()}")
            time.sleep(0.2)
        process = psutil.Process(program.pid)
        tree = {process.pid, *(child.pid for child in process.children(recursive=True))}
        fresh = [psutil.Process(pid) for pid in psutil.pids() if pid not in before | tree]
        yield Server(port, model, process, fresh)
    finally:
        program.send_signal(signal.SIGTERM)
        program.wait(60)


def _ready(port: int, model: str) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = _stub(channel).ModelReady(pb.ModelReadyRequest(name=model), timeout=START_WITHIN_S)
        except grpc.RpcError:
            return False
        return bool(answer.ready)


def _stub(channel: grpc.Channel) -> Any:
    return oip_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
