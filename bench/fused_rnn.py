"""MXNet's table: recurrent layers through torch's fused operators against a call of a cell for each timestep.

    python -m bench.fused_rnn [--device cpu] [--json FILE]

All have the same weights and begin with states of zeros; "training" is forward and backward, with gradients of the
input and of all weights. "Packed" is how the engine runs layers in one direction on a CPU
(serve_app/engine/packed_layers.py), "graph" how it runs them on a GPU, as a CUDA graph, "stepwise"
another such graph (serve_app/models/stepwise.py), of which it takes the faster. Before anything is timed, what they
give is compared, and a difference ends the bench. They take turns, each from inputs that lie ready to results that are
there; a rate is sequences per second, by the median time.

`*_speedup` is torch's fused layers over torch's cells in the same precision. `*_product_speedup` is the fastest of
fused, packed, graph and stepwise over those cells: what the engine gives. MXNet's table is fp32 against fp32;
`*_best_speedup` is the fastest of these in any precision that is off by no more than 1e-2 from fp32, over the cells in
fp32: what a user gains who leaves cells in fp32 for the product.
"""

import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import click
import torch
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from bench.report import json_option, save, show_hardware, table, use_replica_env
from serve_app.engine.cuda_runner import capture
from serve_app.engine.packed_layers import pack_weights
from serve_app.models.stepwise import StepwiseLayers

