"""Single segments on gRPC streams into several ways in, with a large model and without: `python -m bench.streams`.

The model is that of bench.engine_cuda, a 7x1024 LSTM in fp16 with the 8 largest outputs; beside it stands `NoOp`, with
the same inputs and outputs, which computes nothing: what is left is the cost of the calls. Several unmodified
perf_analyzers send a timestep a message, the next of a sequence when the last is answered, to all ingress replicas at
their common port. The third is the naive application of bench.naive behind Serve's own proxy, with a model that is much
smaller and runs on the CPU, and with 64 sequences of one perf_analyzer, as in bench.triton.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from bench.engine_cuda import LSTM
from bench.peers.servers import MODEL as NAIVE_MODEL
from bench.peers.servers import Server, application, naive
from bench.report import json_option, save, show_hardware, table
from bench.triton import Start, analyze
from cluster.local import free_port
from serve_app.spec import TensorSpec

TOP_K = 8
NAIVE_SEQUENCES = 64
SMALL = {"dtype": "fp32", "input": 16, "hidden": 16, "layers": 1, "output": 16}


class NoOp:
    """A model that gives what it gets, the first TOP_K values of it, and has next to no state."""

    def __init__(self, input_size: int, wire: str) -> None:
        self.input = TensorSpec((input_size,), wire)
        self.outputs = {"values": TensorSpec((TOP_K,), wire), "indices": TensorSpec((TOP_K,), "int32")}
        self._indices = torch.arange(TOP_K, dtype=torch.int32)

    def initial_state(self, batch: int) -> torch.Tensor:
        """[batch, 1], zeros."""
        return torch.zeros(batch, 1)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The first values of x, at their places."""
        values = x[..., :TOP_K]
        return {"values": values, "indices": self._indices.to(x.device).expand(values.shape)}, state


def measure(start: Start, input_size: int, senders: int, sequences: int, seconds: float) -> dict[str, float]:
    """Segments a second of all senders together, and the worst sender's delays."""
    options = ["--concurrency-range", str(sequences), "--shape", f"x:1,{input_size}", "--input-data", "zero"]
    with start() as server, ThreadPoolExecutor(senders) as pool:
        for each_s in (2 * seconds, seconds):  # the first warms everything up, and stands still for that
            found = list(pool.map(partial(analyze, server, options), [each_s] * senders))
    rates, p50s, p99s = zip(*found, strict=True)
    return {"per_s": sum(rates), "p50_ms": max(p50s), "p99_ms": max(p99s)}


def lockstep(model: dict[str, Any], ingresses: int, total: int, num_gpus: int) -> AbstractContextManager[Server]:
    """Lockstep for so many sequences at once, at its own port."""
    port = free_port()
    args = {
        "model": model,
        "num_gpus": num_gpus,
        "engine": {"slots": 2 * total, "max_batch_size": max(16, total)},
        "ingress_replicas": ingresses,
        "grpc": {"port": port},
    }
    return application(
        "serve_app.app:build", args, haproxy=False, port=port, served_as=model["name"], num_cpus=ingresses + 8
    )


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="Of each of three windows of a run.")
@click.option("--runs", default=3, show_default=True)
@click.option("--ingresses", default=4, show_default=True)
@click.option("--senders", default=4, show_default=True, help="perf_analyzers.")
@click.option("--sequences", default=256, show_default=True, help="Of each sender, at once.")
@click.option("--beside/--no-beside", default=True, show_default=True, help="Measure the naive application, too.")
@click.option("--small", is_flag=True, help="A model for machines without a GPU.")
@json_option
def main(
    seconds: float, runs: int, ingresses: int, senders: int, sequences: int, beside: bool, small: bool,
    json_file: Path | None,
) -> None:  # fmt: skip
    """Measure single-segment streams."""
    show_hardware()
    lstm: dict[str, Any] = {"name": "rnn", "cell": "lstm", "top_k": TOP_K, "seed": 0, **(SMALL if small else LSTM)}
    wire = "float32" if small else "float16"
    noop = {"name": "bench.streams:NoOp", "input_size": lstm["input"], "wire": wire}
    start = partial(lockstep, ingresses=ingresses, total=senders * sequences, num_gpus=0 if small else 1)
    servers: dict[str, tuple[Start, int, int, int]] = {
        name: (partial(start, model), lstm["input"], senders, sequences)
        for name, model in {"lstm": lstm, "noop": noop}.items()
    }
    if beside:
        servers["naive"] = naive, NAIVE_MODEL["input"], 1, NAIVE_SEQUENCES
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for run in range(runs):
        for name, load in servers.items():
            found[name].append(measure(*load, seconds))
            click.echo(f"{run + 1}/{runs} {name}: " + ", ".join(f"{k} {v:,.1f}" for k, v in found[name][-1].items()))
    figures: dict[str, float] = {}
    rows = []
    for name, results in found.items():
        result = {figure: median(each[figure] for each in results) for figure in results[0]}
        rows.append((name, *result.values()))
        figures |= {f"{figure}_{name}": value for figure, value in result.items()}
    figures["h100_stream_vs_noop"] = figures["per_s_lstm"] / figures["per_s_noop"]
    figures["h100_stream_segments_per_s"] = figures["per_s_lstm"]
    claimed = ["h100_stream_vs_noop", "h100_stream_segments_per_s"]
    if beside:
        figures["h100_stream_vs_naive"] = figures["per_s_lstm"] / figures["per_s_naive"]
        claimed.append("h100_stream_vs_naive")
    click.echo(f"\n{table(('model', 'segments/s', 'p50 ms', 'p99 ms'), rows)}")
    for name in claimed:
        click.echo(f"{name}: {figures[name]:,.2f}")
    save(figures, json_file)


if __name__ == "__main__":
    main()
