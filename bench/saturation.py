"""Where the time goes when the engine has all it can do: shares of a step, and the profiler's trace of a few.

    python -m bench.saturation [--json FILE]

Model, steps and load are those of bench.engine_cuda: 7x1024 LSTM in fp16 with the 8 largest outputs, segments of 10
timesteps. `model_share`: what the model alone, in a graph, needs for a step, of the time that the engine needs for one,
as turns of both in one run, without the profiler. The trace, of other steps, says what the rest is; the profiler slows
the host down, so there can be gaps in it that are not there otherwise. `product_us`: what the step's operations would
take at the rate of a large product.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import torch
from torch.profiler import ProfilerActivity, profile

from bench.engine_cuda import FLOP, LSTM, THREADS, TURNS, ClosedLoop, make_engine, make_graph, product_flops, time_s
from bench.report import json_option, save, show_hardware, table
from serve_app.config import ModelConfig
from serve_app.models import registry
from serve_app.models.rnn import Rnn

BATCH_SIZES = (256, 1024)
SEGMENT = 10
TRACED = 32  # steps
DRAWN = 4
KERNELS, UPLOAD, DOWNLOAD = ROWS = ("kernels", "to the device", "to the host")


class Event(NamedTuple):
    """Something that ran on the device; times in us."""

    row: str
    name: str
    start: float
    duration: float


def measure(model: Rnn, batch: int, seconds: float) -> tuple[dict[str, float], list[Event]]:
    """Figures of steps of that size, and the trace of some."""
    graphs = [make_graph(model, batch, SEGMENT, forward) for forward in (model.forward, *model.alternatives().values())]
    fastest = min(graphs, key=time_s)
    loop = ClosedLoop(make_engine(model, batch, SEGMENT), batch, SEGMENT)
    turns = [(time_s(fastest, seconds / TURNS), loop.run(seconds / TURNS).step_s) for _ in range(TURNS)]
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        loop.run(0.0, warm_up=TRACED)
    events = [
        Event(row_of(event.name), event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profiler.events()
        if event.device_type.name == "CUDA"
    ]
    figures = {
        "model_share": median(model_s / step_s for model_s, step_s in turns),
        "model_us": median(model_s for model_s, _ in turns) * 1e6,
        "step_us": median(step_s for _, step_s in turns) * 1e6,
    }
    return figures | shares(events), events


def row_of(name: str) -> str:
    """Where an event is drawn."""
    return UPLOAD if "HtoD" in name else DOWNLOAD if "DtoH" in name else KERNELS


def shares(events: Sequence[Event]) -> dict[str, float]:
    """us of a step, by what the device does; steps are told by the kernel that takes most of the time."""
    main, starts = starts_of_steps(events)
    steps = len(starts) - 1
    kernels = [event for event in events if event.row == KERNELS and starts[0] <= event.start < starts[-1]]
    of_main = sum(event.duration for event in kernels if event.name == main)
    total = sum(event.duration for event in kernels)
    return {
        "traced_step_us": (starts[-1] - starts[0]) / steps,
        "main_kernel_us": of_main / steps,
        "other_kernels_us": (total - of_main) / steps,
        "no_kernel_us": (starts[-1] - starts[0] - total) / steps,
    }


def starts_of_steps(events: Sequence[Event]) -> tuple[str, list[float]]:
    """The name of the kernel that takes most of the time, and when it began, but for the first quarter and the last."""
    times: dict[str, float] = {}
    for event in events:
        if event.row == KERNELS:
            times[event.name] = times.get(event.name, 0.0) + event.duration
    main = max(times, key=lambda name: times[name])
    starts = sorted(event.start for event in events if event.name == main)
    return main, starts[len(starts) // 4 : -1]


def drawn(events: Sequence[Event]) -> list[tuple[str, str, float, float]]:
    """The events of a few steps, times from the first on."""
    _, starts = starts_of_steps(events)
    begin, end = starts[0], starts[min(DRAWN, len(starts) - 1)]
    return [(*event[:2], event.start - begin, event.duration) for event in events if begin <= event.start < end]


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@json_option
def main(seconds: float, json_file: Path | None) -> None:
    """Measure where a step's time goes."""
    torch.set_num_threads(THREADS)
    show_hardware()
    model = registry.load(ModelConfig("rnn", {**LSTM, "top_k": 8}))
    assert isinstance(model, Rnn)
    model.cuda().eval()
    flops = product_flops()
    figures: dict[str, float] = {"product_tflops": flops / 1e12}
    traces: dict[str, object] = {}
    rows: list[tuple[object, ...]] = []
    for batch in BATCH_SIZES:
        found, events = measure(model, batch, seconds)
        found["product_us"] = FLOP * batch * SEGMENT / flops * 1e6
        figures |= {f"{name}_{batch}": value for name, value in found.items()}
        traces[str(batch)] = drawn(events)
        rows.append((batch, *found.values()))
    click.echo(f"\n{table(('batch', *found), rows)}")
    save(figures, json_file, traces=traces)


if __name__ == "__main__":
    main()