Forward: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""x [T, N, I] -> y [T, N, directions * H]"""
Results: TypeAlias = tuple[torch.Tensor, ...]

CELLS: dict[str, tuple[Callable[..., RNNBase], Callable[..., RNNCellBase], dict[str, str]]] = {
    "lstm": (torch.nn.LSTM, torch.nn.LSTMCell, {}),
    "gru": (torch.nn.GRU, torch.nn.GRUCell, {}),
    "relu": (torch.nn.RNN, torch.nn.RNNCell, {"nonlinearity": "relu"}),
    "tanh": (torch.nn.RNN, torch.nn.RNNCell, {"nonlinearity": "tanh"}),
}
TARGETS = {
    "cpu": ("cpu", torch.float32),
    "cpu_bf16": ("cpu", torch.bfloat16),
    "cuda": ("cuda", torch.float32),
    "cuda_fp16": ("cuda", torch.float16),
}
PRODUCT = ("fused", "packed", "graph", "stepwise")
"""Ways to run layers that the product has."""
MAX_ERROR = 1e-2  # of a precision that may be the best
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
MIN_ROUNDS = 3

PUBLISHED = {  # samples/s, cell by cell and fused; see docs/performance.md
    "cpu": {  # two sockets of SKX-8180
        "lstm_l1_d1_inference": (187.09, 394.73),
        "lstm_l1_d1_training": (73.23, 153.53),
        "gru_l1_d1_inference": (128.21, 392.16),
        "gru_l1_d1_training": (80.32, 171.91),
        "relu_l1_d1_inference": (518.13, 1538.46),
        "relu_l1_d1_training": (202.02, 357.14),
        "tanh_l1_d1_inference": (492.61, 952.38),
        "tanh_l1_d1_training": (198.02, 318.98),
        "lstm_l5_d1_inference": (37.24, 107.13),
        "lstm_l5_d1_training": (12.93, 32.29),
        "gru_l5_d1_inference": (26.67, 88.9),
        "gru_l5_d1_training": (15.04, 39.2),
        "relu_l5_d1_inference": (40.73, 134.23),
        "relu_l5_d1_training": (22.60, 35.97),
        "tanh_l5_d1_inference": (38.91, 104.17),
        "tanh_l5_d1_training": (22.73, 34.01),
    },
    "cuda": {  # P100
        "lstm_l1_d1_inference": (399.76, 1049.81),  # the ratio beside them there makes 399.2 of the first
        "lstm_l1_d1_training": (118.65, 339.81),
        "gru_l1_d1_inference": (180.18, 952.38),
        "gru_l1_d1_training": (126.58, 338.98),
        "lstm_l5_d1_inference": (86.45, 329.78),
        "lstm_l5_d1_training": (25.45, 124.13),
        "gru_l5_d1_inference": (40.57, 357.14),
        "gru_l5_d1_training": (27.62, 140.85),
    },
}
BEST = ["cell", "layers", "directions", "torch, fp32", "product, fp32", "product, best", "", "published"]
MEASURED = "cells", "fused", "speedup", "packed", "cells_graph", "graph", "stepwise", "product_speedup", "error"
PUBLISHED_ON = {"cpu": "SKX-8180", "cpu_bf16": "", "cuda": "P100", "cuda_fp16": ""}


class Sizes(NamedTuple):
    """T, N, I, H."""

    timesteps: int
    batch: int
    input: int
    hidden: int


SIZES, QUICK_SIZES = Sizes(300, 20, 800, 800), Sizes(5, 3, 8, 16)


class Setting(NamedTuple):
    """What a row of the table is about."""

    cell: str
    layers: int
    directions: int
    mode: str

    @property
    def name(self) -> str:
        """As figures begin."""
        return f"{self.cell}_l{self.layers}_d{self.directions}_{self.mode}"


SETTINGS = [
    Setting(cell, layers, directions, mode)
    for layers, directions, cell, mode in itertools.product((1, 5), (1, 2), CELLS, ("inference", "training"))
]


def fused_layers(setting: Setting, sizes: Sizes) -> RNNBase:
    """The layers of the setting, with random weights."""
    layers, _, options = CELLS[setting.cell]
    return layers(sizes.input, sizes.hidden, setting.layers, bidirectional=setting.directions == 2, **options)


def cells_of(setting: Setting, layers: RNNBase) -> list[list[RNNCellBase]]:
    """A cell of each layer and direction, [layers][directions], with the very weights that the layers have."""
    _, cell, options = CELLS[setting.cell]
    cells = []
    for weights in layers.all_weights:  # of each layer, and in it of each direction
        cells.append(cell(weights[0].shape[1], layers.hidden_size, device="meta", **options))
        cells[-1].weight_ih, cells[-1].weight_hh, cells[-1].bias_ih, cells[-1].bias_hh = weights
    return [cells[i : i + setting.directions] for i in range(0, len(cells), setting.directions)]


def run_cells(cells: Sequence[Sequence[RNNCellBase]], x: torch.Tensor) -> torch.Tensor:
    """x [T, N, I] -> y [T, N, directions * H], as the layers compute it: each gets both directions of the one below."""
    for layer in cells:
        ys = [_run_cell(cell, x, step) for cell, step in zip(layer, (1, -1), strict=False)]
        x = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
    return x


def _run_cell(cell: RNNCellBase, x: torch.Tensor, step: int) -> torch.Tensor:
    """Through the timesteps, from the first with step 1, from the last with step -1."""
    ys, state = [], None
    for x_t in x.unbind()[::step]:
        state = cell(x_t, state)
        ys.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(ys[::step])


def forwards(setting: Setting, layers: RNNBase, sizes: Sizes) -> dict[str, Forward]:
    """The ways to compute the layers' outputs, by name; as the engine runs them too."""
    ways: dict[str, Forward] = {
        "fused": lambda x: layers(x)[0],
        "cells": partial(run_cells, cells_of(setting, layers)),
    }
    if setting.mode == "inference":
        if next(layers.parameters()).is_cuda:
            ways |= {"graph": _graph(ways["fused"], layers, sizes), "cells_graph": _graph(ways["cells"], layers, sizes)}
            if StepwiseLayers.supports(layers):
                ways["stepwise"] = _graph(_from_zeros(layers, StepwiseLayers(layers)), layers, sizes)
        elif packed := _packed(layers):
            ways["packed"] = packed
    return ways


def _graph(way: Forward, layers: RNNBase, sizes: Sizes) -> Forward:
    """It as the engine runs a step on a GPU: a CUDA graph, on inputs that are copied to where it has them."""
    weight = next(layers.parameters())
    x = torch.zeros(sizes.timesteps, sizes.batch, sizes.input, device=weight.device, dtype=weight.dtype)
    y: torch.Tensor

    def step() -> None:
        nonlocal y
        y = way(x)

    with torch.inference_mode():
        graph = capture(step, weight.device, torch.cuda.graph_pool_handle())

    def forward(given: torch.Tensor) -> torch.Tensor:
        x.copy_(given)
        graph.replay()
        return y

    return forward


def _packed(layers: RNNBase) -> Forward | None:
    """The way that the engine takes on a CPU, if it takes these layers."""
    copied = copy.deepcopy(layers)
    return _from_zeros(copied, copied) if pack_weights(copied) else None


