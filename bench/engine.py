"""The engine without Ray: its rate against the bare model, the scheduler's time, memory of idle sessions.

    python -m bench.engine [--device cpu] [--json FILE]

"Engine" is host to host: a frame of numpy arrays in, a step, an answer of numpy arrays out, everything acknowledged
with the next frame. "Model" is RecurrentModel.forward as torch runs it, on a tensor that lies ready, with its state
kept; "packed" the same with the weights packed as the engine does (serve_app/engine/packed_layers.py). They take turns
of a few rounds in one process, on one thread, so a busy machine slows all; a ratio is the median over the turns.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench import engine_cuda
from bench.report import json_option, save, show_hardware, table, use_replica_env
from bench.sender import Sender
from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.scheduler import Scheduler
from serve_app.models import registry
from serve_app.models.interface import RecurrentModel

MODELS = {"lstm": ModelConfig("rnn"), "silero": ModelConfig("silero_vad")}  # 2x256, input 256, fp32; 16 kHz
BATCH_SIZES = (1, 16, 64, 256)
TIMESTEPS = (1, 10)
CLAIMED = (64, 10)  # batch size and timesteps of the ratios that are claimed
ROUNDS = 8  # of a turn, each with another input, which is not in the cache from the round before
NUM_PARTS = 5  # whose medians show the spread
READY_SESSIONS = 4096


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of each round [turns, ROUNDS], of engine, model and packed model."""

    batch_size: int
    k: int
    engine_s: np.ndarray
    module_s: np.ndarray
    packed_s: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """Rate of the engine in rates of the model, by turn."""
        return _ratios(self.module_s, self.engine_s)

    @property
    def packed_ratio(self) -> float:
        """Rate of the packed model in rates of the model, the median over the turns."""
        return float(np.median(_ratios(self.module_s, self.packed_s)))

    @property
    def vs_packed(self) -> float:
        """Rate of the engine in rates of the packed model."""
        return float(np.median(_ratios(self.packed_s, self.engine_s)))

    @property
    def ratio(self) -> float:
        """The median over the turns."""
        return float(np.median(self.ratios))

    @property
    def spread(self) -> str:
        """Smallest and largest ratio among parts of the time."""
        parts = np.array_split(self.ratios, min(NUM_PARTS, len(self.ratios)))
        medians = [float(np.median(part)) for part in parts]
        return f"{min(medians):.3f}–{max(medians):.3f}"

    @property
    def delay_ms(self) -> float:
        """Median time from a frame to the answer with its outputs."""
        return float(np.median(self.engine_s)) * 1e3

    @property
    def rates(self) -> tuple[float, float]:
        """Timesteps per ms of engine and model."""
        timesteps = self.batch_size * self.k
        return timesteps / self.delay_ms, timesteps / float(np.median(self.module_s)) / 1e3


def _ratios(of: np.ndarray, to: np.ndarray) -> np.ndarray:
    ratios: np.ndarray = np.median(of, 1) / np.median(to, 1)
    return ratios


@torch.inference_mode()
def measure_turns(model: RecurrentModel, packed: RecurrentModel, batch_size: int, k: int, seconds: float) -> Turns:
    """Engine, model and packed model in turns for about `seconds`, on the same inputs.

    packed: the same model again, which is handed to the engine. AssertionError if outputs differ.
    """
    # an answer is 2.6 MB at most here; one frame, one answer
    engine = Engine(packed, AppConfig(engine=EngineConfig(device="cpu"), frame=FrameConfig(max_bytes=8 * 2**20)))
    sender = Sender(engine, batch_size)
    sessions = np.arange(batch_size)
    rng = np.random.default_rng(0)
    segments = [rng.standard_normal((batch_size, k, *model.input.shape), np.float32) for _ in range(ROUNDS)]
    tensors = [torch.from_numpy(x.swapaxes(0, 1).copy()) for x in segments]
    state = packed_state = model.initial_state(batch_size)
    (name,) = model.outputs
    engine_s: list[list[float]] = []
    module_s: list[list[float]] = []
    packed_s: list[list[float]] = []
    until = time.monotonic() + seconds
    while len(engine_s) < 2 or time.monotonic() < until:
        frames = [sender.frame(sessions, x) for x in segments]
        engine_s.append([])
        for frame in frames:
            began = time.perf_counter()
            (answer,) = sender.exchange(frame)
            engine_s[-1].append(time.perf_counter() - began)
        y, state = _run(model, tensors, state, module_s)
        packed_y, packed_state = _run(packed, tensors, packed_state, packed_s)
    found = answer.outputs[name].reshape(batch_size, k, *y.shape[2:])
    for outputs in (found, packed_y.transpose(0, 1).numpy()):
        np.testing.assert_allclose(outputs, y.transpose(0, 1).numpy(), rtol=1e-5, atol=1e-5)
    turns = (np.array(times[1:]) for times in (engine_s, module_s, packed_s))  # the first warmed up
    return Turns(batch_size, k, *turns)


