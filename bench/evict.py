"""More sessions than slots, on a GPU: the rate with states evicted and restored, against the rate without.

    python -m bench.evict [--json FILE]

65,536 sessions share 8,192 slots; who sends next is drawn by Zipf's law, or evenly. Against it: 8,192 sessions in as
many slots. Model, steps and load are those of bench.engine_cuda: 7x1024 LSTM in fp16, segments of 10 timesteps, 1024
sessions a step. Every session has run, and most are evicted, before it is measured.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch

from bench.engine_cuda import LSTM, THREADS, make_engine, time_s
from bench.report import json_option, save, show_hardware, table
from bench.sender import Sender
from serve_app.config import ModelConfig
from serve_app.engine.engine import Engine
from serve_app.frame import Frame
from serve_app.models import registry
from serve_app.models.interface import RecurrentModel

BATCH, SEGMENT, SENDERS = 1024, 10, 4
SLOTS, SESSIONS = 8192, 65536
DRAWS = 64  # of a sender, made ahead and repeated
COPIED = 2**28  # bytes


class Draw:
    """A sender whose sessions send by chance: each frame has BATCH of them, and acknowledges the one before."""

    def __init__(self, engine: Engine, num_sessions: int, first_epoch: int, zipf: bool, batch: int) -> None:
        self._sender = Sender(engine, num_sessions, first_epoch)
        self._x = np.random.default_rng(first_epoch).standard_normal((batch, SEGMENT, *engine.spec.input.shape))
        self._x = self._x.astype(engine.spec.input.dtype)
        rng = np.random.default_rng(first_epoch)
        weights = 1 / np.arange(1, num_sessions + 1) if zipf else np.ones(num_sessions)
        weights = rng.permutation(weights / weights.sum())
        everyone = rng.permutation(num_sessions).reshape(-1, batch)
        draws = [rng.choice(num_sessions, batch, replace=False, p=weights) for _ in range(DRAWS)]
        self.num_first = len(everyone)
        self._next = self._order(list(everyone), draws)

    def next_frame(self) -> Frame:
        """First everyone in turn, then by chance."""
        sessions, acks = next(self._next)
        return self._sender.frame(sessions, self._x, acks)

    @staticmethod
    def _order(first: list[np.ndarray], then: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Who sends, and who else acknowledges: those who sent before."""
        before = [first[0][:0], *first, *then]
        sends = [(now, np.setdiff1d(last, now)) for last, now in zip(before, [*first, *then, then[0]], strict=True)]
        yield from sends[: len(first) + 1]
        yield from itertools.cycle(sends[len(first) + 1 :])


@torch.inference_mode()
def rate(
    model: RecurrentModel, sessions: int, slots: int, zipf: bool, seconds: float, batch: int, device: str
) -> tuple[float, float]:
    """Timesteps per ms, and sessions of a step that had to be restored."""
    engine = make_engine(model, batch, SEGMENT, groups=sessions // batch, slots=slots, device=device)
    each = sessions // SENDERS
    senders = [Draw(engine, each, 1 + i * each, zipf, batch) for i in range(SENDERS)]
    warm_up = SENDERS * (senders[0].num_first + DRAWS // 2)
    for sender in senders:
        engine.receive(sender.next_frame(), sender, time.monotonic())
    began, answers, restores = 0.0, 0, 0
    while answers < warm_up or time.perf_counter() < began + seconds:
        engine.step(time.monotonic())
        for ticket, answer in engine.answers(time.monotonic()):
            assert isinstance(ticket, Draw)
            assert len(next(iter(answer.outputs.values()))) == batch * SEGMENT, "an answer has all of its step"
            answers += 1
            if answers == warm_up:
                began, restores = time.perf_counter(), engine.stats.restores
            engine.receive(ticket.next_frame(), ticket, time.monotonic())
    steps = answers - warm_up
    return steps * batch * SEGMENT / (time.perf_counter() - began) / 1e3, (engine.stats.restores - restores) / steps


def copy_rate() -> float:
    """Bytes a second from pinned host memory to the device."""
    host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    return COPIED / time_s(lambda: device.copy_(host, non_blocking=True))


@click.command()
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@json_option
def main(seconds: float, json_file: Path | None) -> None:
    """Measure the rate with more sessions than slots."""
    torch.set_num_threads(THREADS)
    show_hardware()
    model = registry.load(ModelConfig("rnn", {**LSTM, "top_k": 8}))
    bytes_a_second = copy_rate()
    figures: dict[str, float] = {"pinned_copy_gb_per_s": bytes_a_second / 1e9}
    base, _ = rate(model, SLOTS, SLOTS, False, seconds, BATCH, "cuda")
    rows: list[tuple[object, ...]] = [("8,192 sessions", base, 0.0, "", 1.0)]
    state_bytes = sum(leaf.nbytes for leaf in model.initial_state(1))
    for name, zipf in (("zipf", True), ("uniform", False)):
        reached, restored = rate(model, SESSIONS, SLOTS, zipf, seconds, BATCH, "cuda")
        figures |= {
            f"evict_{name}": reached / base,
            f"evict_{name}_restored": restored,
            f"evict_{name}_copy_ms": restored * state_bytes / bytes_a_second * 1e3,  # of a step, one way
        }
        rows.append((f"65,536, {name}", reached, restored, figures[f"evict_{name}_copy_ms"], reached / base))
    figures["timesteps_per_ms_without"] = base
    head = ("sessions", "timesteps/ms", "restored a step", "ms to copy those", "ratio")
    click.echo(f"\n{SLOTS:,} slots, pinned copies at {bytes_a_second / 1e9:.0f} GB/s\n{table(head, rows)}")
    save(figures, json_file)


if __name__ == "__main__":
    main()
