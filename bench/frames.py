"""Frames to a replica, as handle clients and ingresses send them, against an engine in this process.

    python -m bench.frames [--device cuda] [--json FILE]

The model is that of bench.engine_cuda, a 7x1024 LSTM in fp16 with the 8 largest outputs, on a CPU a 2x256 LSTM. Groups
of sessions each send their next segments, in one frame, when they have the outputs of the last; to the engine itself,
and over the channel of handles to a replica that has the same settings, from this one process. Both take turns.
`frames_vs_engine`: the most timesteps a second there, to the most of the engine, of all sizes of a group.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
import numpy as np
import torch
from ray import serve

from bench.engine_cuda import LSTM, THREADS, ClosedLoop, config_for, make_engine
from bench.naive import local_serve
from bench.report import json_option, save, show_hardware, table, use_replica_env
from serve_app import app
from serve_app.config import ModelConfig
from serve_app.deployments.frame_channel import FrameChannel
from serve_app.deployments.transport import RayDirectory
from serve_app.directory import Ask, Owner
from serve_app.frame import ABORT, NO_CLOSE, Frame, Open
from serve_app.models import registry

MODEL = {
    "cuda": {**LSTM, "top_k": 8},
    "cpu": {"cell": "lstm", "dtype": "fp32", "input": 128, "hidden": 256, "layers": 2, "output": 256},
}
NAME = "lockstep"
BATCHES = (256, 512, 1024)


class Rates(NamedTuple):
    """Timesteps a second of the engine itself, and over frames."""

    own: float
    frames: float


class Group:
    """Sessions of an owner that send together, each with one segment of k timesteps outstanding."""

    def __init__(self, owner: Owner, batch: int, k: int, first_epoch: int) -> None:
        self._owner, self._k = owner, k
        self._sender = f"bench.frames-{first_epoch}"
        self._channel = FrameChannel(owner.address)
        self._epochs = np.arange(first_epoch, first_epoch + batch)
        rng, spec = np.random.default_rng(first_epoch), owner.spec.input
        self._x = rng.standard_normal((batch * k, *spec.shape), np.float32).astype(spec.dtype)
        self._at = 0

    async def open(self) -> None:
        """Raises RuntimeError when a session is refused."""
        opens = tuple(Open(int(epoch), f"frames-{epoch}") for epoch in self._epochs)
        answer = await self._channel.call(self._frame(0, opens=opens))
        if {notice.kind for notice in answer.notices} != {"opened"}:
            raise RuntimeError(
                f"sessions are refused: {[notice.error for notice in answer.notices if notice.error][:1]}"
            )

    async def send(self) -> int:
        """The next segment of each; returns how many timesteps these are, when all outputs are there."""
        due = len(self._epochs) * self._k
        answer = await self._channel.call(self._frame(self._k))
        had = int(answer.length.sum())
        while had < due:
            answer = await self._channel.call(self._frame(0, whom=slice(0)))
            had += int(answer.length.sum())
        self._at += self._k
        return due

    async def close(self) -> None:
        """End the sessions."""
        await self._channel.call(self._frame(0, close=ABORT))
        await self._channel.close()

    def _frame(self, k: int, whom: slice = slice(None), close: int = NO_CLOSE, opens: Sequence[Open] = ()) -> Frame:
        epochs = self._epochs[:0] if opens else self._epochs[whom]
        same = np.ones(len(epochs), np.int64)
        return Frame.of(
            self._owner.name,
            self._sender,
            epoch=epochs,
            start=same * self._at,
            length=same * k,
            acked=same * self._at,
            rewind=same * 0,
            close=same * close,
            x=self._x[: len(epochs) * k],
            opens=opens,
        )


@asynccontextmanager
async def groups_of(owner: Owner, batch: int, k: int, count: int) -> AsyncIterator[list[Group]]:
    """So many groups of sessions that are open."""
    groups = [Group(owner, batch, k, 1 + i * batch) for i in range(count)]
    for group in groups:
        await group.open()
    yield groups
    for group in groups:
        await group.close()


async def rate(groups: Sequence[Group], seconds: float) -> float:
    """Timesteps a second of all of them together."""
    counts = [0] * len(groups)

    async def drive(i: int) -> None:
        while time.perf_counter() < end:
            counts[i] += await groups[i].send()

    began = time.perf_counter()
    end = began + seconds
    await asyncio.gather(*map(drive, range(len(groups))))
    return sum(counts) / (time.perf_counter() - began)


async def measure(app: str, loop: ClosedLoop, size: tuple[int, int, int], seconds: float, turns: int) -> list[Rates]:
    """Of an application and an engine that serve groups of that size: sessions, timesteps of a segment, groups."""
    directory = RayDirectory(app)
    grant = await directory.open(Ask("bench", "bench.frames", None, {}))
    found = []
    async with groups_of(grant.owner, *size) as groups:
        await rate(groups, seconds)
        for _ in range(turns):
            own = size[0] * size[1] / loop.run(seconds).step_s
            found.append(Rates(own, await rate(groups, seconds)))
    await directory.close()
    return found


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--batch", "batches", multiple=True, default=BATCHES, show_default=True, help="Sessions of a group, and of a step."
)
@click.option("--timesteps", default=10, show_default=True, help="Of a segment.")
@click.option("--groups", default=4, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Of each turn.")
@click.option("--turns", default=5, show_default=True)
@json_option
def main(
    *,
    device: str,
    batches: Sequence[int],
    timesteps: int,
    groups: int,
    seconds: float,
    turns: int,
    json_file: Path | None,
) -> None:
    """Measure frames to a replica against its engine."""
    use_replica_env()
    show_hardware()
    torch.set_num_threads(threads := THREADS if device == "cuda" else 1)
    model = {"seed": 0, **MODEL[device]}
    loaded = registry.load(ModelConfig("rnn", model))
    rates: dict[int, Rates] = {}
    with local_serve():
        for batch in batches:
            engine = make_engine(loaded, batch, timesteps, groups, device=device)
            loop = ClosedLoop(engine, batch, timesteps, groups)
            config = config_for(batch, timesteps, groups + 1, None, device)
            args = {
                "model": {"name": "rnn", **model},
                "num_gpus": int(device == "cuda"),
                **{section: asdict(getattr(config, section)) for section in ("session", "frame")},
                "engine": {**asdict(config.engine), "threads": threads},
            }
            serve.run(app.build(args), name=NAME, route_prefix=None)
            found = asyncio.run(measure(NAME, loop, (batch, timesteps, groups), seconds, turns))
            serve.delete(NAME)
            rates[batch] = Rates(*(median(values) for values in zip(*found, strict=True)))
            click.echo(f"{batch}: " + ", ".join(f"{frames / own:.2f}" for own, frames in found))
    rows = [(batch, own, frames, frames / own) for batch, (own, frames) in rates.items()]
    click.echo(table(["sessions", "engine, timesteps/s", "frames, timesteps/s", "ratio"], rows))
    best = Rates(*map(max, zip(*rates.values(), strict=True)))
    figures: dict[str, float] = {"frames_vs_engine": best.frames / best.own, "groups": groups, "timesteps": timesteps}
    for batch, own, frames, ratio in rows:
        figures |= {
            f"engine_timesteps_per_s_b{batch}": own,
            f"frames_timesteps_per_s_b{batch}": frames,
            f"frames_vs_engine_b{batch}": ratio,
        }
    click.echo(f"frames_vs_engine: {figures['frames_vs_engine']:.2f}")
    save(figures, json_file)


if __name__ == "__main__":
    main()
