"""Everything that can be killed is, under load; nobody notices. In a cluster of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.serve, pytest.mark.timeout(480)]


def test_nothing_is_lost_doubled_wrong_or_hung(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    kinds = ("ingress and replica", "directory", "node", "stopped replica")
    sizes = {"seconds": 90, "sessions": 100, "speech": 20, "sockets": 20, "foreign": 10, "kinds": ",".join(kinds)}
    command = [sys.executable, "-m", "bench.chaos", *(f"--{name}={value}" for name, value in sizes.items())]
    command += ["--json", str(file)]
    # Before each kill the bench waits up to a minute until all is there again.
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=450, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    figures = json.loads(file.read_text())["figures"]
    assert {name: figures[name] for name in ("failed", "lost", "doubled", "wrong", "hung")} == {
        "failed": 0, "lost": 0, "doubled": 0, "wrong": 0, "hung": 0,
    }, done.stdout[-5000:]  # fmt: skip
    assert all(figures[f"kills_{kind.replace(' ', '_')}"] >= 1 for kind in kinds)
    assert all(figures[f"hit_{kind}"] >= 1 for kind in ("node", "ingress_and_replica", "stopped_replica"))
    assert figures["timesteps"] > 10_000
