"""What checkpoints cost: the engine's rate at saturation with them, at the default interval, and without, in turns.

    python -m bench.checkpoint [--device cuda] [--json FILE]

On a GPU the model of bench.engine_cuda, 8,192 sessions, 1024 a step; on a CPU 2x256 LSTM in fp32, 256 sessions, 64 a
step; segments of 10 timesteps. Beside it what a sender that replays needs at most for one interval.
"""

from pathlib import Path
from statistics import median

import click
import torch

from bench.engine_cuda import LSTM, THREADS, ClosedLoop, make_engine
from bench.report import json_option, save, show_hardware, use_replica_env
from serve_app.config import ModelConfig, SessionConfig
from serve_app.models import registry

SETTINGS = {"cpu": (ModelConfig("rnn"), 64, 4, 1), "cuda": (ModelConfig("rnn", {**LSTM, "top_k": 8}), 1024, 8, THREADS)}
SEGMENT = 10
TURNS = 8


@click.command()
@click.option("--device", type=click.Choice(list(SETTINGS)), default="cpu", show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help=f"Of each of {TURNS} turns.")
@json_option
def main(device: str, seconds: float, json_file: Path | None) -> None:
    """Measure the engine with and without checkpoints."""
    use_replica_env()
    show_hardware()
    config, batch, groups, threads = SETTINGS[device]
    torch.set_num_threads(threads)
    default = SessionConfig()
    loops = [
        ClosedLoop(
            make_engine(registry.load(config), batch, SEGMENT, groups, device=device, session=session),
            batch, SEGMENT, groups,
        )
        for session in (default, SessionConfig(checkpoint_timesteps=0))
    ]  # fmt: skip
    turns = [[loop.run(seconds).step_s for loop in loops] for _ in range(TURNS)]
    cost = median(1 - off / on for on, off in turns)
    rate = batch * SEGMENT / median(on for on, _ in turns) / 1e3
    replay_s = default.checkpoint_timesteps / rate / 1e3 * batch * groups
    click.echo(
        f"\nevery {default.checkpoint_timesteps} timesteps: {cost:.1%} of the rate, {rate:,.0f} timesteps/ms are left"
    )
    click.echo(f"all {batch * groups:,} sessions replay one interval in {replay_s:.2f} s")
    save({"checkpoint_cost": cost, "checkpoint_timesteps_per_ms": rate, "checkpoint_replay_s": replay_s}, json_file)


if __name__ == "__main__":
    main()
