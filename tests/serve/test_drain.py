"""Replicas leave, by scaling and with a node that drains, under load: nothing runs again. In a cluster of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.serve, pytest.mark.timeout(240)]


def test_nothing_runs_again_when_replicas_leave_and_a_node_drains(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "drain.json"
    command = [sys.executable, "-m", "bench.drain", "--sessions", "60", "--replicas", "2"]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=repository, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    figures = json.loads(file.read_text())["figures"]
    assert {name: figures[name] for name in ("lost", "doubled", "wrong", "replayed")} == {
        "lost": 0, "doubled": 0, "wrong": 0, "replayed": 0,
    }  # fmt: skip
    assert figures["moved_scale_down"] == 30 and figures["moved_scale_up"] >= 20 and figures["moved_node"] >= 1
