"""`python -m bench.performance`: writes docs/performance.md and its pictures from the files in bench/results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bench import bert_study, fused_rnn
from bench.engine_cuda import COLUMNS
from bench.report import shown
from bench.s9422 import DTYPES, INSTANCES, T4
from bench.saturation import BATCH_SIZES, ROWS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "s9422.png"
TIMELINE = ROOT / "docs" / "saturation.png"
H100_TFLOPS = 989.4
"""Of dense fp16 products, as NVIDIA's data sheet of the H100 SXM has it."""

INTRODUCTION = """# Performance on a GPU

Written by `python -m bench.performance` from files in `bench/results`, each with the hardware that it is from; the
commands that write those are named. The model is that of NVIDIA's talk S9422: LSTM of 7 layers and 1024 cells, input
128, projection 1024, in fp16 unless said. A timestep of it is 112 MFLOP.
"""
STEP = """## A step of our own

`python -m bench.step --json bench/results/step_cuda.json`. One kernel runs all layers and timesteps
(`serve_app/models/fused_lstm.py`); the engine takes it where it is faster than cuDNN and gives the same. "FP8" is the
same kernel with `model.quantization: fp8`: weights of the recurrent layers are rounded to e4m3, each row with a scale
of its own, and h from cell to cell too; x, the states and the outputs stay in fp16.
"""
ENGINE = """## The engine against the bare model

`python -m bench.engine --device cuda --json bench/results/engine_cuda.json`. "Graph" is the model alone, in a CUDA
graph, on inputs that lie on the device, outputs left there: through cuDNN, and through the fastest that there is.
"Engine" is host to host, with states by slot. Rates are timesteps per ms; ratio is engine to fastest graph; delay is
from a frame to its answer, with four times the batch of sessions in a closed loop.
"""
EVICT = """## More sessions than slots

`python -m bench.evict --json bench/results/evict_cuda.json`. 65,536 sessions over 8,192 slots, 1024 sessions a step.
"""
S9422 = """## Instances, as in the talk

`python -m bench.s9422 --json bench/results/s9422_cuda.json`. N instances run a sequence of 1,000 timesteps each, in
segments of 10, the next when the last is answered. Beside it the talk's T4, by batch size, read off its chart.

![Throughput and request time against instances](s9422.png)
"""
SATURATION = """## Where the time goes at saturation

`python -m bench.saturation --json bench/results/saturation_cuda.json`. `model_share` is the time of the model alone, in
a graph, of the time of the engine's step, in turns, without a profiler. Below it the profiler's trace of other steps,
in us of a step: the kernel of the LSTM, all other kernels (linear layer, top-k, states by slot), and no kernel at all;
copies run beside. `product_us` is what the step's operations take at a large product's rate.

![What runs on the device in four steps of 1024 sessions](saturation.png)
"""
CHECKPOINTS = """## What checkpoints cost

`python -m bench.checkpoint --device cuda --json bench/results/checkpoint_cuda.json`, and the same for cpu: the rate at
saturation with checkpoints at the default interval, and without, in turns.
"""
FUSED_RNN = """## Fused layers against cells, as in MXNet's table

`python -m bench.fused_rnn --device cpu --json bench/results/fused_rnn_cpu.json`, and the same for cuda. Sequences per
second, of 300 timesteps, in batches of 20, input and cells 800: through torch's fused layers (on a CPU oneDNN's LSTM
and torch's own GRU, ReLU and tanh; on a GPU cuDNN's), and through one call of a cell for each timestep, with the same
weights. Both give the same, gradients too, which is checked before each row. "Packed" is how the engine runs layers in
one direction on a CPU: with their weights reordered once, or transposed (`serve_app/engine/packed_layers.py`). "Graph"
is either way as a CUDA graph, which spares the host's calls: the engine runs its steps so.
Beside it what MXNet's "Fused RNN Operators for CPU" has, in tables, of two sockets of SKX-8180 and of a P100: cells
against `sym.RNN` (cwiki.apache.org/confluence/display/MXNET/Fused+RNN+Operators+for+CPU). Those of 5 layers are under a
heading that says two directions, but an earlier version of the page, which the P100's are from, has the same ones under
a heading that says one; so they stand at one.
"""
BERT = """## BERT in dynamic batches

`python -m bench.bert --json bench/results/bert_cpu.json`, and the same with `--device cuda`. BERT for question
answering with random weights; rows are handed to a batcher in this process, 64 of them outstanding unless said.
"Ragged" are rows as long as the sentences of these documents, all others have the maximum. Outputs of rows in batches
are compared with those of each alone.
"""
STUDY = """## The study of BERT on Triton, again

`python -m bench.bert --study --json bench/results/bert_study_cpu.json`, and the same with `--device cuda`: the
configurations of DeepLearningExamples' study of BERT on Triton, over gRPC, with 1 to 64 requests outstanding, and its
figures: 1 and 2 all configurations at either length; 3 and 4 batch sizes 1 and 8; 5 and 6 static and dynamic batching;
7 and 8 one and four instances. It had 4.3 times the rate at batch size 8 on a V100, with as many rows outstanding. All
tables are in the files.
"""
TUNE = """## The tuner against a sweep

`python -m bench.tune configs/lstm.yaml --delay-ms 250 --lengths 1,10,100 --minutes 1 --sweep` and
`python -m bench.tune configs/bert.yaml --delay-ms 1000 --outstanding 32 --minutes 4 --seconds 0.5 --sweep`, with
`--json bench/results/tune_lstm_cpu.json` and so on: what the search found against the best of all settings.
"""


