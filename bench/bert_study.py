"""The study of BERT on Triton in NVIDIA's DeepLearningExamples, with Lockstep: its configurations, loads and figures.

Requests of 1 or 8 rows go over gRPC by the Open Inference Protocol, each client's next when the last is answered. The
configurations are models of one application, of which one is asked at a time. Where the time of a request goes: the
client measures how long it makes a message and reads an answer; the server says when it had the message, when its rows
stood in the queue, how long they waited and their batch took, and when the answer was ready, by the machine's clock.
What is between is the network: gRPC's own work and, with Ray, Serve's proxy.
"""

import asyncio
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc
import numpy as np

from bench.bert import VOCABULARY, Setting
from bench.peers.servers import Server, application, running
from bench.report import save, table
from cluster.local import free_port
from serve_app.ingress.protos import oip_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"
WARM_UP_S = 0.5
WITH_RAY = importlib.util.find_spec("ray") is not None
PARTS = (
    "client send", "network to it", "server receive", "queue", "compute", "server send", "network back",
    "client receive",
)  # fmt: skip
COLORS = ("tab:purple", "tab:gray", "tab:brown", "tab:orange", "tab:green", "tab:olive", "tab:cyan", "tab:pink")
TOLD = ("began_us", "queued_us", "queue_us", "compute_us", "total_us")
"""By the server."""


class Kind(NamedTuple):
    """A configuration: rows of a request, how they are batched, and how many requests are outstanding."""

    title: str
    rows: int
    batching: Mapping[str, Any]
    outstanding: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


PREFERRED = {"max_batch_size": 8, "preferred_batch_sizes": [4, 8], "max_queue_delay_s": 0.005}
KINDS: Mapping[str, Kind] = {
    "static_1": Kind("static batching, batch size 1", 1, {"max_batch_size": 1}),
    "static_8": Kind("static batching, batch size 8", 8, {"max_batch_size": 8}, (1, 2, 4, 6, 8)),
    "dynamic": Kind("dynamic batching, 4 and 8 preferred, 5 ms", 1, PREFERRED),
    "no_delay": Kind("dynamic batching, 64 at most, no delay", 1, {"max_batch_size": 64}),
    "static_1_x4": Kind("static, batch size 1, 4 instances", 1, {"max_batch_size": 1, "instances": 4}),
    "dynamic_x4": Kind("dynamic, 4 and 8 preferred, 5 ms, 4 instances", 1, {**PREFERRED, "instances": 4}),
}
FIGURES = {3: "static_1", 4: "static_8", 5: "static_1", 6: "dynamic", 7: "static_1", 8: "static_1_x4"}
"""The study's, by number: what each shows. 1 and 2 show all, in either setting."""


@dataclass(frozen=True, slots=True)
class Point:
    """At so many requests outstanding: rows a second, delay of a request, its means by part, rows of a batch."""

    outstanding: int
    rows_per_s: float
    mean_ms: float
    p50_ms: float
    p99_ms: float
    mean_batch: float
    parts_ms: Mapping[str, float]


def request(model: str, rows: int, length: int) -> pb.ModelInferRequest:
    """One of so many rows of full length, of random tokens."""
    ids = np.random.default_rng().integers(1, VOCABULARY, (rows, length))
    tensor = {"name": "input_ids", "datatype": "INT64", "shape": ids.shape}
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=[ids.tobytes()])


async def measure(port: int, model: str, length: int, outstanding: int, seconds: float) -> Point:
    """So many clients for `seconds`, after WARM_UP_S."""
    rows = KINDS[model].rows
    took: list[tuple[float, ...]] = []  # of each request: all its seconds, then those of each part
    batches: list[int] = []
    began = time.monotonic() + WARM_UP_S

    async def client(call: Any) -> None:
        while (start := time.monotonic()) < began + seconds:
            message = request(model, rows, length).SerializeToString()
            sent = time.monotonic()
            answer = await call(message)
            arrived = time.monotonic()
            response = pb.ModelInferResponse.FromString(answer)
            for raw in response.raw_output_contents:
                np.frombuffer(raw, np.float32)
            end = time.monotonic()
            if end >= began:
                read, queued, queue, compute, total = (response.parameters[name].int64_param / 1e6 for name in TOLD)
                ready, computed = read + total, queued + queue + compute
                there = read - sent, queued - read, queue, compute, ready - computed, arrived - ready
                took.append((end - start, sent - start, *there, end - arrived))
                batches.append(response.parameters["batch_size"].int64_param)

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(METHOD)  # bytes to bytes
        await asyncio.gather(*(client(call) for _ in range(outstanding)))
    lasted = time.monotonic() - began
    all_ms = np.array(took) * 1e3
    p50, p99 = np.percentile(all_ms[:, 0], [50, 99])
    mean, *parts = all_ms.mean(0).tolist()
    by_part = dict(zip(PARTS, parts, strict=True))
    rate = len(took) * rows / lasted
    return Point(outstanding, rate, mean, float(p50), float(p99), float(np.mean(batches)), by_part)


