"""An LSTM on plain Ray Serve, as one would write it in an afternoon: @serve.batch, and the states in an actor.

    python -m bench.naive sweep --json bench/results/naive_sweep_cpu.json

looks for the settings that serve it best; `bench.compare` takes them from that file.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args
from uuid import uuid4

import click
import numpy as np
import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from bench import report
from bench.closed_loop import HIDDEN, LAYERS, Call, Inputs, Load, check_outputs, plain_module, run_load

RESULTS = report.ROOT / "bench" / "results" / "naive_sweep_cpu.json"
NUM_SESSIONS = 256
CHECKED = 0, 100, NUM_SESSIONS - 1
WAITS_S = 0.005, 0.02, 0.05, 0.1
Handle = Literal["plain", "grpc", "pickle", "same_loop"]
HANDLES: tuple[Handle, ...] = get_args(Handle)
STATE_SHAPE = 2, LAYERS, HIDDEN  # h and c


@dataclass(frozen=True, slots=True)
class NaiveConfig:
    """What can be tuned.

    `states`: `dict`, the actor gives and takes a pair of arrays for each session; `stacked`, one array for the batch;
    `stacked_ahead`, and its put is not waited for (the actor takes one replica's calls in order); `replica`, no actor:
    the replica keeps them, and they are lost with it.
    `handle`: `plain`; or with options that Ray has for itself: `grpc` sends calls past Ray's object store, `pickle`
    also has pickle in place of cloudpickle, `same_loop` also routes on the caller's own event loop.
    `throughput_optimized`: the replica runs with what RAY_SERVE_THROUGHPUT_OPTIMIZED=1 sets in one.
    """

    max_batch_size: int = 256
    batch_wait_timeout_s: float = 0.05
    max_concurrent_batches: int = 1
    max_ongoing_requests: int = 1024
    states: Literal["dict", "stacked", "stacked_ahead", "replica"] = "stacked"
    handle: Handle = "plain"
    throughput_optimized: bool = False


class States:
    """The states of all sessions; runs as an actor."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}

    def get(self, sessions: Sequence[str]) -> list[Any]:
        """The state of each, None of those that are new."""
        return [self._states.get(session) for session in sessions]

    def put(self, sessions: Sequence[str], states: Iterable[Any]) -> None:
        """Keep the state of each."""
        self._states.update(zip(sessions, states, strict=True))

    def get_stacked(self, sessions: Sequence[str]) -> np.ndarray:
        """The states [n, *STATE_SHAPE], zeros of those that are new."""
        zero = np.zeros(STATE_SHAPE, np.float32)
        return np.stack([self._states.get(session, zero) for session in sessions])

    def drop(self, session: str) -> None:
        """Forget a session."""
        self._states.pop(session, None)


class Naive:
    """Runs the segments that arrive at about the same time as one batch; all have the same length."""

    def __init__(self, config: NaiveConfig) -> None:
        torch.set_num_threads(1)
        self._module = plain_module()
        self._config = config
        self._here = States()
        self._states: Any = None
        if config.states != "replica":
            self._states = ray.remote(States).options(num_cpus=0).remote()
        batched = serve.batch(
            max_batch_size=config.max_batch_size,
            batch_wait_timeout_s=config.batch_wait_timeout_s,
            max_concurrent_batches=config.max_concurrent_batches,
        )
        self._step: Any = batched(self._run)

    async def ready(self) -> None:
        """Returns when the actor of the states runs."""
        if self._states is not None:
            await self._states.get.remote([])

    async def __call__(self, session: str, x: np.ndarray) -> np.ndarray:
        """The next segment x [T, INPUT] of a session; a new one starts from zeros."""
        y: np.ndarray = await self._step(session, x)
        return y

    async def close(self, session: str) -> None:
        """The session is over."""
        self._here.drop(session)
        if self._states is not None:
            await self._states.drop.remote(session)

    async def _run(self, sessions: list[str], xs: list[np.ndarray]) -> list[np.ndarray]:
        h, c = await self._get(sessions)  # each [LAYERS, B, HIDDEN]
        with torch.inference_mode():
            y, (h, c) = self._module(torch.from_numpy(np.stack(xs, axis=1)), (h, c))
        await self._put(sessions, h, c)
        return list(y.numpy().swapaxes(0, 1))

    async def _get(self, sessions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._config.states == "dict":
            zero = np.zeros(STATE_SHAPE[1:], np.float32)
            states = [state or (zero, zero) for state in await self._states.get.remote(sessions)]
            h, c = (torch.from_numpy(np.stack(tensors, axis=1)) for tensors in zip(*states, strict=True))
            return h, c
        if self._config.states == "replica":
            stacked = self._here.get_stacked(sessions)
        else:
            stacked = await self._states.get_stacked.remote(sessions)
        h, c = torch.from_numpy(np.ascontiguousarray(stacked.transpose(1, 2, 0, 3)))
        return h, c

    async def _put(self, sessions: list[str], h: torch.Tensor, c: torch.Tensor) -> None:
        if self._config.states == "dict":
            pairs = zip(h.numpy().swapaxes(0, 1), c.numpy().swapaxes(0, 1), strict=True)
            await self._states.put.remote(sessions, list(pairs))
            return
        stacked = np.ascontiguousarray(torch.stack([h, c]).numpy().transpose(2, 0, 1, 3))
        if self._config.states == "replica":
            self._here.put(sessions, stacked)
        elif self._config.states == "stacked":
            await self._states.put.remote(sessions, stacked)
        else:
            self._states.put.remote(sessions, stacked)


def deployment(config: NaiveConfig) -> Application:
    """The application, or a part of one that calls it."""
    env = {}
    if config.throughput_optimized:
        env = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000"}
        env |= {"RAY_SERVE_LOG_TO_STDERR": "0", "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1"}
    naive = serve.deployment(
        name="Naive",
        max_ongoing_requests=config.max_ongoing_requests,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=LoggingConfig(enable_access_log=False),
        ray_actor_options={"runtime_env": {"env_vars": env}},
    )(Naive)
    application: Application = naive.bind(config)
    return application


@contextmanager
def local_serve() -> Iterator[None]:
    """A Ray of our own with Serve on it, and no port for anybody else's HTTP."""
    with TemporaryDirectory(prefix="bench-") as temp_dir:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=temp_dir,
        )
        try:
            serve.start(http_options={"location": "NoServer"}, logging_config=LoggingConfig(log_level="WARNING"))
            logging.getLogger("ray.serve").setLevel(logging.CRITICAL)  # the end of a router's loop is an error to it
            yield
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


async def load_naive(app: str, config: NaiveConfig, inputs: Inputs, seconds: float, warm_up_s: float) -> Load:
    """Load the application with NUM_SESSIONS new sessions; what a few of them get is checked."""
    calls, prefix = caller(app, config), uuid4().hex
    names = [f"{prefix}-{i}" for i in range(NUM_SESSIONS)]

    def call_of(session: str) -> Call:
        def call(x: np.ndarray) -> Awaitable[np.ndarray]:
            response: Awaitable[np.ndarray] = calls.remote(session, x)
            return response

        return call

    load, kept = await run_load([call_of(name) for name in names], inputs, seconds, warm_up_s, keep=CHECKED)
    check_outputs(kept, inputs)
    await asyncio.gather(*(calls.close.remote(name) for name in names))
    return load


def caller(app: str, config: NaiveConfig) -> Any:
    """A handle with the options that the configuration says."""
    handle: Any = DeploymentHandle("Naive", app)  # of our own: the one that Serve gives out is initialized before
    if config.handle == "same_loop":
        handle._init(_run_router_in_separate_loop=False)
    if config.handle != "plain":
        handle = handle.options(_by_reference=False)
    if config.handle in ("pickle", "same_loop"):
        handle = handle.options(request_serialization="pickle", response_serialization="pickle")
    return handle


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of the sweep."""

    config: NaiveConfig
    load: Load


@dataclass(frozen=True, slots=True)
class Stage:
    """Changes to try, each on the best there is by then; with `plain` on the best with a plain handle."""

    plain: bool
    changes: Sequence[Mapping[str, Any]]


STAGES = (
    Stage(True, [{"max_batch_size": n, "batch_wait_timeout_s": s} for n in (64, 128, 256) for s in WAITS_S]),
    Stage(True, [{"max_concurrent_batches": n} for n in (2, 4)]),
    Stage(True, [{"max_ongoing_requests": n} for n in (256, 512)]),
    Stage(True, [{"states": states} for states in ("dict", "stacked_ahead")]),
    Stage(True, [{"handle": handle} for handle in HANDLES[1:]]),
    Stage(False, [{"max_batch_size": n, "batch_wait_timeout_s": s} for n in (64, 256) for s in WAITS_S[1:]]),
    Stage(False, [{"throughput_optimized": True}]),
    Stage(False, [{"states": "replica"}]),
)
NUM_FINALS = 3


def best_configs(points: Sequence[Point], *, plain: bool) -> list[NaiveConfig]:
    """Settings that were measured, by rate, the best first: with `plain` those with a plain handle only.

    The states have to be in an actor. Of what was measured more than once the best counts: others on the machine make a
    rate only lower.
    """
    rates: dict[NaiveConfig, float] = {}
    for point in points:
        if point.config.states != "replica" and (point.config.handle == "plain" or not plain):
            rates[point.config] = max(rates.get(point.config, 0.0), point.load.rate)
    return sorted(rates, key=lambda config: -rates[config])


def finalists(points: Sequence[Point]) -> list[NaiveConfig]:
    """What to measure again, in turns: the best with a plain handle, and the best of all with every handle."""
    best, best_plain = (best_configs(points, plain=plain)[0] for plain in (False, True))
    return list({best_plain: None} | {replace(best, handle=handle): None for handle in HANDLES})


def tuned(*, plain: bool) -> NaiveConfig:
    """The best settings that the last sweep found, with `plain` those with a plain handle."""
    return NaiveConfig(**json.loads(RESULTS.read_text())["best_plain" if plain else "best"])


@click.group()
def main() -> None:
    """The naive application."""


@main.command()
@click.option("--seconds", default=3.0, show_default=True, help="Of each measurement.")
@report.json_option
def sweep(seconds: float, json_file: Path | None) -> None:
    """Look for the settings that serve segments of one timestep best."""
    report.use_replica_env()
    points: list[Point] = []

    def measure(config: NaiveConfig) -> None:
        serve.run(deployment(config), name="naive", route_prefix=None)
        load = asyncio.run(load_naive("naive", config, Inputs(1), seconds, warm_up_s=1.0))
        points.append(Point(config, load))
        click.echo(f"{load.rate:6.0f} segments/s  {config}", err=True)

    with local_serve():
        for stage in STAGES:
            best = next(iter(best_configs(points, plain=stage.plain)), NaiveConfig())
            for change in stage.changes:
                config = replace(best, **change)
                if all(point.config != config for point in points):
                    measure(config)
        for config in finalists(points) * NUM_FINALS:
            measure(config)
    _show(points)
    if json_file is not None:
        _save(points, json_file)


def _show(points: Sequence[Point]) -> None:
    names = list(asdict(NaiveConfig()))
    rows = [(*map(str, asdict(p.config).values()), p.load.rate, p.load.p50_s * 1e3, p.load.p99_s * 1e3) for p in points]
    click.echo(report.table([*names, "segments/s", "p50 ms", "p99 ms"], rows))
    click.echo(f"\nbest: {best_configs(points, plain=False)[0]}")
    click.echo(f"best with a plain handle: {best_configs(points, plain=True)[0]}\n")
    report.show_hardware()


def _save(points: Sequence[Point], json_file: Path) -> None:
    best, best_plain = (best_configs(points, plain=plain)[0] for plain in (False, True))
    content = {
        "hardware": report.hardware(),
        "commit": report.commit(),
        "figures": {
            "naive_segments_per_s": max(p.load.rate for p in points if p.config == best),
            "naive_plain_segments_per_s": max(p.load.rate for p in points if p.config == best_plain),
        },
        "best": asdict(best),
        "best_plain": asdict(best_plain),
        "points": [asdict(point.config) | asdict(point.load) for point in points],
    }
    json_file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