def _rest(figures: dict[str, float]) -> str:
    """The account of what is between an engine's step and the physical limit."""
    step, model, traced, main, other, none, product = (
        figures[f"{name}_1024"]
        for name in (
            "step_us", "model_us", "traced_step_us", "main_kernel_us", "other_kernels_us", "no_kernel_us", "product_us",
        )
    )  # fmt: skip
    sheet_us, share = product * figures["product_tflops"] / H100_TFLOPS, figures["model_share_1024"]
    return f"""## Where the rest of the physical limit goes

A step of 1024 sessions and 10 timesteps, from the data sheet's rate down to what a client gets, in us:

| | us | what it is |
| --- | --- | --- |
| the data sheet's rate | {sheet_us:.0f} | {H100_TFLOPS:.0f} TFLOP/s of dense fp16 products, at the highest clock |
| a large product | {product:.0f} | {figures["product_tflops"]:.0f} TFLOP/s: under such load the GPU lowers its clock, \
to keep within its power |
| the model alone | {model:.0f} | in a graph: the layers' kernel, the linear layer, top-k |
| the engine's step | {step:.0f} | host to host, states by slot; the model is {share:.1%} of it `[model_share_1024]` |
| traced: the layers' kernel | {main:.0f} | {main / traced:.1%} of a traced step |
| traced: other kernels | {other:.0f} | {other / traced:.1%}: linear layer, top-k, h gathered by slot |
| traced: no kernel | {none:.0f} | {none / traced:.1%}: between two kernels, and from one graph to the next |

- The model: at batch 512 and above the layers' kernel is near a large product's rate (the first table), held by the
  power that both need. Below that a step is held by the way from cell to cell: a diagonal has at most as many cells as
  layers, and each needs the one before it. One session is held by reading all weights at each timestep.
- Between model and engine, on the device: our step reads and writes c, and writes h, where the states lie; h of before
  is gathered by slot in the kernel that also clears the counters, and the outputs are written where they are copied
  from. With any other forward all states are gathered and written back (two kernels a tensor), inputs are transposed
  and outputs packed.
- Copies run beside the kernels, on streams of their own, of this step's outputs and the next one's inputs; where both
  are small the graph has them, which saves the host more than it costs the device.
- On the host: receiving, scheduling, launching and answering run while the device computes, up to three steps ahead. A
  step cannot be shorter than they take, which is what limits steps of one timestep and small batches: there the step is
  faster than the host's work for it.
"""


STREAMS = """\
## Segments by gRPC

A timestep a message on gRPC streams, the next of a sequence when the last is answered: 1,024 sequences of four
unmodified perf_analyzers into four ingress replicas, for the 7x1024 LSTM and for a model that computes nothing
(`python -m bench.streams --runs 1`). Beside them the naive application, behind Serve's own proxy: 64 sequences of one
perf_analyzer, and a 2x256 LSTM on the CPU.
"""