def _from_zeros(layers: RNNBase, run: Callable[..., Any]) -> Forward:
    """What `run`, which takes a state, gives for these layers from one of zeros."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(layers.num_layers, x.shape[1], layers.hidden_size)
        y: torch.Tensor = run(x, (h, h) if layers.mode == "LSTM" else h)[0]
        return y

    return forward


def runs(setting: Setting, sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Results]]:
    """By name of the way, what gives the outputs on random inputs; in training the gradients too."""
    training = setting.mode == "training"
    layers = fused_layers(setting, sizes).to(device, dtype).train(training)
    x = torch.randn(sizes.timesteps, sizes.batch, sizes.input, device=device, dtype=dtype, requires_grad=training)
    dy = torch.randn(sizes.timesteps, sizes.batch, setting.directions * sizes.hidden, device=device, dtype=dtype)
    wanted = (x, *layers.parameters())

    def run(forward: Forward) -> Results:
        with torch.inference_mode(not training):
            y = forward(x)
        return (y.detach(), *torch.autograd.grad(y, wanted, dy)) if training else (y,)

    return {name: partial(run, forward) for name, forward in forwards(setting, layers, sizes).items()}


def check(setting: Setting, results: Mapping[str, Results]) -> None:
    """ClickException unless all ways give what the fused one does, but for rounding."""
    for (way, found), i in itertools.product(results.items(), range(len(results["fused"]))):
        expected = results["fused"][i]
        limit = TOLERANCE[expected.dtype]
        if i > 0 and setting.cell == "relu":
            limit **= 0.5  # gradients: units that rounding brings over 0 have the other slope, and those add up squared
        error = float((found[i].double() - expected.double()).norm() / expected.double().norm())
        if not error <= limit:  # NaN is not
            what = (
                f"{'gradient' if i > 0 else 'output'} of {setting.name}, {way}, {expected.dtype} on {expected.device}"
            )
            raise click.ClickException(f"{what}: ‖found - fused‖ / ‖fused‖ is {error:.2g}, the limit is {limit:.2g}")


def measure(ways: Mapping[str, Callable[[], object]], seconds: float, device: str) -> dict[str, float]:
    """Median seconds of each, in turns for so many seconds and at least MIN_ROUNDS rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < MIN_ROUNDS or time.perf_counter() < end:
        for name, run in ways.items():
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            times[name].append(time.perf_counter() - began)
        rounds += 1
    return {name: statistics.median(found) for name, found in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def figures_of(setting: Setting, sizes: Sizes, target: str, seconds: float) -> dict[str, float]:
    """Samples/s of each way, and the speed-up over the cells of torch's fused one and of what the product takes."""
    device, dtype = TARGETS[target]
    ways = runs(setting, sizes, device, dtype)
    name = f"{setting.name}_{target}"
    check(setting, {way: run() for way, run in ways.items()})  # which also warms up
    rates = {way: sizes.batch / found for way, found in measure(ways, seconds, device).items()}
    rates["speedup"] = rates["fused"] / rates["cells"]
    rates["product_speedup"] = max(rates[way] for way in PRODUCT if way in rates) / rates["cells"]
    if setting.mode == "inference" and dtype != torch.float32:
        rates["error"] = rounding(setting, sizes, device, dtype)
    return {f"{name}_{what}": value for what, value in rates.items()}


@torch.inference_mode()
def rounding(setting: Setting, sizes: Sizes, device: str, dtype: torch.dtype) -> float:
    """The most that a fused way in a dtype is off, as ‖found - expected‖ / ‖expected‖, from fp32 with the weights."""
    layers = fused_layers(setting, sizes).to(device).eval()
    x = torch.randn(sizes.timesteps, sizes.batch, sizes.input, device=device)
    expected = layers(x)[0]
    ways = forwards(setting, layers.to(dtype), sizes)
    found = [ways[way](x.to(dtype)).float() for way in PRODUCT if way in ways]
    return max(float((y - expected).norm() / expected.norm()) for y in found)


def best_speedups(figures: Mapping[str, float], device: str) -> tuple[dict[str, float], list[list[object]]]:
    """The best speed-ups over cells in fp32, as figures and as rows of a table; see the module."""
    found, rows = dict[str, float](), list[list[object]]()
    for setting in (each for each in SETTINGS if each.mode == "inference"):
        cells = figures.get(f"{setting.name}_{device}_cells")
        if cells is None:
            continue
        rates = {
            (target, way): figures[f"{setting.name}_{target}_{way}"]
            for target, way in itertools.product(TARGETS, PRODUCT)
            if TARGETS[target][0] == device
            and f"{setting.name}_{target}_{way}" in figures
            and (target == device or figures.get(f"{setting.name}_{target}_error", math.inf) <= MAX_ERROR)
        }
        target, way = best = max(rates, key=rates.__getitem__)
        found[f"{setting.name}_{device}_best_speedup"] = rates[best] / cells
        same = max(rate for (which, _), rate in rates.items() if which == device)
        published = PUBLISHED[device].get(setting.name)
        precision = f"{str(TARGETS[target][1]).removeprefix('torch.')}, {way}"
        published_ratio = published[1] / published[0] if published else ""
        rates_over_cells = (rate / cells for rate in (rates[device, "fused"], same, rates[best]))
        rows.append([*setting[:3], *rates_over_cells, precision, published_ratio])
    return found, rows


def columns(figures: Mapping[str, float], target: str) -> tuple[list[str], list[list[object]]]:
    """Head and rows of a target's table, with what was published; without columns that have nothing."""
    head = [
        "cell", "layers", "directions", "", "cell by cell", "fused", "speed-up", "packed", "cells, graph",
        "fused, graph", "stepwise", "product's speed-up", "off by",
    ]  # fmt: skip
    head += [f"{PUBLISHED_ON[target]} {what}" for what in ("cell by cell", "fused", "speed-up")]
    rows: list[list[object]] = []
    for setting in (each for each in SETTINGS if f"{each.name}_{target}_fused" in figures):
        measured = [figures.get(f"{setting.name}_{target}_{what}", "") for what in MEASURED]
        published = PUBLISHED.get(target, {}).get(setting.name)
        rows.append([*setting, *measured, *((*published, published[1] / published[0]) if published else ("",) * 3)])
    kept = [i for i in range(len(head)) if any(row[i] != "" for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="One of them, instead of all that are there.")
@click.option("--target", "wanted", type=click.Choice([*TARGETS]), help="Only that device and precision.")
@click.option("--seconds", default=1.0, show_default=True, help=f"Of a row; at least {MIN_ROUNDS} rounds are run.")
@click.option("--threads", type=int, help="On the CPU, instead of as many as torch takes by itself.")
@click.option("--quick", is_flag=True, help=f"{QUICK_SIZES} instead of {SIZES}, to see that it runs.")
@click.option("--layers", type=click.Choice(["1", "5"]), help="Only those, instead of both.")
@click.option("--mode", type=click.Choice(["inference", "training"]), help="Only that, instead of both.")
@click.option("--add", is_flag=True, help="Keep what the file has of other rows.")
@json_option
def main(
    *,
    device: str | None,
    wanted: str | None,
    seconds: float,
    threads: int | None,
    quick: bool,
    layers: str | None,
    mode: str | None,
    add: bool,
    json_file: Path | None,
) -> None:
    """Measure fused recurrent layers against cells: LSTM, GRU, ReLU, tanh; 1 and 5 layers; 1 and 2 directions."""
    use_replica_env()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = QUICK_SIZES if quick else SIZES
    devices = [device] if device else ["cpu", *["cuda"] * torch.cuda.is_available()]
    chosen = [each for each in SETTINGS if layers in (None, str(each.layers)) and mode in (None, each.mode)]
    show_hardware()
    click.echo(f"threads: {torch.get_num_threads()}")
    figures: dict[str, float] = {}
    if add and json_file is not None and json_file.exists():
        figures = json.loads(json_file.read_text())["figures"]
    for target in (each for each, (where, _) in TARGETS.items() if where in devices and wanted in (None, each)):
        for setting in chosen:
            figures |= figures_of(setting, sizes, target, seconds)
        click.echo(f"\n{target}, {sizes}, samples/s\n{table(*columns(figures, target))}")
    for where in devices:
        found, rows = best_speedups(figures, where)
        figures |= found
        if rows:
            click.echo(f"\n{where}, inference, over cells in fp32\n{table(BEST, rows)}")
    save(figures, json_file, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
