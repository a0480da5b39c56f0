"""The engine on a GPU against the bare model in a CUDA graph (see bench.engine, which runs this for --device cuda).

The model is that of NVIDIA's talk S9422: LSTM of 7 layers and 1024 cells, input 128, projection 1024, fp16, with the
8 largest outputs or all of them. "Graph" is a replay on inputs that lie ready on the device, outputs left there, of
cuDNN or of the fastest that there is; "engine" is host to host, with states by slot: frames of numpy arrays in, answers
of numpy arrays out, GROUPS times the batch of sessions, each with one segment outstanding. All run in one process.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import click
import numpy as np
import torch

from bench.report import table
from bench.sender import Sender
from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig, SessionConfig
from serve_app.engine.calibration import Forward
from serve_app.engine.engine import Engine
from serve_app.frame import COLUMNS as COLUMNS_OF_FRAME
from serve_app.frame import Frame
from serve_app.models import registry
from serve_app.models.interface import RecurrentModel
from serve_app.models.rnn import Rnn

BATCH_SIZES = (1, 16, 64, 256, 512, 1024, 2048)
CLAIMED = (256, 512, 1024, 2048)
TIMESTEPS = (1, 10, 100)
GROUPS = 4
THREADS = 4  # of torch, which copies inputs with them: engine.threads
TURNS = 4  # of engine and graph
LSTM = {"dtype": "fp16", "input": 128, "hidden": 1024, "layers": 7, "output": 1024}
OUTPUTS = {"top8": {"top_k": 8}, "full": {"top_k": 0}}
FLOP = 2 * (4 * 1024 * (128 + 1024) + 6 * 4 * 1024 * 2048 + 1024 * 1024)  # of one timestep
PRODUCT = 8192  # rows, columns and depth of the large product
MAX_TIMESTEPS = 2**15  # of a step
COLUMNS = {
    "cuDNN eager": "eager_per_ms",
    "cuDNN graph": "cudnn_graph_per_ms",
    "fastest graph": "graph_per_ms",
    "engine": "engine_per_ms",
    "ratio": "engine_vs_graph",
    "TFLOP/s": "engine_tflops",
    "p50 ms": "engine_p50_ms",
    "p99 ms": "engine_p99_ms",
}
"""What `measure_setting` finds, by what a table calls it."""


@dataclass(frozen=True, slots=True)
class Load:
    """Of an engine at saturation: seconds for a step's worth, and seconds from frame to answer, of each frame."""

    step_s: float
    delays_s: np.ndarray

    def delay_ms(self, percent: float) -> float:
        """A percentile of the delays."""
        return float(np.percentile(self.delays_s, percent)) * 1e3


@torch.inference_mode()
def eager_s(model: RecurrentModel, batch: int, k: int) -> float:
    """Seconds of a forward, its kernels launched one by one."""
    x, state = _inputs(model, batch, k)
    return time_s(lambda: model.forward(x, state))


@torch.inference_mode()
def make_graph(model: RecurrentModel, batch: int, k: int, forward: Forward) -> Callable[[], None]:
    """Replays a forward in a CUDA graph, always on the same inputs."""
    inputs = x, state = _inputs(model, batch, k)
    forward(x, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(x, state)

    def replay() -> None:
        graph.replay()

    replay.works_on = inputs, forward  # type: ignore[attr-defined]  # which live as long as it does

    return replay


def product_flops() -> float:
    """Operations a second of a large fp16 product."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.float16) for _ in range(2))
    return 2 * PRODUCT**3 / time_s(lambda: a @ b)


def time_s(run: Callable[[], object], seconds: float = 0.25) -> float:
    """Median over spans of at least 10 ms, by the device's clock, without what the host needs in between."""
    run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(1, int(0.01 / (time.perf_counter() - began)))
    spans: list[float] = []
    until = time.monotonic() + seconds
    while len(spans) < 3 or time.monotonic() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / count / 1e3)
    return float(np.median(spans))


def make_engine(
    model: RecurrentModel,
    batch: int,
    k: int,
    groups: int = GROUPS,
    slots: int | None = None,
    device: str = "cuda",
    session: SessionConfig | None = None,
) -> Engine:
    """An engine for steps of `batch` sessions and k timesteps, with `groups` times as many sessions."""
    return Engine(model, config_for(batch, k, groups, slots, device, session))


def config_for(
    batch: int, k: int, groups: int, slots: int | None, device: str, session: SessionConfig | None = None
) -> AppConfig:
    """See make_engine."""
    sessions = groups * batch
    return AppConfig(
        engine=EngineConfig(
            device=device,
            slots=slots or sessions,
            max_batch_size=batch,
            step_timesteps=tuple(sorted({1, k})),
            calibration_file="",
            max_pending_bytes=2**32,
            max_retained_bytes=2**34,
        ),
        session=replace(session or SessionConfig(), max_sessions=sessions),
        frame=FrameConfig(max_bytes=2**30, answer_within_s=60),
    )


class Group:
    """Sessions that send together, each with one segment outstanding."""

    def __init__(self, engine: Engine, batch: int, k: int, first_epoch: int) -> None:
        self._sender = Sender(engine, batch, first_epoch)
        rng = np.random.default_rng(first_epoch)
        spec = engine.spec.input
        self._segments = [rng.standard_normal((batch, k, *spec.shape), np.float32).astype(spec.dtype) for _ in range(2)]
        self._frame = self._sender.frame(np.arange(batch), self._segments[0])
        onward = {"start": k, "acked": k}
        self._onward = np.array([[onward.get(name, 0)] for name in COLUMNS_OF_FRAME])
        self.num_outputs = batch * k  # of an answer
        self._sent = 0
        self.sent_at = 0.0

    def next_frame(self) -> Frame:
        """The next segment of each session, which acknowledges the outputs before."""
        frame = self._frame
        self._sent += 1
        x = self._segments[self._sent % len(self._segments)].reshape(frame.x.shape)
        self._frame = Frame(frame.owner, frame.sender, frame.columns + self._onward, x)
        return frame

    def ask(self) -> Frame:
        """Nothing but the wish for more of an answer."""
        return Frame(self._frame.owner, self._frame.sender, self._frame.columns[:, :0], self._frame.x[:0])