FRAMES = """\
## Frames through a handle

Segments of 10 timesteps, of 256 to 1,024 sessions in each frame, four such groups, from one process to a replica over
the channel of handles, and to an engine with the same settings in the process itself
(`python -m bench.frames --device cuda`). Steps are of a group; thousands of timesteps a second.
"""
FRAMES_REST = """\
The goal is 0.9 of the engine's own rate, which is the best of its column. A step of 256 sessions takes less than what
the host does for it, and there the thread of the engine and that of the connections wait for each other, since both
hold Python's lock: [operations.md](operations.md).
"""


def rendered() -> str:
    """The document with the figures of now."""
    step, engine, evict, s9422, saturation = (
        _load(f"{name}_cuda.json") for name in ("step", "engine", "evict", "s9422", "saturation")
    )
    parts = [
        INTRODUCTION,
        STEP,
        _source(step),
        _step_table(step["figures"], **step["errors_of"]),
        ENGINE,
        _source(engine),
    ]
    parts += [_engine_table(engine["figures"], "top8", "With the 8 largest outputs")]
    parts += [_engine_table(engine["figures"], "full", "With all 1024 outputs")]
    idle_us = engine["figures"]["idle_overhead_us"]
    parts += [
        f"One session alone, one timestep: {idle_us:.0f} µs to the answer beyond the graph `[idle_overhead_us]`.\n"
    ]
    parts += [SATURATION, _source(saturation), _saturation_table(saturation["figures"])]
    parts += [EVICT, _source(evict), _evict_table(evict["figures"])]
    parts += [S9422, _source(s9422), _instances_table(s9422["figures"])]
    parts += [_rest(saturation["figures"])]
    streams = _load("streams_cuda.json")
    parts += [STREAMS, _source(streams), _streams_table(streams["figures"])]
    frames = _load("frames_cuda.json")
    parts += [FRAMES, _source(frames), _frames(frames["figures"]), FRAMES_REST]
    parts += [CHECKPOINTS, *(_checkpoints(_load(f"checkpoint_{device}.json")) for device in ("cuda", "cpu"))]
    parts += [FUSED_RNN]
    for file in sorted(RESULTS.glob("fused_rnn_*.json")):
        layers = _load(file.name)
        parts += [_source(layers), _fused_rnn_tables(layers["figures"], layers["threads"])]
    parts += [BERT, *(_bert(_load(file.name)) for file in sorted(RESULTS.glob("bert_c*.json")))]
    parts += [STUDY, *(_study(file) for file in sorted(RESULTS.glob("bert_study_*.json")))]
    parts += [TUNE, *(_tune(file) for file in sorted(RESULTS.glob("tune_*.json")))]
    return "\n".join(parts)


def draw() -> None:
    """The pictures."""
    import matplotlib

    matplotlib.use("agg")
    _draw_instances()
    _draw_timeline()
    for file in RESULTS.glob("bert_study_*.json"):
        bert_study.draw(file)


def _draw_timeline() -> None:
    """What runs on the device, against time."""
    from matplotlib import pyplot

    report = _load("saturation_cuda.json")
    batches = list(report["traces"])
    picture, axes = pyplot.subplots(len(batches), 1, figsize=(11, 2.2 * len(batches)), layout="constrained")
    for batch, axis in zip(batches, axes, strict=True):
        figures = {name: report["figures"][f"{name}_{batch}"] for name in ("traced_step_us", "no_kernel_us")}
        events = report["traces"][batch]
        main = max(events, key=lambda event: event[3])[1]
        for row, name, start, duration in events:
            place = ROWS[::-1].index(row)
            color = "tab:green" if name == main else ("tab:blue", "tab:purple", "tab:orange")[place]
            axis.broken_barh([(start, duration)], (place - 0.35, 0.7), color=color, linewidth=0)
        axis.set(yticks=range(len(ROWS)), yticklabels=ROWS[::-1], xlabel="us")
        idle = figures["no_kernel_us"] / figures["traced_step_us"]
        axis.set_title(
            f"batch {batch}: a step is {figures['traced_step_us']:.0f} us, without a kernel {idle:.1%} of it"
        )
    picture.savefig(TIMELINE, dpi=110, metadata={"Software": None})


