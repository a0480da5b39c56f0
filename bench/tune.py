"""The configuration with the best rate under a limit on the delay, searched by measuring.

    python -m bench.tune configs/bert.yaml --delay-ms 200 --outstanding 64 --out tuned.yaml
    python -m bench.tune configs/lstm.yaml --delay-ms 20 --outstanding 64 --lengths 1,10,100 --out tuned.yaml

Takes a file for `serve run` with one model, stateless or recurrent, and writes the same with the settings that were
best. Clients in this process each keep one request (or segment) outstanding, of random lengths out of those that are
given, at a Batcher or an engine as a replica has it. Optuna's TPE sampler (arXiv:2304.11127) proposes settings; the
best few are measured again, in turns, and the median counts. With --sweep all settings are measured in the same way,
and `tune_vs_sweep` is the rate of the tuner's choice to that of the sweep's, again in turns.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
import yaml

from bench.delay import Group
from bench.report import ROOT, json_option, save, show_hardware, table, use_replica_env
from examples.ranking import sentences
from serve_app.coerce import unflatten
from serve_app.config import AppConfig, load_config
from serve_app.engine.batcher import build_batcher
from serve_app.engine.engine import Engine
from serve_app.errors import ConfigError
from serve_app.models import registry
from serve_app.rows import ANY, BatchedSpec, RowsRequest
from serve_app.spec import TensorSpec

Settings = tuple[int, ...]
"""Of each name of a space, which of its values."""
Space = Mapping[str, tuple[Any, ...]]

STATELESS: Space = {
    "batching.max_batch_size": (1, 2, 4, 8, 16, 32, 64),
    "batching.preferred_batch_sizes": ([], [4, 8]),
    "batching.max_queue_delay_s": (0.0, 0.001, 0.005),
    "batching.instances": (1, 2, 4),
}
RECURRENT: Space = {
    "engine.max_batch_size": (4, 8, 16, 32, 64, 128, 256),
    "engine.max_step_timesteps": (1, 2, 4, 8, 16, 32, 64),
    "engine.delay_target_s": (0.0, 0.002, 0.01),
}
WARM_UP_S = 0.3
FINALISTS, TURNS = 5, 3
WORST = 1e3
MIN_CALLS = 2
"""That a sender has on their way, as an outbox has."""


@dataclass(frozen=True, slots=True)
class Load:
    """Rows or timesteps a second, and the 99th percentile of a request's delay."""

    rate: float
    p99_ms: float

    def score(self, delay_ms: float) -> float:
        """The rate; less than 0 where the delay is over the limit: how many times it is that, WORST at most."""
        return self.rate if self.p99_ms <= delay_ms else -min(self.p99_ms / delay_ms, WORST)


@dataclass(frozen=True, slots=True)
class Workload:
    """So many requests outstanding at any time, of lengths out of these."""

    outstanding: int
    lengths: Sequence[int]
    seconds: float


