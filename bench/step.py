"""One step of the model on a GPU: our kernel against cuDNN, each in a CUDA graph, and cuDNN as torch launches it.

    python -m bench.step [--json FILE]

"fp8" is our kernel with `quantization="fp8"`: weights of the recurrent layers in FP8, and h between cells.
A step is `forward` with state in and state out, on tensors that lie ready. Its time is the median of replays, by CUDA
events; inputs and states take turns between sets, so that none is in the cache from the replay before. "% of product"
is the rate of all products of a step in that of one large product of fp16, measured in the same run. Errors are those
of all h of the last layer, ‖found - exact‖ / ‖exact‖, against float64 with the weights as they were.
"""

import copy
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import click
import torch

from bench.engine_cuda import FLOP, PRODUCT
from bench.report import json_option, save, show_hardware, table
from serve_app.models.fused_lstm import FusedLstm
from serve_app.models.interface import State
from serve_app.models.options import RnnOptions
from serve_app.models.rnn import FP8_TOLERANCE, Rnn

OPTIONS = RnnOptions(input=128, hidden=1024, layers=7, output=1024, top_k=8, dtype="fp16")
BATCH_SIZES = (64, 128, 256, 512, 1024, 2048)
TIMESTEPS = (10, 1)
CLAIMED_TIMESTEPS = 10
NUM_SETS = 4
TOLERANCE = 4e-3  # of values against the module's own, which are off by half of that themselves
ERROR_BATCH, ERROR_TIMESTEPS = 64, 1000

Arguments: TypeAlias = tuple[Any, ...]
Function: TypeAlias = Callable[..., object]
Layers: TypeAlias = Callable[[torch.Tensor, State], tuple[torch.Tensor, State]]


def draw(timesteps: int, batch: int) -> Arguments:
    """Random x and state."""
    x = torch.randn(timesteps, batch, OPTIONS.input, device="cuda")
    h, c = (torch.randn(OPTIONS.layers, batch, OPTIONS.hidden, device="cuda") / 2 for _ in range(2))
    return x.half(), (h.half(), c.half())


def capture(function: Function, sets: Sequence[Arguments]) -> list[Callable[[], None]]:
    """A graph of the function for each set of arguments; what it gave is kept, so that no two share memory."""
    for arguments in sets:
        function(*arguments)
    torch.cuda.synchronize()
    replays = []
    for arguments in sets:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function(*arguments)
        replays.append(graph.replay)
    return replays


def measure(launches: Sequence[Callable[[], object]], rounds: int) -> float:
    """Milliseconds of one launch, median over so many rounds of all of them."""
    times: list[float] = []
    for _ in range(rounds + 1):
        for launch in launches:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            launch()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return statistics.median(times[len(launches) :])  # the first round warmed up


def check(model: Rnn, fused: FusedLstm, arguments: Arguments, tolerance: float = TOLERANCE) -> None:
    """AssertionError unless values and states are those of the module."""
    found, expected = (torch.utils._pytree.tree_leaves(run(*arguments)) for run in (fused, model))
    for leaf, expected_leaf in zip(found, expected, strict=True):
        if leaf.dtype == torch.int32:  # indices: those of values that are nearly equal may change places
            continue
        error = (leaf.double() - expected_leaf.double()).norm() / expected_leaf.double().norm()
        assert error < tolerance, f"‖fused - module‖ / ‖module‖ is {error:.2g}"


def measure_errors(model: Rnn, others: Mapping[str, Layers]) -> dict[str, float]:
    """Of the layers of each of `others`, over ERROR_TIMESTEPS in steps of 10, from zeros."""
    exact = copy.deepcopy(model).double()
    x = draw(ERROR_TIMESTEPS, ERROR_BATCH)[0]

    def run(layers: Layers, dtype: torch.dtype) -> torch.Tensor:
        state = tuple(leaf.to(dtype) for leaf in model.initial_state(ERROR_BATCH))
        parts = []
        for part in x.to(dtype).split(CLAIMED_TIMESTEPS):
            y, state = layers(part, state)
            parts.append(y.double())
        return torch.cat(parts)

    with torch.backends.cudnn.flags(enabled=False):
        expected = run(exact.rnn, torch.float64)
    return {
        name: float((run(layers, model.dtype) - expected).norm() / expected.norm()) for name, layers in others.items()
    }


