"""A few live sessions beside many with all their input ready: their delay, by the delay target, and what that costs.

    python -m bench.delay [--device cpu] [--json FILE]

The engine alone, one thread. A live session submits a timestep when it is due, whether or not its last was answered;
its delay counts from then to the answer. All others have timesteps ready all the time. The targets take turns.
"""

import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import torch

from bench.report import json_option, save, show_hardware, table, use_replica_env
from bench.sender import Sender
from serve_app.config import AppConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.frame import Answer
from serve_app.models import registry

TARGETS_MS = (0, 4, 10)  # 0: none
NUM_LIVE = 4
LIVE_EVERY_S = 20e-3
BULK_TIMESTEPS = 128  # of a segment; another follows when half of them have run
WARM_UP_S = 1.0


class Group:
    """Sessions of one sender, of which several segments may be on their way."""

    def __init__(self, engine: Engine, num_sessions: int, first_epoch: int) -> None:
        self._engine = engine
        self._sender = Sender(engine, num_sessions, first_epoch)
        self._first_epoch = first_epoch
        self.received = self._sender.start.copy()

    @property
    def on_their_way(self) -> np.ndarray:
        """Timesteps submitted and not received, by session."""
        return self._sender.start - self.received

    def send(self, sessions: np.ndarray, x: np.ndarray) -> None:
        """Submit x [n, k, *features] of `sessions` [n], acknowledge what they have received."""
        frame = self._sender.frame(sessions, x)
        frame.acked[:] = self.received[sessions]
        self._engine.receive(frame, self, time.monotonic())

    def take(self, answer: Answer) -> int:
        """Outputs have come; returns how many timesteps."""
        self.received[answer.epoch - self._first_epoch] += answer.length
        return int(answer.length.sum())


@dataclass
class Run:
    """An engine with both groups, and what has been seen of it."""

    engine: Engine
    live: Group
    bulk: Group
    delays_s: list[float] = field(default_factory=list)
    timesteps: int = 0

    def for_seconds(self, seconds: float) -> None:
        """Serve both for so long."""
        features = self.engine.spec.input.shape
        x = np.random.default_rng(0).standard_normal((len(self.bulk.received), BULK_TIMESTEPS, *features), np.float32)
        sent: deque[float] = deque()
        due, until = time.monotonic(), time.monotonic() + seconds
        self._feed(x)
        while (now := time.monotonic()) < until or sent:
            if due <= now < until:
                self.live.send(np.arange(NUM_LIVE), x[:NUM_LIVE, :1])
                sent.append(due)
                due += LIVE_EVERY_S
            self.engine.step(now)
            for group, answer in self.engine.answers(time.monotonic()):
                if group is self.bulk:
                    self.timesteps += self.bulk.take(answer)
                    self._feed(x)
                else:
                    for _ in range(self.live.take(answer) // NUM_LIVE):
                        self.delays_s.append(time.monotonic() - sent.popleft())

    def _feed(self, x: np.ndarray) -> None:
        short = np.flatnonzero(self.bulk.on_their_way <= BULK_TIMESTEPS // 2)
        self.bulk.send(short, x[short])


def measure(device: str, target_ms: int, bulk: int, seconds: float) -> Run:
    """`seconds` of live and bulk sessions, after a while for the engine to learn how long steps take."""
    engine_config = EngineConfig(device=device, delay_target_s=target_ms / 1e3)
    engine = Engine(registry.load(ModelConfig("rnn")), AppConfig(engine=engine_config))
    run = Run(engine, Group(engine, NUM_LIVE, 10**6), Group(engine, bulk, 1))
    run.for_seconds(WARM_UP_S)
    run.delays_s.clear()
    run.timesteps = 0
    run.for_seconds(seconds)
    engine.check()
    return run


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--bulk", default=64, show_default=True, help="Sessions with all their input ready.")
@click.option("--seconds", default=4.0, show_default=True, help="Of each turn.")
@click.option("--turns", default=3, show_default=True)
@json_option
@torch.inference_mode()
def main(device: str, bulk: int, seconds: float, turns: int, json_file: Path | None) -> None:
    """Measure the delay of live sessions beside others that keep the engine busy."""
    use_replica_env()
    torch.set_num_threads(1)
    show_hardware()
    runs: dict[int, list[Run]] = {target: [] for target in TARGETS_MS}
    for _, target in itertools.product(range(turns), TARGETS_MS):
        runs[target].append(measure(device, target, bulk, seconds))
    rows, figures = [], dict[str, float]()
    for target, done in runs.items():
        delays_ms = np.concatenate([run.delays_s for run in done]) * 1e3
        p50, p99 = (float(np.percentile(delays_ms, q)) for q in (50, 99))
        rate = float(np.median([run.timesteps for run in done])) / seconds / 1e3
        name = f"target_{target}ms" if target else "no_target"
        figures |= {f"delay_p50_ms_{name}": p50, f"delay_p99_ms_{name}": p99, f"timesteps_per_ms_{name}": rate}
        rows.append((target or "none", p50, p99, rate))
    click.echo("\n" + table(("target ms", "p50 ms", "p99 ms", "timesteps/ms"), rows))
    save(figures, json_file)


if __name__ == "__main__":
    main()
