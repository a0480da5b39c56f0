"""Lockstep against the tuned naive application and the plain module: same sessions, same Ray, in turns.

`python -m bench.compare`: every session has one segment outstanding, through handles, from one client process. The naive
application has the best settings that `bench.naive` found.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import click
import numpy as np
from ray import serve
from tqdm import tqdm

from bench import report
from bench.closed_loop import SEED, Call, Inputs, Load, check_outputs, raw_rate, run_load
from bench.naive import CHECKED, NUM_SESSIONS, NaiveConfig, build, load_naive, local_serve, tuned
from clients.client import connect
from clients.session import Session
from serve_app import app

WARM_UP_S = 1.0
SUFFIXES = {1: "", 10: "_t10"}
"""Of the figures, by timesteps of a segment."""


@dataclass(frozen=True, slots=True)
class Round:
    """What was measured one after another. `plain`: the naive application, called as Ray's documentation says."""

    lockstep: Load
    naive: Load
    plain: Load
    raw: float


@click.command()
@click.option("--seconds", default=4.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Of each length of segments.")
@report.json_option
def main(seconds: float, rounds: int, json_file: Path | None) -> None:
    """Measure Lockstep, the naive application and the plain module in turns."""
    report.use_replica_env()
    report.show_hardware()
    config = tuned()
    click.echo(f"naive: {config}\n")
    measured: dict[int, list[Round]] = {}
    with local_serve(), tqdm(total=len(SUFFIXES) * rounds, unit="round", disable=None) as progress:
        serve.run(app.build({"model": {"name": "rnn", "seed": SEED}, "engine.device": "cpu"}), name="lockstep")
        serve.run(build(config), name="naive", route_prefix=None)
        for num_timesteps in SUFFIXES:
            for _ in range(rounds):
                measured.setdefault(num_timesteps, []).append(measure(config, num_timesteps, seconds))
                progress.update()
    figures: dict[str, float] = {}
    for num_timesteps, suffix in SUFFIXES.items():
        show(num_timesteps, measured[num_timesteps])
        figures |= {name + suffix: value for name, value in summarize(measured[num_timesteps]).items()}
    click.echo(report.table(["figure", "value"], list(figures.items())))
    report.save(figures, json_file)


def measure(config: NaiveConfig, num_timesteps: int, seconds: float) -> Round:
    """One round, of segments of that many timesteps."""
    inputs = Inputs(num_timesteps)
    plain = replace(config, handle="plain")
    return Round(
        naive=asyncio.run(load_naive("naive", config, inputs, seconds, WARM_UP_S)),
        lockstep=asyncio.run(load_lockstep("lockstep", inputs, seconds, WARM_UP_S)),
        plain=asyncio.run(load_naive("naive", plain, inputs, seconds, WARM_UP_S)),
        raw=raw_rate(NUM_SESSIONS, num_timesteps, seconds / 4),
    )


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
    ratios = [each.lockstep.rate / each.naive.rate for each in rounds]
    return {
        "vs_naive": median(ratios),
        "vs_naive_min": min(ratios),
        "vs_naive_max": max(ratios),
        "vs_naive_plain_handle": median(each.lockstep.rate / each.plain.rate for each in rounds),
        "lockstep_segments_per_s": median(each.lockstep.rate for each in rounds),
        "naive_segments_per_s": median(each.naive.rate for each in rounds),
        "naive_plain_handle_segments_per_s": median(each.plain.rate for each in rounds),
        "raw_segments_per_s": median(each.raw for each in rounds),
        "lockstep_share_of_raw": median(each.lockstep.rate / each.raw for each in rounds),
        "naive_share_of_raw": median(each.naive.rate / each.raw for each in rounds),
        "lockstep_p50_s": median(each.lockstep.p50_s for each in rounds),
        "lockstep_p99_s": median(each.lockstep.p99_s for each in rounds),
        "naive_p50_s": median(each.naive.p50_s for each in rounds),
        "naive_p99_s": median(each.naive.p99_s for each in rounds),
    }


def show(num_timesteps: int, rounds: Sequence[Round]) -> None:
    """Print every round."""
    head = [
        "round",
        *(f"{name}, {unit}" for name in ("Lockstep", "naive") for unit in ("segments/s", "p50 ms", "p99 ms")),
    ]
    rows = [
        (
            i,
            *(
                value
                for load in (each.lockstep, each.naive)
                for value in (load.rate, load.p50_s * 1e3, load.p99_s * 1e3)
            ),
        )
        + (each.plain.rate, each.raw)
        for i, each in enumerate(rounds)
    ]
    click.echo(f"{NUM_SESSIONS} sessions, segments of {num_timesteps} timesteps")
    click.echo(report.table([*head, "naive with plain handle, segments/s", "raw, segments/s"], rows) + "\n")


if __name__ == "__main__":
    main()