@contextmanager
def served(models: Mapping[str, Mapping[str, Any]]) -> Iterator[Server]:
    """A server of these models: an application of Ray Serve, or where that is not there, the same over gRPC alone."""
    name = next(iter(models))
    if WITH_RAY:
        build, args, cpus = "serve_app.app:build", {"models": models}, len(models) + 1
        with application(build, args, served_as=name, num_cpus=cpus) as server:
            yield server
        return
    port = free_port()
    command = [sys.executable, "-m", "bench.bert_server", str(port), json.dumps({"models": models})]
    with (
        tempfile.TemporaryDirectory() as folder,
        running(command, dict(os.environ), port, name, Path(folder) / "log") as server,
    ):
        yield server


def run(settings: Sequence[Setting], seconds: float, json_file: Path | None) -> None:
    """Measure each setting in turn, print, write tables into the file and pictures beside it."""
    found = {setting.name: points_of(setting, seconds) for setting in settings}
    figures = figures_of(found[settings[0].name])
    click.echo(table(["figure", ""], list(figures.items())))
    tables = {
        name: {kind: [asdict(p) for p in points] for kind, points in by_kind.items()} for name, by_kind in found.items()
    }
    save(figures, json_file, tables=tables, with_ray=WITH_RAY)
    if json_file is not None:
        draw(json_file)


def points_of(setting: Setting, seconds: float) -> dict[str, list[Point]]:
    """Each configuration in turn, as the application's models."""
    models = {name: setting.args(kind.batching) for name, kind in KINDS.items()}
    if setting.device == "cuda":
        models = {name: {**args, "num_gpus": 1 / len(models)} for name, args in models.items()}
    found = {}
    with served(models) as server:
        for name, kind in KINDS.items():
            found[name] = [
                asyncio.run(measure(server.port, name, setting.length, outstanding, seconds))
                for outstanding in kind.outstanding
            ]
            click.echo(f"\n{setting.name}: {kind.title}; ms\n{shown(found[name])}")
    return found


def shown(points: Sequence[Point]) -> str:
    """A table of them."""
    head = ["outstanding", "rows/s", "p50", "p99", *PARTS, "rows of a batch"]
    return table(
        head,
        [(p.outstanding, p.rows_per_s, p.p50_ms, p.p99_ms, *p.parts_ms.values(), p.mean_batch) for p in points],
    )


def draw(json_file: Path) -> None:
    """The eight pictures of a file, into a folder beside it; those of one configuration are of the first setting."""
    import matplotlib

    matplotlib.use("agg")
    tables = json.loads(json_file.read_text())["tables"]
    studies = {
        name: {kind: [Point(**p) for p in ps] for kind, ps in by_kind.items()} for name, by_kind in tables.items()
    }
    folder = json_file.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for number, (setting, points) in enumerate(studies.items(), 1):
        _draw_all(folder / f"figure{number}.png", setting, points)
    setting, points = next(iter(studies.items()))
    for number, kind in FIGURES.items():
        _draw_parts(folder / f"figure{number}.png", f"{KINDS[kind].title}: {setting}", points[kind])


def _draw_all(file: Path, title: str, by_kind: Mapping[str, Sequence[Point]]) -> None:
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, points in by_kind.items():
        axes.plot([p.mean_ms for p in points], [p.rows_per_s for p in points], "o-", label=KINDS[name].title)
    axes.set(xlabel="mean time of a request, ms", ylabel="rows/s", xscale="log", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(file, dpi=100, metadata={"Software": None})
    pyplot.close(picture)


def _draw_parts(file: Path, title: str, points: Sequence[Point]) -> None:
    from matplotlib import pyplot

    picture, delay = pyplot.subplots(figsize=(8, 5), layout="constrained")
    rate = delay.twinx()
    bottom = np.zeros(len(points))
    for part, color in zip(PARTS, COLORS, strict=True):
        heights = np.array([p.parts_ms[part] for p in points])
        delay.bar(range(len(points)), heights, bottom=bottom, label=part, color=color)
        bottom += heights
    rate.plot(range(len(points)), [p.rows_per_s for p in points], "o-", color="tab:blue", label="rows/s")
    delay.set(xlabel="requests outstanding", ylabel="mean time of a request, ms", title=title)
    delay.set_xticks(range(len(points)), [str(p.outstanding) for p in points])
    rate.set(ylabel="rows/s")
    rate.set_ylim(bottom=0)
    delay.legend(loc="upper left")
    picture.savefig(file, dpi=100, metadata={"Software": None})
    pyplot.close(picture)


def figures_of(by_kind: Mapping[str, Sequence[Point]]) -> dict[str, float]:
    """What the study claims, as ratios: at the same number of rows outstanding, the most that were measured."""

    def best(kind: str) -> float:
        return by_kind[kind][-1].rows_per_s

    single = best("static_1")
    return {
        "bert_study_8_vs_1": best("static_8") / single,
        "bert_study_dynamic_vs_1": best("dynamic") / single,
        "bert_study_no_delay_vs_1": best("no_delay") / single,
        "bert_study_4_instances_vs_1": best("static_1_x4") / single,
    }
