"""Memory of idle sessions: how much more a process takes for each session that is open and silent.

    python -m bench.idle [--sessions 10000] [--json FILE]

The sessions share 512 slots. Each runs a few timesteps and falls silent; the figure is the growth in resident memory
for one of them, in sizes of its state. Then they send now and then, and all outputs are compared with the bare model's.
"""

import gc
from pathlib import Path

import click
import numpy as np
import psutil
import torch

from bench.report import json_option, save, use_replica_env
from bench.sender import BURST, Sender
from serve_app.config import AppConfig, EngineConfig, ModelConfig, SessionConfig
from serve_app.engine.engine import Engine
from serve_app.frame import Answer
from serve_app.models import registry
from serve_app.models.interface import RecurrentModel

FEW = 3  # timesteps before falling silent
LENGTH = 12  # timesteps of a session in the end
INPUTS = 4096  # distinct timesteps of input


class Inputs:
    """Timestep t of session s, the same whenever asked for, without keeping all."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._values = np.random.default_rng(0).standard_normal((INPUTS, *shape), np.float32)

    def read(self, sessions: np.ndarray, starts: np.ndarray, k: int) -> np.ndarray:
        """[n, k, *features]."""
        values: np.ndarray = self._values[(sessions[:, None] * 37 + starts[:, None] + np.arange(k)) % INPUTS]
        return values


def resident_bytes() -> int:
    """Memory of this process, after what can be given back has been."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def run_all(sender: Sender, inputs: Inputs) -> None:
    """A few timesteps of every session, in frames of a burst, all outputs acknowledged."""
    sessions = np.arange(len(sender.start))
    for first in range(0, len(sessions), BURST):
        some = sessions[first : first + BURST]
        sender.exchange(sender.frame(some, inputs.read(some, sender.start[some], FEW)))
        sender.ack(some)


def run_at_random(sender: Sender, inputs: Inputs, outputs: np.ndarray) -> None:
    """Each session sends up to its end, now and then some timesteps; `outputs` [n, LENGTH, *features] is filled."""
    rng = np.random.default_rng(1)
    while (open_sessions := np.flatnonzero(sender.start < LENGTH)).size:
        some = rng.choice(open_sessions, min(BURST, len(open_sessions)), replace=False)
        k = min(int(rng.integers(1, 6)), int(LENGTH - sender.start[some].max()))
        for answer in sender.exchange(sender.frame(some, inputs.read(some, sender.start[some], k))):
            _place(answer, outputs)


def _place(answer: Answer, outputs: np.ndarray) -> None:
    (values,) = answer.outputs.values()
    rows = np.repeat(answer.epoch - FIRST_EPOCH, answer.length)
    firsts = np.cumsum(answer.length) - answer.length
    timesteps = np.arange(len(values)) - np.repeat(firsts - answer.start, answer.length)
    outputs[rows, timesteps] = values


@torch.inference_mode()
def largest_error(model: RecurrentModel, inputs: Inputs, outputs: np.ndarray) -> float:
    """Against the bare model, of what was run at random; AssertionError beyond 1e-5."""
    largest = 0.0
    for first in range(0, len(outputs), BURST):
        some = np.arange(first, min(first + BURST, len(outputs)))
        x = inputs.read(some, np.zeros_like(some), LENGTH).swapaxes(0, 1).copy()
        y, _ = model.forward(torch.from_numpy(x), model.initial_state(len(some)))
        assert isinstance(y, torch.Tensor)
        due, found = y.transpose(0, 1).numpy()[:, FEW:], outputs[some, FEW:]
        np.testing.assert_allclose(found, due, rtol=1e-5, atol=1e-5)
        largest = max(largest, float(np.abs(found - due).max()))
    return largest


FIRST_EPOCH = 1_000_000


@click.command()
@click.option("--sessions", default=10_000, show_default=True)
@json_option
def main(sessions: int, json_file: Path | None) -> None:
    """Measure the memory of idle sessions, and check that what they do afterwards is right."""
    use_replica_env()
    torch.set_num_threads(1)
    model = registry.load(ModelConfig("rnn"))  # a 2x256 LSTM in fp32
    config = AppConfig(
        engine=EngineConfig(device="cpu", slots=512), session=SessionConfig(max_sessions=max(16384, sessions))
    )
    engine = Engine(model, config)
    inputs = Inputs(model.input.shape)

    warm_up = Sender(engine, BURST)
    run_all(warm_up, inputs)
    warm_up.abort()
    before = resident_bytes()
    sender = Sender(engine, sessions, FIRST_EPOCH)
    run_all(sender, inputs)
    grown = resident_bytes() - before
    ratio = grown / sessions / engine.spec.state_bytes
    click.echo(
        f"{sessions:,} idle sessions over 512 slots: {grown / sessions:,.0f} bytes each, a state has "
        f"{engine.spec.state_bytes:,}: ratio {ratio:.2f}"
    )

    outputs = np.full((sessions, LENGTH, *engine.spec.outputs["y"].shape), np.nan, np.float32)
    run_at_random(sender, inputs, outputs)
    error = largest_error(model, inputs, outputs)
    engine.check()
    click.echo(
        f"then {engine.stats.timesteps:,} timesteps in all, {engine.stats.restores:,} restores of a state: "
        f"all outputs right, largest error {error:.1e}"
    )
    save({"idle_bytes_ratio": ratio, "idle_max_error": error}, json_file)


if __name__ == "__main__":
    main()
