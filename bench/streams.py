"""Single segments on gRPC streams into several ways in, with a large model and without: `python -m bench.streams`.

The model is that of bench.engine_cuda, a 7x1024 LSTM in fp16 with the 8 largest outputs; beside it stands `NoOp`, with
the same inputs and outputs, which computes nothing: what is left is the cost of the calls. Several unmodified
perf_analyzers send a timestep a message, the next of a sequence when the last is answered, to all ingress replicas at
their common port.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from bench.engine_cuda import LSTM
from bench.peers.servers import application, free_port
from bench.report import json_option, save, show_hardware, table
from bench.triton import analyze
from serve_app.spec import TensorSpec

TOP_K = 8
MODELS: Mapping[str, dict[str, Any]] = {
    "lstm": {"name": "rnn", "cell": "lstm", "top_k": TOP_K, "seed": 0, **LSTM},
    "noop": {"name": "bench.streams:NoOp", "input_size": LSTM["input"], "wire": "float16"},
}
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


def measure(
    model: dict[str, Any], input_size: int, ingresses: int, senders: int, sequences: int, seconds: float, num_gpus: int
) -> dict[str, float]:
    """Segments a second of all senders together, and the worst sender's delays."""
    port, total = free_port(), senders * sequences
    args = {
        "model": model,
        "num_gpus": num_gpus,
        "engine": {"slots": 2 * total, "max_batch_size": max(16, total)},
        "ingress_replicas": ingresses,
        "grpc": {"port": port},
    }
    options = ["--concurrency-range", str(sequences), "--shape", f"x:1,{input_size}", "--input-data", "zero"]
    with application(
        "serve_app.app:build", args, haproxy=False, port=port, served_as=model["name"], num_cpus=ingresses + 8
    ) as server, ThreadPoolExecutor(senders) as pool:  # fmt: skip
        for last in (False, True):  # the first warms everything up
            found = list(pool.map(lambda _: analyze(server, options, seconds if last else 1.0), range(senders)))
    rates, p50s, p99s = zip(*found, strict=True)
    return {"per_s": sum(rates), "p50_ms": max(p50s), "p99_ms": max(p99s)}


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="Of each of three windows of a run.")
@click.option("--runs", default=3, show_default=True)
@click.option("--ingresses", default="4", show_default=True, help="Numbers of ingress replicas, with commas.")
@click.option("--senders", default=4, show_default=True, help="perf_analyzers.")
@click.option("--sequences", default=256, show_default=True, help="Of each sender, at once.")
@click.option("--small", is_flag=True, help="A model for machines without a GPU.")
@json_option
def main(
    seconds: float, runs: int, ingresses: str, senders: int, sequences: int, small: bool, json_file: Path | None
) -> None:
    """Measure single-segment streams."""
    show_hardware()
    size = SMALL["input"] if small else LSTM["input"]
    shrunk = {"lstm": SMALL, "noop": {"input_size": size, "wire": "float32"}} if small else {}
    models = {name: model | shrunk.get(name, {}) for name, model in MODELS.items()}
    figures: dict[str, float] = {}
    rows = []
    for count in map(int, ingresses.split(",")):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for _ in range(runs):
            for name, model in models.items():
                each = measure(model, int(size), count, senders, sequences, seconds, num_gpus=0 if small else 1)
                found[name].append(each)
                click.echo(f"{count} ingresses, {name}: {each}")
        for name, results in found.items():
            result = {figure: median(each[figure] for each in results) for figure in results[0]}
            rows.append((count, name, *result.values()))
            figures |= {f"{figure}_{name}_{count}": value for figure, value in result.items()}
        figures[f"stream_vs_noop_{count}"] = figures[f"per_s_lstm_{count}"] / figures[f"per_s_noop_{count}"]
    figures["h100_stream_vs_noop"] = figures[f"stream_vs_noop_{count}"]
    figures["h100_stream_segments_per_s"] = figures[f"per_s_lstm_{count}"]
    click.echo(f"\n{table(('ingresses', 'model', 'segments/s', 'p50 ms', 'p99 ms'), rows)}")
    for name in ("h100_stream_vs_noop", "h100_stream_segments_per_s"):
        click.echo(f"{name}: {figures[name]:.2f}")
    save(figures, json_file)


if __name__ == "__main__":
    main()
