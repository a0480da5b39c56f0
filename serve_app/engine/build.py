"""An engine out of a configuration: model loaded, device chosen, first step behind it."""

import time

import numpy as np
import torch

from serve_app.config import AppConfig
from serve_app.engine.engine import Engine, spare_rows_of
from serve_app.engine.stats import Stats
from serve_app.errors import LockstepError
from serve_app.frame import ABORT, NO_CLOSE, Frame, Open
from serve_app.models import registry


def build_engine(config: AppConfig, owner: str = "local") -> Engine:
    """Load the configured model and make an engine for it, in this process, with engine.threads torch threads.

    Runs one step, so that a model that cannot run fails here, and what torch sets up at first use is set up. Raises
    ConfigError.
    """
    torch.set_num_threads(config.engine.threads)
    model = registry.load(config.model)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = getattr(model, "tf32", False)
    engine = Engine(model, config, owner, spare_rows=spare_rows_of(config.session.max_sessions))
    engine.prepare()
    _run_once(engine)
    return engine


def _run_once(engine: Engine) -> None:
    spec = engine.spec.input
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    x = np.zeros((1, *spec.shape), spec.dtype)
    now = time.monotonic()
    first = Frame.of(
        engine.owner, "warm-up", epoch=zero, start=zero, length=one, acked=zero, rewind=zero, close=zero + NO_CLOSE,
        x=x, opens=(Open(0, "warm-up"),),
    )  # fmt: skip
    last = Frame.of(
        engine.owner, "warm-up", epoch=zero, start=one, length=zero, acked=zero, rewind=zero, close=zero + ABORT,
        x=x[:0],
    )  # fmt: skip
    engine.receive(first, 0, now)
    while engine.ready:
        engine.step(now)
    engine.receive(last, 1, now)
    for _, answer in engine.answers(now + engine.answer_within_s):
        for notice in answer.notices:
            if notice.error is not None:
                raise LockstepError(f"model {engine.spec.name!r} cannot run: {notice.error['message']}")
    engine.stats = Stats()
