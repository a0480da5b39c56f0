"""Lockstep beside Triton, under the same unmodified perf_analyzer: `python -m bench.triton [--json FILE]`.

The model is a 2x256 LSTM in fp32 on one torch thread; Triton has it through its Python backend, which is the only one
that its wheels carry. It runs as it comes, and `tuned`: with the allocator settings of our replicas, which make it
faster. Each figure is there against both. Requests go over gRPC streams, one segment a message, the next of a sequence
when the last is answered. Servers and perf_analyzer share this machine; each server runs alone, in turn, several times;
medians count.

`steps`: 64 sequences, 1 timestep each, against Triton 2.36 with the `oldest` strategy: 2.51 crashes with it at 64
streams. With `direct` the 99th percentile of either is longer, and runs of 2.51 mostly do not end. `ragged`: 32
sequences, lengths uniform in 1 … 16, against its default, which merges only requests of equal length, and against its
ragged batching with padding in the model. Lockstep takes requests at the gRPC port of its ingress; beside that stand
the way through HAProxy and the naive application of bench.naive behind Serve's own proxy.
"""

import csv
import io
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median

import click
import numpy as np

from bench.peers.fetch import fetch_analyzer
from bench.peers.servers import MODEL, Server, lockstep, naive, triton
from bench.report import json_option, save, show_hardware, table

Start = Callable[[], AbstractContextManager[Server]]
OURS = "Lockstep"
NAIVE = "plain Ray Serve"
STEPS: Mapping[str, Start] = {
    OURS: lockstep,
    "Lockstep behind HAProxy": partial(lockstep, "haproxy"),
    NAIVE: naive,
    "Triton 2.36": partial(triton, "2.36", "oldest", as_it_comes=True),
    "Triton 2.36, tuned": partial(triton, "2.36", "oldest"),
}
RAGGED: Mapping[str, Start] = {
    OURS: lockstep,
    "Triton 2.36, default": partial(triton, "2.36", "oldest", as_it_comes=True),
    "Triton 2.36, default, tuned": partial(triton, "2.36", "oldest"),
    "Triton 2.36, padded": partial(triton, "2.36", "oldest", ragged=True, as_it_comes=True),
    "Triton 2.36, padded, tuned": partial(triton, "2.36", "oldest", ragged=True),
}
SEQUENCE_LENGTH = 50
MAX_TIMESTEPS = 16
WINDOWS = 3
"""That perf_analyzer measures."""


def measure(start: Start, options: list[str], seconds: float) -> dict[str, float]:
    """One run of perf_analyzer against a server of its own."""
    with start() as server:
        analyze(server, options, seconds)  # warms everything up
        (count, _), cpu_s = server.counts(), server.cpu_s()
        rate, p50_ms, p99_ms = analyze(server, options, seconds)
        answered, used_s = server.counts()[0] - count, server.cpu_s() - cpu_s
    return {"per_s": rate, "p50_ms": p50_ms, "p99_ms": p99_ms, "per_cpu_s": answered / used_s}


def analyze(server: Server, options: list[str], seconds: float) -> tuple[float, float, float]:
    """Requests a second, and percentiles of their delay in ms."""
    program = fetch_analyzer()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        command = [
            str(program), "-m", server.model, "-u", f"127.0.0.1:{server.port}", "-i", "grpc", "--streaming", "--async",
            "--sequence-length", str(SEQUENCE_LENGTH), "--measurement-interval", str(int(seconds * 1000)),
            "--stability-percentage", "999", "--max-trials", str(WINDOWS), "-f", str(report), *options,
        ]  # fmt: skip
        environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=10 * seconds + 60
        )
        if done.returncode != 0 or not report.exists():
            raise RuntimeError(f"perf_analyzer has failed:\n{done.stdout}{done.stderr}")
        (row,) = csv.DictReader(io.StringIO(report.read_text()))
    return float(row["Inferences/Second"]), float(row["p50 latency"]) / 1e3, float(row["p99 latency"]) / 1e3


def ragged_data(file: Path, sequences: int) -> None:
    """Sequences for perf_analyzer, whose requests have 1 … MAX_TIMESTEPS timesteps."""
    rng = np.random.default_rng(0)
    data = []
    for _ in range(sequences):
        lengths = rng.integers(1, MAX_TIMESTEPS + 1, SEQUENCE_LENGTH).tolist()
        draws = [rng.standard_normal((length, MODEL["input"]), np.float32).round(4) for length in lengths]
        data.append([{"x": {"content": x.reshape(-1).tolist(), "shape": list(x.shape)}} for x in draws])
    file.write_text(json.dumps({"data": data}))


def compare(servers: Mapping[str, Start], options: list[str], seconds: float, runs: int) -> dict[str, dict[str, float]]:
    """The median of each figure, by server; the servers take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for run in range(runs):
        for name, start in servers.items():
            found[name].append(measure(start, options, seconds))
            click.echo(f"{run + 1}/{runs} {name}: " + ", ".join(f"{k} {v:,.1f}" for k, v in found[name][-1].items()))
    return {
        name: {figure: median(each[figure] for each in results) for figure in results[0]}
        for name, results in found.items()
    }


@click.command()
@click.option("--seconds", default=4.0, show_default=True, help="Of each of three windows of a run.")
@click.option("--runs", default=5, show_default=True)
@json_option
def main(seconds: float, runs: int, json_file: Path | None) -> None:
    """Measure Lockstep beside Triton."""
    show_hardware()
    figures: dict[str, float] = {}
    steps = compare(STEPS, ["--concurrency-range", "64", "--shape", f"x:1,{MODEL['input']}"], seconds, runs)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "ragged.json"
        ragged_data(data, 32)
        ragged = compare(RAGGED, ["--concurrency-range", "32", "--input-data", str(data)], seconds, runs)
    for kind, results in (("steps", steps), ("ragged", ragged)):
        head = ("server", "segments/s", "p50 ms", "p99 ms", "segments per CPU-second")
        click.echo(f"\n{kind}\n{table(head, [(name, *result.values()) for name, result in results.items()])}")
        for name, result in results.items():
            figures |= {f"{kind}_{figure}: {name}": value for figure, value in result.items()}
    ours, ours_ragged = steps[OURS], ragged[OURS]
    for tuned in ("", "_tuned"):
        way = ", tuned" if tuned else ""
        best = steps[f"Triton 2.36{way}"]
        figures |= {
            f"vs_triton_best{tuned}": ours["per_s"] / best["per_s"],
            f"vs_triton_best_p99{tuned}": best["p99_ms"] / ours["p99_ms"],
            f"vs_triton_cpu{tuned}": ours["per_cpu_s"] / best["per_cpu_s"],
            f"vs_triton_ragged_default{tuned}": ours_ragged["per_s"] / ragged[f"Triton 2.36, default{way}"]["per_s"],
            f"vs_triton_ragged_padded{tuned}": ours_ragged["per_s"] / ragged[f"Triton 2.36, padded{way}"]["per_s"],
        }
    figures["vs_naive_grpc"] = ours["per_s"] / steps[NAIVE]["per_s"]
    for name, figure in figures.items():
        if name.startswith("vs_"):
            click.echo(f"{name}: {figure:.2f}")
    save(figures, json_file)


if __name__ == "__main__":
    main()
