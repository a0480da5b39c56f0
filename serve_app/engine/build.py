"""An engine out of a configuration: model loaded, device chosen, first step behind it."""

import time

import numpy as np
import torch

from serve_app.config import AppConfig
from serve_app.engine.engine import Engine, spare_rows_of
from serve_app.engine.stats import Stats, StepRecord
from serve_app.errors import ConfigError, LockstepError
from serve_app.frame import ABORT, NO_CLOSE, Frame, Open
from serve_app.models import registry


def build_engine(config: AppConfig, owner: str = "local") -> Engine:
    """Load the configured model and make an engine for it, in this process, with engine.threads torch threads.

    Runs one step, so that a model that cannot run fails here, and what torch sets up at first use is set up. With
    autoscaling also full ones, short and long, which are in `stats.recent` then. Raises ConfigError.
    """
    torch.set_num_threads(config.engine.threads)
    model = registry.load(config.model)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = getattr(model, "tf32", False)
    engine = Engine(model, config, owner, spare_rows=spare_rows_of(config.session.max_sessions))
    _check_room(engine, config)
    engine.prepare()
    _run(engine, 0, 1, 1)
    full = _run_full(engine, config) if config.autoscaling is not None else []
    engine.stats = Stats()
    engine.stats.recent.extend(full)
    return engine


def _check_room(engine: Engine, config: AppConfig) -> None:
    """Raise ConfigError unless a timestep of inputs and a segment's outputs fit into the bounds of the engine."""
    limits, spec, segment = config.engine, engine.spec, config.session.max_segment_timesteps
    if limits.max_pending_bytes < spec.input.nbytes:
        raise ConfigError(
            f"engine.max_pending_bytes is {limits.max_pending_bytes}, a timestep of model {spec.name!r} has "
            f"{spec.input.nbytes}: raise it"
        )
    if engine.limits.max_window < segment:
        raise ConfigError(
            f"engine.max_retained_bytes is {limits.max_retained_bytes}, outputs of session.max_segment_timesteps="
            f"{segment} have {segment * spec.output_bytes}: raise the one, or lower the other to "
            f"{engine.limits.max_window}"
        )


def _run_full(engine: Engine, config: AppConfig) -> list[StepRecord]:
    """Full steps, of one timestep and of as many as one may have, each for the second time: the first takes longer."""
    timesteps, batch = engine.step_sizes
    limits, spec = config.engine, engine.spec
    room = min(limits.max_pending_bytes // spec.input.nbytes, limits.max_retained_bytes // max(1, spec.output_bytes))
    most = max(1, min(int(timesteps[-1]), config.session.max_window_timesteps, room // batch))
    runs = [_run(engine, (i + 1) * batch, batch, k) for i, k in enumerate((1, 1, most, most))]
    return runs[1] + runs[3]


def _run(engine: Engine, first_epoch: int, batch: int, k: int) -> list[StepRecord]:
    """Let sessions, so many, have k timesteps run; the steps that it took."""
    spec = engine.spec.input
    epoch, zero = first_epoch + np.arange(batch), np.zeros(batch, np.int64)
    x = np.zeros((batch * k, *spec.shape), spec.dtype)
    now = time.monotonic()
    first = Frame.of(
        engine.owner, "warm-up", epoch=epoch, start=zero, length=zero + k, acked=zero, rewind=zero,
        close=zero + NO_CLOSE, x=x, opens=[Open(i, "warm-up") for i in epoch.tolist()],
    )  # fmt: skip
    last = Frame.of(
        engine.owner, "warm-up", epoch=epoch, start=zero + k, length=zero, acked=zero, rewind=zero,
        close=zero + ABORT, x=x[:0],
    )  # fmt: skip
    engine.receive(first, 0, now)
    while engine.ready:
        engine.step(now)
    engine.receive(last, 1, now)
    for _, answer in engine.answers(now + engine.answer_within_s):
        for notice in answer.notices:
            if notice.error is not None:
                raise LockstepError(f"model {engine.spec.name!r} cannot run: {notice.error['message']}")
    return engine.stats.take_recent()
