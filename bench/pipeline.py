"""What three models cost as a pipeline on one session, against the sum of their own times.

The session's audio goes through an engine, in segments of one timestep or four: received, run, answered. Beside it each
model by itself, with the same weights and over as much audio: through an engine of its own, and its bare forward.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
import yaml

from bench.report import ROOT, json_option, save, show_hardware, table, use_replica_env
from serve_app.config import AppConfig, load_config
from serve_app.engine.engine import Engine
from serve_app.engine.runner import inference_mode
from serve_app.frame import COLUMNS, NO_CLOSE, Frame, Open
from serve_app.models import registry
from serve_app.models.pipeline import Pipeline

CONFIG = ROOT / "configs/pipeline.yaml"
MAX_STEPS = 20
"""Of a part in one timestep of the pipeline: an engine of its own runs them in one step, too."""


class OneSession:
    """A session at an engine, its outputs acknowledged as they come."""

    def __init__(self, engine: Engine, epoch: int, x: np.ndarray) -> None:
        self.engine, self.epoch, self.x, self.start = engine, epoch, x, 0
        opens, nothing = (Open(epoch, f"bench {epoch}"),), np.zeros((len(COLUMNS), 0), np.int64)
        self._send(Frame(engine.owner, "bench", nothing, x[:0], opens))

    def segment(self) -> None:
        """Send x again, run it, take the outputs."""
        length = len(self.x)
        entry = np.array([[length], [self.epoch], [self.start], [0], [NO_CLOSE], [self.start]])
        self._send(Frame(self.engine.owner, "bench", entry, self.x))
        self.start += length

    def _send(self, frame: Frame) -> None:
        now = time.monotonic()
        self.engine.receive(frame, object(), now)
        while self.engine.ready:
            self.engine.step(now)
        answered = sum(int(answer.length.sum()) for _, answer in self.engine.answers(now))
        if answered != len(frame.x):
            raise RuntimeError(f"{answered} timesteps of {len(frame.x)} were answered")


def alone(pipeline: Pipeline, config: AppConfig, timesteps: int) -> dict[str, Callable[[], object]]:
    """For each part, the same audio through an engine with that part only; and through its bare forward.

    In an order in which none comes right after another of the same weights, which would be in the caches still.
    """
    calls: dict[str, Callable[[], object]] = {}
    bare: dict[str, Callable[[], object]] = {}
    config = replace(config, engine=replace(config.engine, max_step_timesteps=timesteps * MAX_STEPS))
    for part in pipeline.parts:
        shape = timesteps * part.steps, *part.model.input.shape
        x = np.random.default_rng(1).normal(0, 0.1, shape).astype(np.float32)
        calls[part.name] = OneSession(Engine(part.model, config), 1, x).segment
        bare[f"bare {part.name}"] = partial(
            part.model.forward, torch.from_numpy(x)[:, None], part.model.initial_state(1)
        )
    return calls | bare


def times(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each call in s, all of them in turn."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    with inference_mode():
        for _ in range(rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                took[name].append(time.perf_counter() - began)
    return {name: median(values[rounds // 10 :]) for name, values in took.items()}


def configured(file: Path) -> AppConfig:
    """The application in a configuration file, with its engine on the CPU."""
    args: dict[str, Any] = yaml.safe_load(file.read_text())["applications"][0]["args"]
    return load_config({**args, "engine": {**args.get("engine", {}), "device": "cpu"}})


@click.command()
@click.option("--rounds", default=300, show_default=True, type=click.IntRange(10))
@json_option
def main(rounds: int, json_file: Path | None) -> None:
    """Measure, print, and write the figures."""
    use_replica_env()
    show_hardware()
    config = configured(CONFIG)
    pipeline = registry.load(config.model)
    assert isinstance(pipeline, Pipeline)
    torch.set_num_threads(config.engine.threads)
    engine = Engine(pipeline, config)  # puts the weights in the form in which all run
    rows, figures = [], {}
    for timesteps in (1, 4):
        x = np.random.default_rng(0).normal(0, 0.1, (timesteps, *pipeline.input.shape)).astype(np.float32)
        session = OneSession(engine, timesteps, x)
        found = times({"pipeline": session.segment, **alone(pipeline, config, timesteps)}, rounds)
        whole = found["pipeline"]
        suffix = "" if timesteps == 1 else f"_t{timesteps}"
        figures[f"pipeline_vs_parts{suffix}"] = whole / sum(found[part.name] for part in pipeline.parts)
        figures[f"pipeline_vs_modules{suffix}"] = whole / sum(found[f"bare {part.name}"] for part in pipeline.parts)
        rows.append({"timesteps": timesteps, **{name: took_s * 1e3 for name, took_s in found.items()}})
    click.echo(table(["ms", ""], [(name, value) for row in rows for name, value in row.items()]))
    click.echo(table(["figure", ""], list(figures.items())))
    save(figures, json_file, ms=rows)


if __name__ == "__main__":
    main()