class ClosedLoop:
    """An engine whose groups of sessions each send their next segments when they have the outputs of the last."""

    def __init__(self, engine: Engine, batch: int, k: int, groups: int = GROUPS) -> None:
        self._engine = engine
        self._groups = [Group(engine, batch, k, 1 + i * batch) for i in range(groups)]
        for group in self._groups:
            self._send(group)
        self.run(0, warm_up=30 * groups)  # torch gets more pinned memory in the first of them, and with checkpoints

    @torch.inference_mode()
    def run(self, seconds: float, warm_up: int = 0) -> Load:
        """Goes on for at least `seconds`, after `warm_up` answers (at least two of each group)."""
        engine = self._engine
        warm_up = max(warm_up, 2 * len(self._groups))
        delays: list[float] = []
        began: float | None = None
        while began is None or time.perf_counter() < began + seconds:
            engine.step(time.monotonic())
            for group, answer in engine.answers(time.monotonic()):
                assert isinstance(group, Group)
                assert len(next(iter(answer.outputs.values()))) == group.num_outputs, "an answer has all of its step"
                now = time.perf_counter()
                delays.append(now - group.sent_at)
                if len(delays) == warm_up:
                    began = now
                self._send(group)
        step_s = (time.perf_counter() - began) / max(1, len(delays) - warm_up)
        while engine.ready:
            engine.step(time.monotonic())
        return Load(step_s, np.array(delays[warm_up:]))

    def _send(self, group: Group) -> None:
        frame = group.next_frame()
        group.sent_at = time.perf_counter()
        self._engine.receive(frame, group, time.monotonic())


def measure(seconds: float, max_batch: int) -> dict[str, float]:
    """All figures, printed as tables."""
    peak = product_flops() / 1e12
    click.echo(f"\na product of {PRODUCT} x {PRODUCT} x {PRODUCT} in fp16: {peak:.0f} TFLOP/s")
    figures: dict[str, float] = {"product_tflops": peak}
    for outputs, option in OUTPUTS.items():
        model = registry.load(ModelConfig("rnn", {**LSTM, **option}))
        assert isinstance(model, Rnn)
        model.cuda().eval()
        rows = []
        for batch, k in itertools.product([size for size in BATCH_SIZES if size <= max_batch], TIMESTEPS):
            if batch * k > MAX_TIMESTEPS:
                continue
            found = measure_setting(model, batch, k, seconds)
            figures |= {f"{name}_{outputs}_b{batch}_k{k}": value for name, value in found.items()}
            share = 100 * found["engine_tflops"] / peak
            rows.append((batch, k, *(found[name] for name in COLUMNS.values()), share))
        if outputs == "top8":
            alone = ClosedLoop(make_engine(model, 1, 1), 1, 1, groups=1).run(seconds)
            raw_s = 1 / figures["graph_per_ms_top8_b1_k1"] / 1e3
            figures["idle_overhead_us"] = float(np.median(alone.delays_s) - raw_s) * 1e6
        click.echo(f"\n{outputs}, timesteps per ms\n{table(('batch', 'k', *COLUMNS, '% of product'), rows)}")
        claimed = [figures.get(f"engine_vs_graph_{outputs}_b{batch}_k10", float("inf")) for batch in CLAIMED]
        figures[f"engine_vs_graph_{outputs}"] = min(claimed)
    return figures


def measure_setting(model: Rnn, batch: int, k: int, seconds: float) -> dict[str, float]:
    """Rates in timesteps per ms, and what follows from them, for steps of that size.

    Engine and fastest graph take turns: under load the GPU gets slower after a while, for both.
    """
    forwards = {"cudnn": model.forward, **model.alternatives()}
    graphs = {name: make_graph(model, batch, k, forward) for name, forward in forwards.items()}
    graphs_s = {name: time_s(graph) for name, graph in graphs.items()}
    fastest = graphs[min(graphs_s, key=lambda name: graphs_s[name])]
    loop = ClosedLoop(make_engine(model, batch, k), batch, k)
    turns = [(loop.run(seconds / TURNS), time_s(fastest, seconds / TURNS)) for _ in range(TURNS)]
    load = Load(median(load.step_s for load, _ in turns), np.concatenate([load.delays_s for load, _ in turns]))
    timesteps = batch * k
    return {
        "eager_per_ms": timesteps / eager_s(model, batch, k) / 1e3,
        "cudnn_graph_per_ms": timesteps / graphs_s["cudnn"] / 1e3,
        "graph_per_ms": timesteps / median(raw_s for _, raw_s in turns) / 1e3,
        "engine_per_ms": timesteps / load.step_s / 1e3,
        "engine_vs_graph": median(raw_s / load.step_s for load, raw_s in turns),
        "engine_tflops": timesteps * FLOP / load.step_s / 1e12,
        "engine_p50_ms": load.delay_ms(50),
        "engine_p99_ms": load.delay_ms(99),
    }


def _inputs(model: RecurrentModel, batch: int, k: int) -> tuple[torch.Tensor, object]:
    x = torch.randn((k, batch, *model.input.shape), device="cuda").to(getattr(torch, model.input.dtype))
    state = torch.utils._pytree.tree_map(lambda leaf: torch.randn_like(leaf) / 4, model.initial_state(batch))
    return x, state
