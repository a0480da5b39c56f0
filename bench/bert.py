"""BERT in dynamic batches, against batches of one, against the bare model, and rows of their own length against padded.

    python -m bench.bert [--device cuda] [--study] [--json FILE]

BERT for question answering with random weights: base in fp16 on a GPU, mini (4 layers of 256) in fp32 on a CPU. Rows
are handed to a `Batcher` in this process, which is what a replica has, OUTSTANDING of them at any time; a batch has at
most as many as let each instance of the model have what it may have on its way. All figures are of one run. It needs
transformers, and no Ray; on a machine without network, unpack the wheels of `pip download transformers` into a folder
that is in PYTHONPATH.

`bert_dynamic_vs_1`: rows/s in batches as they come, to rows/s in batches of one. `bert_vs_raw`: the former to the rate
of the bare model at the same mean batch, on a GPU replayed as one CUDA graph on inputs that lie on the device.
`bert_low_load_over_raw_ms`: median delay of one row at a time, less the bare model's time for it. `ragged_vs_padded`:
rows/s of rows as long as sentences of docs/, to rows/s when each has the maximum.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
import uvloop

from bench.batched import sentence_lengths
from bench.report import ROOT, json_option, save, show_hardware, table, use_replica_env
from serve_app.config import AppConfig, load_config
from serve_app.engine.batch_graphs import DEPTH
from serve_app.engine.batcher import DTYPES, Batcher, build_batcher
from serve_app.engine.cuda_runner import capture
from serve_app.models import registry
from serve_app.rows import RowsRequest

OUTSTANDING = 64
VOCABULARY = 30_000
WARM_UP_S = 0.5
TOLERANCE = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.03}
"""Of the largest difference of a score in a batch and alone, to the root of the scores' mean square."""
SIZE = {"cpu": "mini", "cuda": "base"}
SECOND_SIZE, SECOND_LENGTH = {"cpu": "mini", "cuda": "large"}, 384
"""Of the study."""
DTYPE = {"cpu": "fp32", "cuda": "fp16"}

Scores = dict[int, np.ndarray]
"""Of rows, by their index."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The model that is served, with random weights: its size, tokens of a row at most, device, dtype."""

    size: str
    length: int
    device: str
    dtype: str

    @property
    def name(self) -> str:
        """As a title."""
        return f"BERT {self.size}, {self.dtype}, {self.length} tokens"

    def args(self, batching: Mapping[str, Any], *, ragged: bool = False) -> dict[str, Any]:
        """Of an application; on a GPU rows are padded to `length`, or if ragged packed."""
        options = {"weights": "random", "size": self.size, "head": "answer", "input": "tokens"}
        lengths = {} if ragged else {"graph_lengths": [self.length], "pack": False}
        return {
            "model": {"name": "bert", **options, "max_length": self.length},
            "engine": {"device": self.device},
            "batching": {"dtype": self.dtype, **lengths, **batching},
        }


@dataclass(frozen=True, slots=True)
class Load:
    """Rows a second, median and 99th percentile of a row's delay, rows of a batch."""

    rate: float
    p50_ms: float
    p99_ms: float
    mean_batch: float


def config_of(setting: Setting, max_batch: int, instances: int, *, ragged: bool = False) -> AppConfig:
    """See Setting.args."""
    return load_config(setting.args({"max_batch_size": max_batch, "instances": instances}, ragged=ragged))


def rows_of(lengths: Sequence[int]) -> list[RowsRequest]:
    """A row of each length, of random tokens."""
    rng = np.random.default_rng(0)
    return [RowsRequest({"input_ids": rng.integers(1, VOCABULARY, (1, length))}) for length in lengths]


async def drive(batcher: Batcher, rows: Sequence[RowsRequest], outstanding: int, seconds: float) -> tuple[Load, Scores]:
    """So many rows outstanding at any time, for `seconds` after WARM_UP_S; and what each row gave at first."""
    scores: Scores = {}
    delays: list[float] = []
    began = time.monotonic() + WARM_UP_S
    batches = batcher.stats.rows, batcher.stats.batches

    async def one(index: int) -> None:
        nonlocal batches
        now = time.monotonic()
        while now < began + seconds:
            sent = now
            result = await batcher.infer(rows[index % len(rows)])
            now = time.monotonic()
            if now >= began:
                delays.append(now - sent)
            else:
                batches = batcher.stats.rows, batcher.stats.batches
            scores.setdefault(index % len(rows), result.values["start"][0])
            index += outstanding

    await asyncio.gather(*(one(index) for index in range(outstanding)))
    p50_s, p99_s = np.percentile(delays, [50, 99]).tolist()
    mean_batch = (batcher.stats.rows - batches[0]) / (batcher.stats.batches - batches[1])
    return Load(len(delays) / (time.monotonic() - began), p50_s * 1e3, p99_s * 1e3, mean_batch), scores


def measure(
    config: AppConfig, rows: Sequence[RowsRequest], loads: Sequence[int], seconds: float
) -> list[tuple[Load, Scores]]:
    """Each number of outstanding rows, at the same batcher."""

    async def run() -> list[tuple[Load, Scores]]:
        batcher = build_batcher(config)
        found = [await drive(batcher, rows, outstanding, seconds) for outstanding in loads]
        await batcher.stop()
        return found

    return uvloop.run(run())  # the event loop that Ray gives a replica


