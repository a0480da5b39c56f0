"""`python -m cluster.local`, as a user types it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from clients.blocking import BlockingClient
from cluster.local import free_port

pytestmark = [pytest.mark.serve, pytest.mark.timeout(120)]


def test_sessions_run_on_several_nodes_and_control_c_ends_all_of_them(repository: Path, tmp_path: Path) -> None:
    port, grpc = free_port(), free_port()
    config = yaml.safe_load((repository / "cluster/serve.yaml").read_text())
    config["http_options"]["port"], config["grpc_options"]["port"] = port, grpc
    config["applications"][0]["args"] = {
        "model": "rnn",
        "model.hidden": 8,
        "engine.device": "cpu",
        "ingress_replicas": 2,
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.dump(config))
    command = [sys.executable, "-m", "cluster.local", "--nodes", "2", "--cpus", "2", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        command, cwd=repository, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stdout
        ready = next((line for line in running.stdout if "Clients: " in line), "it ended")
        assert re.search(rf"ws://127.0.0.1:{port}\b", ready), ready
        for address in (f"ws://127.0.0.1:{port}", f"grpc://127.0.0.1:{grpc}"):
            with BlockingClient(address, timeout_s=20) as client, client.open() as session:
                assert session.wait(session.submit(np.zeros((3, *session.spec.input.shape), np.float32))) == 3
        started = psutil.Process(running.pid).children(recursive=True)
        assert {"gcs_server", "raylet", "haproxy"} <= {process.name() for process in started}
        os.killpg(running.pid, signal.SIGINT)
        running.communicate(timeout=60)
    assert running.returncode == 0
    _, left = psutil.wait_procs(started, 10)
    assert left == []
