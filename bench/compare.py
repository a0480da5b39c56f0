"""Lockstep against the tuned naive application and the plain module: same sessions, same Ray, in turns.

    python -m bench.compare [--seconds 4] [--json FILE]

Every session has one segment outstanding; all are driven through handles, from one client process. The naive
application has the best settings that `bench.naive` found: of all (naive), and of those with a plain handle
(naive_plain). Outputs of all three are compared with the plain module's.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import click
import numpy as np
from ray import serve
from tqdm import tqdm

from bench import report
from bench.closed_loop import SEED, Call, Inputs, Load, check_outputs, raw_rate, run_load
from bench.naive import CHECKED, NUM_SESSIONS, NaiveConfig, deployment, load_naive, local_serve, tuned
from clients.client import connect
from clients.session import Session
from serve_app import app

WARM_UP_S = 1.0
SUFFIXES = {1: "", 10: "_t10"}
"""Of the figures, by timesteps of a segment."""


@dataclass(frozen=True, slots=True)
class Round:
    """What was measured one after another."""

    lockstep: Load
    naive: Load
    naive_plain: Load
    raw: float


@click.command()
@click.option("--seconds", default=4.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Of each length of segments.")
@report.json_option
def main(seconds: float, rounds: int, json_file: Path | None) -> None:
    """Measure Lockstep, the naive application and the plain module in turns."""
    report.use_replica_env()
    report.show_hardware()
    configs = {"naive": tuned(plain=False), "naive_plain": tuned(plain=True)}
    for name, config in configs.items():
        click.echo(f"{name}: {config}")
    measured: dict[int, list[Round]] = {}
    with local_serve(), tqdm(total=len(SUFFIXES) * rounds, unit="round", disable=None) as progress:
        lockstep = app.build({"model": {"name": "rnn", "seed": SEED}, "engine.device": "cpu"})
        serve.run(lockstep, name="lockstep", route_prefix=None)
        for name, config in configs.items():
            serve.run(deployment(config), name=name, route_prefix=None)
        for num_timesteps in SUFFIXES:
            for _ in range(rounds):
                measured.setdefault(num_timesteps, []).append(measure(configs, num_timesteps, seconds))
                progress.update()
    figures: dict[str, float] = {}
    for num_timesteps, suffix in SUFFIXES.items():
        show(num_timesteps, measured[num_timesteps])
        figures |= {name + suffix: value for name, value in summarize(measured[num_timesteps]).items()}
    click.echo(report.table(["figure", "value"], list(figures.items())))
    report.save(figures, json_file)


def measure(configs: Mapping[str, NaiveConfig], num_timesteps: int, seconds: float) -> Round:
    """One round, of segments of that many timesteps."""
    inputs = Inputs(num_timesteps)
    naive, naive_plain = (
        asyncio.run(load_naive(name, config, inputs, seconds, WARM_UP_S)) for name, config in configs.items()
    )
    lockstep = asyncio.run(load_lockstep("lockstep", inputs, seconds, WARM_UP_S))
    return Round(lockstep, naive, naive_plain, raw_rate(NUM_SESSIONS, num_timesteps, seconds / 4))


async def load_lockstep(name: str, inputs: Inputs, seconds: float, warm_up_s: float) -> Load:
    """Load the application with NUM_SESSIONS new sessions; what a few of them get is checked."""

    def call_of(session: Session) -> Call:
        async def call(x: np.ndarray) -> np.ndarray:
            await session.wait(session.submit(x))
            outputs = session.read()
            assert outputs is not None, "a segment that was waited for has outputs"
            return outputs.values["y"]

        return call

    async with connect(name) as client:
        sessions = await asyncio.gather(*(client.open() for _ in range(NUM_SESSIONS)))
        calls = [call_of(session) for session in sessions]
        load, kept = await run_load(calls, inputs, seconds, warm_up_s, keep=CHECKED)
        check_outputs(kept, inputs)
        await asyncio.gather(*(session.close() for session in sessions))
    return load


def summarize(rounds: Sequence[Round]) -> dict[str, float]:
    """Medians over the rounds; ratios are taken within a round, since the machine may not be ours alone."""
    vs_naive = [each.lockstep.rate / each.naive.rate for each in rounds]
    vs_naive_plain = [each.lockstep.rate / each.naive_plain.rate for each in rounds]
    figures = {
        "vs_naive": median(vs_naive),
        "vs_naive_min": min(vs_naive),
        "vs_naive_max": max(vs_naive),
        "vs_naive_plain": median(vs_naive_plain),
        "vs_naive_plain_min": min(vs_naive_plain),
        "vs_naive_plain_max": max(vs_naive_plain),
        "raw_segments_per_s": median(each.raw for each in rounds),
    }
    for name in ("lockstep", "naive", "naive_plain"):
        loads: list[Load] = [getattr(each, name) for each in rounds]
        figures |= {
            f"{name}_segments_per_s": median(load.rate for load in loads),
            f"{name}_share_of_raw": median(load.rate / each.raw for load, each in zip(loads, rounds, strict=True)),
            f"{name}_p50_s": median(load.p50_s for load in loads),
            f"{name}_p99_s": median(load.p99_s for load in loads),
        }
    return figures


def show(num_timesteps: int, rounds: Sequence[Round]) -> None:
    """Print every round."""
    click.echo(f"\n{NUM_SESSIONS} sessions, segments of {num_timesteps} timesteps")
    rows: list[tuple[object, ...]] = []
    for i, each in enumerate(rounds):
        for name in ("lockstep", "naive", "naive_plain"):
            load: Load = getattr(each, name)
            rows.append((f"{name} {i}", load.rate, load.p50_s * 1e3, load.p99_s * 1e3))
        rows.append((f"raw {i}", each.raw, "", ""))
    click.echo(report.table(["round", "segments/s", "p50 ms", "p99 ms"], rows) + "\n")


if __name__ == "__main__":
    main()