def _draw_instances() -> None:
    """Throughput and request time against the number of instances."""
    from matplotlib import pyplot

    report = _load("s9422_cuda.json")
    figures, gpu = report["figures"], report["hardware"]["gpu"]
    picture, (rate, delay) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for dtype in DTYPES:
        instances = [n for n in INSTANCES if f"p50_ms_{dtype}_n{n}" in figures]
        rates, p50, p99 = (
            [figures[f"{name}_{dtype}_n{n}"] for n in instances] for name in ("timesteps_per_ms", "p50_ms", "p99_ms")
        )
        rate.plot(instances, rates, "o-", label=f"{gpu}, {dtype}")
        rate.plot(list(T4[dtype]), list(T4[dtype].values()), "s--", label=f"T4 {dtype}, of the talk")
        delay.plot(instances, p50, "o-", label=f"{gpu}, {dtype}, p50")
        delay.plot(instances, p99, ":", label=f"{gpu}, {dtype}, p99")
    for axes, label in ((rate, "timesteps per ms"), (delay, "time of a request of 10 timesteps, ms")):
        axes.set(xscale="log", yscale="log", xlabel="instances", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    picture.savefig(PICTURE, dpi=110, metadata={"Software": None})


def _engine_table(figures: dict[str, float], outputs: str, title: str) -> str:
    rows = []
    prefix = f"graph_per_ms_{outputs}_b"
    for name in figures:
        if name.startswith(prefix):
            batch, k = (int(part) for part in name.removeprefix(prefix).split("_k"))
            found = {what: figures[f"{what}_{outputs}_b{batch}_k{k}"] for what in COLUMNS.values()}
            rates = (_rate(found[f"{what}_per_ms"]) for what in ("eager", "cudnn_graph", "graph", "engine"))
            share = found["engine_tflops"] / figures["product_tflops"]
            delays = (f"{found[f'engine_{percent}_ms']:.2f}" for percent in ("p50", "p99"))
            rows.append((batch, k, *rates, f"{found['engine_vs_graph']:.3f}", f"{share:.0%}", *delays))
    head = ["batch", "timesteps", "cuDNN eager", "cuDNN graph", "fastest graph", "engine", "ratio"]
    head += ["of a large product's rate", "p50 ms", "p99 ms"]
    name = f"engine_vs_graph_{outputs}"
    least = f"The least ratio at 10 timesteps and batch 256 or more: {figures[name]:.3f} `[{name}]`."
    return f"{title}:\n\n{_table(head, rows)}\n{least}\n"


def _step_table(figures: dict[str, float], timesteps: int, sessions: int) -> str:
    rows = []
    for name, ratio in figures.items():
        if name.startswith("step_vs_cudnn_"):
            setting = name.removeprefix("step_vs_cudnn_")
            batch, _, k = setting.partition("_k")
            share = figures[f"step_tflops_{setting}"] / figures["large_product_tflops"]
            times = (f"{figures[f'{what}_{setting}']:.3f}" for what in ("step_cudnn_ms", "step_ms", "step_fp8_ms"))
            ratios = f"{ratio:.2f}", f"{figures[f'step_fp8_vs_cudnn_{setting}']:.2f}"
            rows.append((batch, k or "10", *times, *ratios, f"{share:.0%}"))
    head = ("batch", "timesteps", "cuDNN graph ms", "ours ms", "FP8 ms", "ours to cuDNN", "FP8 to cuDNN")
    claims = (f"{figures[name]:.2f} `[{name}]`" for name in ("step_vs_cudnn_1024", "step_fp8_vs_cudnn_1024"))
    errors = (f"{100 * figures[f'step_error_{name}']:.2g} %" for name in ("cudnn", "ours", "fp8"))
    return f"""{_table((*head, "ours to a large product's rate"), rows)}
At batch 1024 and 10 timesteps, ours and FP8: {" and ".join(claims)} times cuDNN.

Against float64 with the weights as they were, ‖found − exact‖ / ‖exact‖ of all h of the last layer, {timesteps:,}
timesteps of {sessions} sessions with random weights and inputs: cuDNN, ours and FP8 are off by {", ".join(errors)}. A
trained model is to be tried with its own data.
"""


def _checkpoints(report: dict[str, Any]) -> str:
    cost, rate, replay_s = (
        report["figures"][f"checkpoint_{name}"] for name in ("cost", "timesteps_per_ms", "replay_s")
    )
    return (
        f"{_source(report)}They cost {max(cost, 0):.1%} of the rate `[checkpoint_cost]`, {_rate(rate)} "
        f"timesteps per ms are left; all sessions together replay one interval in {replay_s:.2f} s.\n"
    )


def _saturation_table(figures: dict[str, float]) -> str:
    columns = {
        "model alone": "model_us", "engine": "step_us", "traced step": "traced_step_us", "LSTM": "main_kernel_us",
        "other kernels": "other_kernels_us", "no kernel": "no_kernel_us", "product_us": "product_us",
    }  # fmt: skip
    rows = [
        [
            batch,
            f"{figures[f'model_share_{batch}']:.3f} `[model_share_{batch}]`",
            *(f"{figures[f'{name}_{batch}']:.0f}" for name in columns.values()),
        ]
        for batch in BATCH_SIZES
    ]
    return _table(["batch", "model_share", *columns], rows)


def _evict_table(figures: dict[str, float]) -> str:
    rows = [
        (
            law,
            f"{figures[f'evict_{name}']:.3f} `[evict_{name}]`",
            f"{figures[f'evict_{name}_restored']:.0f}",
            f"{figures[f'evict_{name}_copy_ms']:.2f}",
        )
        for name, law in (("zipf", "Zipf's law"), ("uniform", "evenly"))
    ]
    head = ("who sends", "rate, to that without eviction", "restored a step", "ms for the bus to bring those")
    return _table(head, rows)


def _instances_table(figures: dict[str, float]) -> str:
    rows = []
    for n in INSTANCES:
        cells: list[str] = []
        for dtype in DTYPES:
            setting = f"{dtype}_n{n}"
            there = f"p50_ms_{setting}" in figures
            cells += [_rate(figures[f"timesteps_per_ms_{setting}"]) if there else ""]
            cells += [f"{figures[f'p50_ms_{setting}']:.2f}" if there else ""]
            cells += [f"{T4[dtype][n]}" if n in T4[dtype] else ""]
        rows.append((f"{n:,}", *cells))
    head = ["instances"]
    for dtype in DTYPES:
        head += [f"{dtype}, timesteps/ms", "p50 ms", f"T4, {dtype}"]
    return _table(head, rows)


def _frames(figures: dict[str, float]) -> str:
    sizes = [int(name.rpartition("_b")[2]) for name in figures if name.startswith("frames_vs_engine_b")]
    rows = [
        (
            f"{size:,}",
            *(f"{figures[f'{what}_timesteps_per_s_b{size}'] / 1e3:,.0f}" for what in ("engine", "frames")),
            f"{figures[f'frames_vs_engine_b{size}']:.2f}",
        )
        for size in sizes
    ]
    best = f"The most over frames, of the most by the engine: {figures['frames_vs_engine']:.2f} `[frames_vs_engine]`."
    return _table(["sessions of a frame", "engine", "frames", "ratio"], rows) + f"\n{best}\n"


def _streams_table(figures: dict[str, float]) -> str:
    rows = [
        (title, f"{figures[f'per_s_{name}']:,.0f}", *(f"{figures[f'{part}_ms_{name}']:.0f}" for part in ("p50", "p99")))
        for name, title in (("lstm", "7x1024 LSTM"), ("noop", "no model"), ("naive", "plain Ray Serve"))
    ]
    ratio = (
        f"\nThe LSTM's rate is {figures['h100_stream_vs_noop']:.2f} of that without a model `[h100_stream_vs_noop]`,\n"
        f"{figures['h100_stream_vs_naive']:.0f} times that of plain Ray Serve `[h100_stream_vs_naive]`.\n"
    )
    return _table(("", "segments/s", "p50 ms", "p99 ms"), rows) + ratio


def _fused_rnn_tables(figures: dict[str, float], threads: int) -> str:
    titles = {
        "cpu": f"On the CPU, {threads} threads, fp32",
        "cpu_bf16": f"On the CPU, {threads} threads, bf16; off by, ‖found - expected‖ / ‖expected‖, from fp32",
        "cuda": "On the GPU, fp32",
        "cuda_fp16": "On the GPU, fp16",
    }
    parts = []
    for target, title in titles.items():
        head, rows = fused_rnn.columns(figures, target)
        if rows:
            parts.append(f"{title}:\n\n{_table(head, [list(map(shown, row)) for row in rows])}")
    for device, where in (("cpu", "CPU"), ("cuda", "GPU")):
        _, rows = fused_rnn.best_speedups(figures, device)
        if rows:
            parts.append(
                f"On the {where}, inference, over cells in fp32: torch's fused layers; the fastest way that "
                "the product has;\nand the fastest of these in a precision that is off by at most "
                f"{fused_rnn.MAX_ERROR}:\n\n{_table(fused_rnn.BEST, [list(map(shown, row)) for row in rows])}"
            )
    return "\n".join(parts)


def _bert(report: dict[str, Any]) -> str:
    work, figures = report["workload"], report["figures"]
    rows = []
    for setting, run in report["runs"].items():
        instances = setting.removeprefix("instances=")
        for name, load in run["loads"].items():
            rows.append((instances, name, *(shown(load[key]) for key in ("rate", "p50_ms", "p99_ms", "mean_batch"))))
    head = ("instances", "", "rows/s", "p50 ms", "p99 ms", "rows of a batch")
    return f"""{_source(report)}BERT {work["size"]}, {work["dtype"]}, {work["length"]} tokens:

{_table(head, rows)}
With one instance, or as many as in the first rows: dynamic batches against batches of one
{figures["bert_dynamic_vs_1"]:.2f} `[bert_dynamic_vs_1]`, against the bare model at the same mean batch
{figures["bert_vs_raw"]:.2f} `[bert_vs_raw]`; one row at a time over the bare model
{figures["bert_low_load_over_raw_ms"]:.2f} ms `[bert_low_load_over_raw_ms]`; ragged rows against padded ones
{figures["ragged_vs_padded"]:.2f} `[ragged_vs_padded]`.
"""


def _study(file: Path) -> str:
    report = _load(file.name)
    ratios = {
        "bert_study_8_vs_1": "batch size 8",
        "bert_study_dynamic_vs_1": "dynamic batching with 4 and 8 preferred",
        "bert_study_no_delay_vs_1": "dynamic batching without a delay",
        "bert_study_4_instances_vs_1": "four instances",
    }
    claims = ", ".join(f"{what} {report['figures'][name]:.2f} `[{name}]`" for name, what in ratios.items())
    way = "through the application on Ray Serve" if report["with_ray"] else "by a gRPC server without Ray"
    pictures = " ".join(f"[{n}](../bench/results/{file.stem}/figure{n}.png)" for n in range(1, 9))
    return f"{_source(report)}Against batch size 1, {way}: {claims}.\n\nFigures: {pictures}.\n"


def _tune(file: Path) -> str:
    report, model = _load(file.name), file.stem.split("_")[1]
    figures = report["figures"]
    return (
        f"{_source(report)}{model}: {figures['tune_tried']:.0f} of {report['num_settings']} settings in "
        f"{figures['tune_s']:.0f} s; {figures['tune_vs_sweep']:.2f} times the rate of the best `[tune_vs_sweep]`.\n"
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _load(file: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / file).read_text())
    return report


def _source(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    gpu = "" if hardware["gpu"] == "none" else f"{hardware['gpu']}, "
    return (
        f"On {gpu}{hardware['cpu']}, {hardware['cores']} cores; torch {hardware['torch']}; commit {report['commit']}.\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


@click.command()
def main() -> None:
    """Write docs/performance.md and its pictures from the files in bench/results."""
    DOCUMENT.write_text(rendered())
    draw()


if __name__ == "__main__":
    main()