class Tuner:
    """Measures settings of an application, each once, and the best again."""

    def __init__(self, args: Mapping[str, Any], work: Workload, delay_ms: float) -> None:
        """args: of the application."""
        self._args = unflatten(args)
        self._work = work
        self._delay_ms = delay_ms
        self.is_stateless = load_config(args).batching is not None
        self.space = STATELESS if self.is_stateless else RECURRENT
        self.measured: dict[Settings, float] = {}

    def changes(self, settings: Settings) -> dict[str, Any]:
        """Their values, by name."""
        return {name: values[i] for (name, values), i in zip(self.space.items(), settings, strict=True)}

    def args(self, settings: Settings) -> dict[str, Any]:
        """The application's, with these settings."""
        args = {name: dict(value) if isinstance(value, Mapping) else value for name, value in self._args.items()}
        for name, value in self.changes(settings).items():
            section, key = name.split(".")
            args[section] = {**(args.get(section) or {}), key: value}
        return args

    def all_settings(self) -> list[Settings]:
        """All that can be configured and are not the same as others."""
        everything = itertools.product(*(range(len(values)) for values in self.space.values()))
        return [settings for settings in everything if self._makes_sense(settings)]

    def score(self, settings: Settings) -> float:
        """See Load.score; measured the first time."""
        if settings not in self.measured:
            self.measured[settings] = self.measure(settings).score(self._delay_ms)
            click.echo(f"{len(self.measured)}: {self.changes(settings)}: {self.measured[settings]:,.1f}")
        return self.measured[settings]

    def measure(self, settings: Settings) -> Load:
        """At a Batcher or an engine of their own."""
        run = stateless_load if self.is_stateless else recurrent_load
        return run(load_config(self.args(settings)), self._work)

    def search(self, seconds: float, seed: int) -> tuple[Settings, float]:
        """The best of what the sampler proposes within about so many seconds, or of all there are; and its score."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        names = list(self.space)
        tried: set[Settings] = set()
        untried = set(self.all_settings())
        until = time.monotonic() + seconds
        while untried and time.monotonic() < until:
            trial = study.ask()
            proposed = tuple(trial.suggest_int(name, 0, len(values) - 1) for name, values in self.space.items())
            # What it has seen it may propose again, and measuring that would tell little: the nearest to it then.
            settings = min(untried, key=lambda s: sum(abs(a - b) for a, b in zip(s, proposed, strict=True)))
            if settings != proposed:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial(dict(zip(names, settings, strict=True)))
                trial = study.ask()
                for name, values in self.space.items():
                    trial.suggest_int(name, 0, len(values) - 1)
            study.tell(trial, self.score(settings))
            tried.add(settings)
            untried.remove(settings)
        return self.finalist(tried)

    def finalist(self, among: set[Settings]) -> tuple[Settings, float]:
        """The best of the few that were best, and its score, measured again in turns."""
        few = sorted(among, key=lambda settings: -self.measured[settings])[:FINALISTS]
        return max(self.compare(few).items(), key=lambda item: item[1])

    def compare(self, few: Sequence[Settings]) -> dict[Settings, float]:
        """The median score of each, in turns."""
        scores: dict[Settings, list[float]] = {settings: [] for settings in few}
        for _, settings in itertools.product(range(TURNS), few):
            scores[settings].append(self.measure(settings).score(self._delay_ms))
        return {settings: median(found) for settings, found in scores.items()}

    def _makes_sense(self, settings: Settings) -> bool:
        changes = self.changes(settings)
        if changes.get("batching.preferred_batch_sizes") and not changes["batching.max_queue_delay_s"]:
            return False  # nothing waits, so nothing is preferred
        with suppress(ConfigError):
            load_config(self.args(settings))
            return True
        return False


def stateless_load(config: AppConfig, work: Workload) -> Load:
    """Of a Batcher."""

    async def run() -> Load:
        batcher = build_batcher(config)
        make = requests(batcher.spec, work.lengths)
        delays: list[float] = []
        began = time.monotonic() + WARM_UP_S

        async def client() -> None:
            now = time.monotonic()
            while now < began + work.seconds:
                sent = now
                await batcher.infer(next(make))
                now = time.monotonic()
                if now >= began:
                    delays.append(now - sent)

        await asyncio.gather(*(client() for _ in range(work.outstanding)))
        lasted = time.monotonic() - began
        await batcher.stop()
        return Load(len(delays) / lasted, _p99_ms(delays))

    return asyncio.run(run())


def requests(spec: BatchedSpec, lengths: Sequence[int]) -> Iterator[RowsRequest]:
    """Requests of one row each, without end: texts are sentences of docs/, integers 0, other numbers random."""
    rng = np.random.default_rng(0)
    texts = sentences((ROOT / "docs/operations.md").read_text())

    def value(tensor: TensorSpec, length: int) -> np.ndarray:
        shape = (1, *(length if n == ANY else n for n in tensor.shape))
        if tensor.dtype == "object":
            return np.full(shape, rng.choice(texts).encode(), object)
        if tensor.dtype.startswith("float"):
            return rng.standard_normal(shape).astype(tensor.dtype)
        return np.zeros(shape, tensor.dtype)

    while True:
        length = int(rng.choice(lengths))
        yield RowsRequest({name: value(t, length) for name, t in spec.inputs.items() if name not in spec.optional})


@torch.inference_mode()
def recurrent_load(config: AppConfig, work: Workload) -> Load:
    """Of an engine: each session sends a segment when the last has been answered."""
    engine = Engine(registry.load(config.model), config)
    group = Group(engine, work.outstanding, 1)
    rng = np.random.default_rng(0)
    shape, dtype = engine.spec.input.shape, engine.spec.input.dtype
    x = rng.standard_normal((work.outstanding, max(work.lengths), *shape)).astype(dtype)
    sent = np.zeros(work.outstanding)
    delays: list[float] = []
    timesteps, calls = 0, 0  # that wait for an answer

    def send(sessions: np.ndarray, length: int) -> None:
        nonlocal calls
        group.send(sessions, x[sessions, :length])
        calls += 1

    began = time.monotonic() + WARM_UP_S
    while (now := time.monotonic()) < began + work.seconds:
        idle = np.flatnonzero(group.on_their_way == 0)
        lengths = rng.choice(work.lengths, len(idle))
        for length in np.unique(lengths):
            send(idle[lengths == length], length)
        sent[idle] = now
        if calls < MIN_CALLS:
            send(np.arange(work.outstanding), 0)  # what has come is acknowledged
        engine.step(now)
        for _, answer in engine.answers(time.monotonic()):
            calls -= 1
            busy = group.on_their_way > 0
            done = group.take(answer)
            now = time.monotonic()
            if now >= began:
                timesteps += done
                delays += (now - sent[busy & (group.on_their_way == 0)]).tolist()
    return Load(timesteps / work.seconds, _p99_ms(delays))


def _p99_ms(delays_s: Sequence[float]) -> float:
    return float(np.quantile(delays_s, 0.99)) * 1e3 if delays_s else float("inf")


def tune_vs_sweep(tuner: Tuner, chosen: Settings) -> float:
    """The rate of the chosen settings to that of the best of all, measured in turns."""
    everything = set(tuner.all_settings())
    for settings in sorted(everything):
        tuner.score(settings)
    best, score = tuner.finalist(everything)
    click.echo(f"best of all {len(everything)}: {tuner.changes(best)}: {score:,.1f}")
    if best == chosen:
        return 1.0
    scores = tuner.compare([chosen, best])
    return scores[chosen] / scores[best]


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--delay-ms", default=50.0, show_default=True, help="What 99 % of the requests may take.")
@click.option("--outstanding", default=64, show_default=True, help="Requests, or sessions.")
@click.option("--lengths", default="16", show_default=True, help="Of a request's rows or a segment, one at random.")
@click.option("--minutes", default=3.0, show_default=True, help="Of the search; the final turns come after it.")
@click.option("--seconds", default=1.0, show_default=True, help="Of each measurement.")
@click.option("--seed", default=0, show_default=True, help="Of the sampler.")
@click.option("--sweep", is_flag=True, help="Measure all settings too, and compare.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the file for `serve run` here.")
@json_option
def main(
    *,
    file: Path,
    delay_ms: float,
    outstanding: int,
    lengths: str,
    minutes: float,
    seconds: float,
    seed: int,
    sweep: bool,
    out: Path | None,
    json_file: Path | None,
) -> None:
    """Search the settings of FILE, for `serve run`, that give the best rate within the delay."""
    use_replica_env()
    show_hardware()
    torch.set_num_threads(1)
    config = yaml.safe_load(file.read_text())
    (application,) = config["applications"]
    work = Workload(outstanding, [int(length) for length in lengths.split(",")], seconds)
    tuner = Tuner(application["args"], work, delay_ms)
    began = time.monotonic()
    chosen, score = tuner.search(minutes * 60, seed)
    if score < 0:
        raise click.ClickException(
            f"no settings keep within {delay_ms:g} ms; {tuner.changes(chosen)} take {-score:.3g} times as long: raise "
            "--delay-ms, or try fewer --outstanding"
        )
    took_s, num_tried = time.monotonic() - began, len(tuner.measured)
    figures = {"tuned_rate": score, "tune_s": took_s, "tune_tried": float(num_tried)}
    if sweep:
        figures["tune_vs_sweep"] = tune_vs_sweep(tuner, chosen)
    click.echo(table(["setting", "best"], [(name, str(value)) for name, value in tuner.changes(chosen).items()]))
    click.echo(table(["figure", ""], list(figures.items())))
    if out is not None:
        application["args"] = tuner.args(chosen)
        out.write_text(yaml.safe_dump(config, sort_keys=False))
    measured = [{**tuner.changes(settings), "score": score} for settings, score in tuner.measured.items()]
    save(figures, json_file, chosen=tuner.changes(chosen), measured=measured, num_settings=len(tuner.all_settings()))


if __name__ == "__main__":
    main()