def _run(
    model: RecurrentModel, tensors: list[torch.Tensor], state: Any, times: list[list[float]]
) -> tuple[torch.Tensor, Any]:
    """All `tensors` through the model; its last output and state. `times` gets the seconds of each."""
    times.append([])
    for x in tensors:
        began = time.perf_counter()
        y, state = model.forward(x, state)
        times[-1].append(time.perf_counter() - began)
    assert isinstance(y, torch.Tensor)
    return y, state


def measure_scheduler(lengths: np.ndarray, seconds: float) -> float:
    """Microseconds of add and schedule for one segment; row i sends segments of lengths[i] timesteps."""
    scheduler = Scheduler(256, range(1, 17), max_rows=len(lengths))
    scheduler.add(np.arange(len(lengths)), lengths, 0.0)
    samples: list[float] = []
    until = time.monotonic() + seconds
    while not samples or time.monotonic() < until:
        segments = 0
        began = time.perf_counter()
        for _ in range(200):
            batch = scheduler.schedule(0.0)
            assert batch is not None
            done = batch.rows[scheduler.left[batch.rows] == 0]
            scheduler.add(done, lengths[done], 0.0)
            segments += len(done)
        samples.append((time.perf_counter() - began) / segments)
    scheduler.check()
    return float(np.median(samples)) * 1e6


def measure_idle(num_sessions: int) -> dict[str, float]:
    """What bench.idle finds, in a process of its own: memory that others used before would hide what sessions need."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "idle.json"
        command = [sys.executable, "-m", "bench.idle", "--sessions", str(num_sessions), "--json", str(file)]
        subprocess.run(command, check=True)
        figures: dict[str, float] = json.loads(file.read_text())["figures"]
        return figures


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--seconds", default=2.0, show_default=True, help="For each setting; four times that for the claimed ones."
)
@click.option("--max-batch", default=0, help="Leave out larger batches.")
@click.option("--idle-sessions", default=10_000, show_default=True)
@json_option
def main(device: str, seconds: float, max_batch: int, idle_sessions: int, json_file: Path | None) -> None:
    """Measure the engine against the bare model."""
    use_replica_env()
    torch.set_num_threads(1)
    show_hardware()
    if device == "cuda":
        torch.set_num_threads(engine_cuda.THREADS)
        save(engine_cuda.measure(seconds, max_batch or max(engine_cuda.BATCH_SIZES)), json_file)
        return
    max_batch = max_batch or max(BATCH_SIZES)
    figures: dict[str, float] = {}
    for name, config in MODELS.items():
        model, packed = registry.load(config), registry.load(config)
        rows = []
        batch_sizes = {CLAIMED[0], *(size for size in BATCH_SIZES if size <= max_batch)}
        for batch_size, k in itertools.product(sorted(batch_sizes), TIMESTEPS):
            claimed = (batch_size, k) == CLAIMED
            turns = measure_turns(model, packed, batch_size, k, 4 * seconds if claimed else seconds)
            rows.append(
                (
                    batch_size,
                    k,
                    *turns.rates,
                    turns.ratio,
                    turns.spread,
                    turns.vs_packed,
                    turns.packed_ratio,
                    turns.delay_ms,
                )
            )
            setting = f"{name}_b{batch_size}_k{k}"
            figures[f"engine_timesteps_per_ms_{setting}"] = turns.rates[0]
            figures[f"engine_p50_ms_{setting}"] = turns.delay_ms
            figures[f"engine_vs_module_{name}" if claimed else f"engine_vs_module_{setting}"] = turns.ratio
            figures[f"engine_vs_packed_{setting}"] = turns.vs_packed
            figures[f"packed_vs_module_{setting}"] = turns.packed_ratio
        head = (
            "batch",
            "timesteps",
            "engine /ms",
            "model /ms",
            "ratio",
            "spread",
            "to packed",
            "packed to model",
            "p50 ms",
        )
        click.echo(f"\n{name}, timesteps per ms\n{table(head, rows)}")

    mixed = np.random.default_rng(0).integers(1, 41, READY_SESSIONS)
    figures["scheduler_us"] = measure_scheduler(np.full(READY_SESSIONS, 10), seconds)
    figures["scheduler_mixed_us"] = measure_scheduler(mixed, seconds)
    click.echo(f"\nscheduler, µs a segment, {READY_SESSIONS:,} ready: {figures['scheduler_us']:.2f}, ", nl=False)
    click.echo(f"of 1 to 40 timesteps: {figures['scheduler_mixed_us']:.2f}\n")
    figures |= measure_idle(idle_sessions)
    save(figures, json_file)


if __name__ == "__main__":
    main()