@torch.inference_mode()
def raw_s(setting: Setting, batch: int, seconds: float) -> float:
    """Seconds of the bare model for so many rows of full length: the median; on a GPU of a CUDA graph's replays."""
    device = torch.device(setting.device)
    model = registry.load_stateless(config_of(setting, 1, 1).model)
    assert isinstance(model, torch.nn.Module)
    model.to(device, DTYPES[setting.dtype]).eval()
    ids = torch.randint(1, VOCABULARY, (batch, setting.length), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs["attention_mask"][:, -1] = 0  # a mask of ones alone, transformers would leave out

    def step() -> None:
        model.forward(inputs)

    run: Callable[[], None] = step
    if device.type == "cuda":
        run = capture(step, device, torch.cuda.graph_pool_handle()).replay
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


def error(found: Scores, expected: Scores) -> float:
    """The largest difference of the same rows' scores, to the root of their mean square."""
    rows = found.keys() & expected.keys()
    difference = max(float(np.abs(found[row] - expected[row]).max()) for row in rows)
    return difference / float(np.sqrt(np.mean(np.concatenate([expected[row] for row in rows]) ** 2)))


def figures_of(
    setting: Setting, instances: int, seconds: float, lengths: Sequence[int]
) -> tuple[dict[str, float], dict[str, Load]]:
    """The figures, and the loads that they come from."""
    full, ragged = rows_of([setting.length] * OUTSTANDING * 4), rows_of(lengths)
    max_batch = OUTSTANDING // (instances * (DEPTH if setting.device == "cuda" else 1))
    ((single, _),) = measure(config_of(setting, 1, instances), full, [OUTSTANDING], seconds)
    (dynamic, _), (low, _) = measure(config_of(setting, max_batch, instances), full, [OUTSTANDING, 1], seconds)
    batch = round(dynamic.mean_batch)
    raw, raw_one = raw_s(setting, batch, seconds / 4), raw_s(setting, 1, seconds / 4)
    ((short, together),) = measure(
        config_of(setting, max_batch, instances, ragged=True), ragged, [OUTSTANDING], seconds
    )
    ((_, alone),) = measure(config_of(setting, 1, 1, ragged=True), ragged, [1], min(2.0, seconds))
    figures = {
        "bert_dynamic_vs_1": dynamic.rate / single.rate,
        "bert_vs_raw": dynamic.rate * raw / batch,
        "bert_low_load_over_raw_ms": low.p50_ms - raw_one * 1e3,
        "ragged_vs_padded": short.rate / dynamic.rate,
        "bert_batched_error": error(together, alone),
        "bert_raw_rows_per_s": batch / raw,
        "bert_raw_1_ms": raw_one * 1e3,
    }
    return figures, {"batches of 1": single, "dynamic": dynamic, "1 outstanding": low, "dynamic, ragged": short}


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--size", type=click.Choice(["mini", "base", "large"]), help="base on a GPU, mini on a CPU.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="fp16 on a GPU, fp32 on a CPU.")
@click.option("--length", default=128, show_default=True, help="Tokens of a row at most.")
@click.option("--instances", default="1,2", show_default=True, help="The figures are of the first.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Of each.")
@click.option("--study", is_flag=True, help="Instead, DeepLearningExamples' study over gRPC: see bench.bert_study.")
@json_option
def main(
    *,
    device: str,
    size: str | None,
    dtype: str | None,
    length: int,
    instances: str,
    seconds: float,
    study: bool,
    json_file: Path | None,
) -> None:
    """Measure, print, and write the figures."""
    use_replica_env()
    show_hardware()
    torch.set_num_threads(1)
    setting = Setting(size or SIZE[device], length, device, dtype or DTYPE[device])
    if study:
        from bench import bert_study  # and gRPC, which the rest does not need

        second = replace(setting, size=SECOND_SIZE[device], length=SECOND_LENGTH)
        bert_study.run([setting, second], seconds, json_file)
        return
    lengths = [min(length, each) for each in sentence_lengths(ROOT / "docs")]
    figures: dict[str, float] = {}
    runs: dict[str, object] = {}
    for count in map(int, instances.split(",")):
        found, loads = figures_of(setting, count, seconds, lengths)
        figures = figures or found
        runs[f"instances={count}"] = {"figures": found, "loads": {n: as_row(load) for n, load in loads.items()}}
        click.echo(f"\nBERT {setting.size}, {setting.dtype}, {length} tokens, {count} instances of the model")
        head = ["", "rows/s", "p50 ms", "p99 ms", "rows of a batch"]
        click.echo(table(head, [[name, *as_row(load).values()] for name, load in loads.items()]))
        click.echo(table(["figure", ""], list(found.items())))
    workload = {**as_row(setting), "mean_length_ragged": float(np.mean(lengths)), "outstanding": OUTSTANDING}
    save(figures, json_file, runs=runs, workload=workload)
    if not figures["bert_batched_error"] <= TOLERANCE[setting.dtype]:
        raise click.ClickException(f"scores in batches are off, allowed is {TOLERANCE[setting.dtype]}")


def as_row(values: Load | Setting) -> Mapping[str, object]:
    """The fields by name."""
    return {name: getattr(values, name) for name in values.__slots__}


if __name__ == "__main__":
    main()