@click.command()
@click.option("--rounds", default=10, show_default=True, help=f"Of {NUM_SETS} replays each, for every setting.")
@json_option
@torch.inference_mode()
def main(rounds: int, json_file: Path | None) -> None:
    """Measure the step of a 7-layer LSTM of 1024 cells, fp16."""
    show_hardware()
    if not FusedLstm.supports(OPTIONS, torch.device("cuda")):
        raise click.ClickException("the kernel needs a GPU of compute capability 9.0")
    model = Rnn(OPTIONS).cuda()
    model.rnn.flatten_parameters()
    model8 = Rnn(replace(OPTIONS, quantization="fp8")).cuda()
    model8.rnn.flatten_parameters()
    fused, fused8 = FusedLstm(model), FusedLstm(model8)
    factors = [torch.randn(PRODUCT, PRODUCT, device="cuda").half() for _ in range(3)]
    products = capture(torch.matmul, list(itertools.permutations(factors, 2)))
    product_tflops = 2 * PRODUCT**3 / measure(products, rounds) / 1e9
    del products, factors

    rows = []
    figures = {"large_product_tflops": product_tflops}
    errors = measure_errors(model, {"cuDNN": model.rnn, "ours": fused.layers, "fp8": fused8.layers})
    figures |= {f"step_error_{name.lower()}": error for name, error in errors.items()}
    for timesteps, batch in itertools.product(TIMESTEPS, BATCH_SIZES):
        sets = [draw(timesteps, batch) for _ in range(NUM_SETS)]
        check(model, fused, sets[0])
        check(model8, fused8, sets[0], FP8_TOLERANCE)
        eager_ms = measure([lambda arguments=arguments: model(*arguments) for arguments in sets], rounds)  # type: ignore[misc]
        cudnn_ms = measure(capture(model, sets), rounds)
        fused_ms = measure(capture(fused, sets), rounds)
        fp8_ms = measure(capture(fused8, sets), rounds)
        tflops = FLOP * timesteps * batch / fused_ms / 1e9
        of_product = 100 * tflops / product_tflops
        rate = timesteps * batch / fused_ms
        ratios = cudnn_ms / fused_ms, cudnn_ms / fp8_ms
        rows.append((batch, timesteps, eager_ms, cudnn_ms, fused_ms, fp8_ms, *ratios, rate, tflops, of_product))
        setting = f"{batch}" if timesteps == CLAIMED_TIMESTEPS else f"{batch}_k{timesteps}"
        figures[f"step_vs_cudnn_{setting}"], figures[f"step_fp8_vs_cudnn_{setting}"] = ratios
        figures[f"step_ms_{setting}"], figures[f"step_fp8_ms_{setting}"] = fused_ms, fp8_ms
        figures[f"step_cudnn_ms_{setting}"] = cudnn_ms
        figures[f"step_cudnn_eager_ms_{setting}"] = eager_ms
        figures[f"step_tflops_{setting}"] = tflops
    head = (
        "batch",
        "timesteps",
        "cuDNN eager ms",
        "cuDNN ms",
        "ours ms",
        "fp8 ms",
        "ratio",
        "fp8 ratio",
        "ours /ms",
        "TFLOP/s",
        "% of product",
    )
    click.echo(f"\n{table(head, rows)}\n\nlarge fp16 product: {product_tflops:.0f} TFLOP/s")
    click.echo(f"errors: {', '.join(f'{name} {error:.2g}' for name, error in errors.items())}")
    save(figures, json_file, errors_of={"timesteps": ERROR_TIMESTEPS, "sessions": ERROR_BATCH})


if __name__ == "__main__":
    main()
