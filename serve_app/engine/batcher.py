"""A stateless model behind `await`: requests in, batches through the queue to the model's threads, outputs out."""

import asyncio
import gc
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from serve_app.config import AppConfig, BatchingConfig
from serve_app.engine.batch_runner import BatchRunner, Outputs, Row, Started
from serve_app.engine.engine import choose_device
from serve_app.engine.runner import limit_threads
from serve_app.errors import ConfigError, InferenceFailed, LockstepError, TimedOut, Unavailable
from serve_app.garbage import collect_seldom
from serve_app.models import registry
from serve_app.policy.batching import pad_batch
from serve_app.policy.request_queue import Level, RequestQueue, Waiting
from serve_app.rows import BatchedSpec, RowsRequest, RowsResult, check_rows
from serve_app.segment import Timing

SWITCH_S = 1e-4
"""A thread waits so long for the interpreter while the event loop has it. Python's own 5 ms are two steps of BERT."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False, slots=True)
class _Request:
    """One that waits for its rows."""

    future: asyncio.Future[RowsResult]
    outputs: list[Outputs]
    left: int
    queued_s: float
    timing: Timing = field(default_factory=Timing)


@dataclass(eq=False, slots=True)
class _Asked:
    """One row of a request."""

    request: _Request
    index: int
    row: Row


class Batch(NamedTuple):
    """What a batch was: its size, the longest wait of its rows for it, and how long it took."""

    size: int
    waited_s: float
    took_s: float


@dataclass(slots=True)
class BatcherStats:
    """Counters since the start, and batches since they were last taken."""

    requests: int = 0
    rows: int = 0
    batches: int = 0
    failed_rows: int = 0
    timed_out_rows: int = 0
    recent: list[Batch] = field(default_factory=list)

    def take_recent(self) -> list[Batch]:
        """The batches since the last call; of very many the last ones."""
        recent, self.recent = self.recent, []
        return recent[-1000:]


class Batcher:
    """Everything but the model runs on the event loop that this is made on; each instance of the model has a thread."""

    def __init__(self, spec: BatchedSpec, runner: BatchRunner, config: BatchingConfig) -> None:
        self.spec = spec
        self.stats = BatcherStats()
        self._loop = asyncio.get_running_loop()
        self._runner = runner
        self._queue = RequestQueue[_Asked](
            config.max_batch_size,
            preferred_sizes=config.preferred_batch_sizes,
            max_delay_s=config.max_queue_delay_s,
            max_padding=config.max_padding,
            levels=[Level(p.max_queue_size, p.timeout_s, p.on_timeout == "delay") for p in config.priorities],
        )
        self._instances = config.instances
        self._max_running = config.instances * runner.depth
        self._worth_it = -(-config.max_batch_size // 4)
        self._running = 0
        self._threads = ThreadPoolExecutor(self._max_running, "lockstep-model", limit_threads)
        self._turning = False  # a turn is due with this round of the event loop
        self._timer: asyncio.TimerHandle | None = None
        self._dead: LockstepError | None = None

    @property
    def num_waiting(self) -> int:
        """Rows that wait for their batch."""
        return len(self._queue)

    async def infer(self, request: RowsRequest) -> RowsResult:
        """Run the rows of a request, each in whatever batch it fits.

        Raises InvalidInput, Overloaded (too many wait), TimedOut, InferenceFailed (by this request), Unavailable.
        """
        if self._dead is not None:
            raise self._dead
        rows = self._runner.rows(request.inputs, check_rows(request, self.spec))
        waiting = _Request(self._loop.create_future(), [{}] * len(rows), len(rows), time.monotonic())
        asked = [_Asked(waiting, i, row) for i, row in enumerate(rows)]
        priority = request.priority or self.spec.default_priority
        lengths = [self._runner.padded_length(row.length) for row in rows]
        self._queue.add(asked, lengths, waiting.queued_s, priority, request.timeout_s)
        self.stats.requests += 1
        self._turn_soon()
        try:
            return await waiting.future
        except BaseException:  # the caller has gone, or a row has failed
            for each in asked:
                self._queue.cancel(each)
            raise

    def check_health(self) -> None:
        """Raise Unavailable when no batch can be run any more."""
        if self._dead is not None:
            raise self._dead

    async def stop(self) -> None:
        """Let the batches that run come to their end; requests that wait fail with Unavailable."""
        self._die(Unavailable("the replica is stopping: send the request again"))
        await asyncio.to_thread(self._threads.shutdown)

    def _turn_soon(self) -> None:
        """All that arrives in this round of the event loop can share a batch."""
        if not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Refuse what has waited too long, give batches to whoever is free, and see when to look again."""
        self._turning = False
        now = time.monotonic()
        for late in self._queue.expire(now):
            self.stats.timed_out_rows += 1
            waited_s = now - late.arrived
            _fail(late.item.request, TimedOut(f"the request has waited for {waited_s:.3f} s: send it again, or later"))
        while self._running < self._max_running:
            # What an instance has on its way beside a batch that runs should be worth it: others may still join.
            batch = self._queue.take(now, 1 if self._running < self._instances else self._worth_it)
            if not batch:
                break
            self._running += 1
            started = self._runner.start([w.item.row for w in batch])
            self._threads.submit(started.wait).add_done_callback(partial(self._has_run, batch, now, started))
        if self._timer is not None:
            self._timer.cancel()
        due = self._queue.due() if self._running < self._instances else self._queue.expires_at()
        self._timer = None if due == math.inf else self._loop.call_later(max(0.0, due - now), self._turn)

    def _has_run(self, batch: Sequence[Waiting[_Asked]], began: float, started: Started, waited: Future[None]) -> None:
        """On the model's thread. A future of asyncio would take one more turn of the loop."""
        self._loop.call_soon_threadsafe(self._complete, batch, began, started, waited)

    def _complete(self, batch: Sequence[Waiting[_Asked]], began: float, started: Started, waited: Future[None]) -> None:
        """A batch has run."""
        self._running -= 1
        took_s = time.monotonic() - began
        self.stats.batches += 1
        self.stats.rows += len(batch)
        self.stats.recent.append(Batch(len(batch), began - min(w.arrived for w in batch), took_s))
        results: Sequence[Outputs | LockstepError]
        try:
            waited.result()
            results = started.results()
        except Exception as error:
            if isinstance(error, LockstepError):
                self._die(error)
            results = [InferenceFailed(f"the model failed: {error!r:.500}")] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            asked = waiting.item
            if isinstance(result, LockstepError):
                self.stats.failed_rows += 1
                _fail(asked.request, self._dead or result)
            else:
                _deliver(asked, result, int((began - waiting.arrived) * 1e6), int(took_s * 1e6), len(batch))
        self._turn_soon()

    def _die(self, error: LockstepError) -> None:
        self._dead = error
        while batch := self._queue.take(math.inf):
            for waiting in batch:
                _fail(waiting.item.request, error)


def _fail(request: _Request, error: LockstepError) -> None:
    if not request.future.done():
        request.future.set_exception(error)


def _deliver(asked: _Asked, outputs: Outputs, queue_us: int, compute_us: int, batch_size: int) -> None:
    """A row has its outputs; the request's time is that of the slowest."""
    request, timing = asked.request, asked.request.timing
    request.outputs[asked.index] = outputs
    request.left -= 1
    timing.queue_us, timing.compute_us = max(timing.queue_us, queue_us), max(timing.compute_us, compute_us)
    timing.batch_size = max(timing.batch_size, batch_size)
    if not request.left and not request.future.done():
        request.future.set_result(RowsResult(_stacked(request.outputs), timing, int(request.queued_s * 1e6)))


def _stacked(rows: Sequence[Outputs]) -> Outputs:
    """Each output as [rows, *shape]; where rows differ in length, filled up with zeros as the inputs were."""
    if len(rows) == 1:
        return {name: value[None] for name, value in rows[0].items()}
    stacked = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
        stacked[name] = np.zeros((len(rows), *shape), first.dtype)
        for i, value in enumerate(values):
            stacked[name][i, ...][tuple(map(slice, value.shape))] = value
    return stacked


def build_batcher(config: AppConfig) -> Batcher:
    """Load the configured model and make it ready for each size that there may be, with engine.threads torch threads.

    Raises ConfigError, and what the model fails with.
    """
    batching = config.batching
    if batching is None:
        raise ConfigError(f"model={config.model.name} has no section batching: a stateless model needs one")
    torch.set_num_threads(config.engine.threads)
    sys.setswitchinterval(SWITCH_S)
    collect_seldom()
    model = registry.load_stateless(config.model)
    device = choose_device(config.engine.device, model)
    pack_rows = batching.max_batch_size if batching.pack else 0
    runner = BatchRunner(model, device, DTYPES[batching.dtype], pack_rows=pack_rows)
    sizes = {1, *batching.preferred_batch_sizes, batching.max_batch_size}
    if device.type == "cuda":
        sizes |= {min(pad_batch(n), batching.max_batch_size) for n in range(1, batching.max_batch_size)}
    try:
        runner.warm_up(sorted(sizes), batching.graph_lengths, batching.instances)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"model={config.model.name} with batching.max_batch_size={batching.max_batch_size} is too large for "
            f"{device}: lower that, or the model's max_length: {error}"
        ) from error
    gc.collect()
    gc.freeze()  # what there is by now stays: looking through it again and again stops all batches for 10 ms and more
    spec = BatchedSpec(
        config.model.served_name,
        dict(model.inputs),
        dict(model.outputs),
        tuple(getattr(model, "optional", ())),
        getattr(model, "max_length", 0),
        batching.max_batch_size,
        batching.preferred_batch_sizes,
        batching.max_queue_delay_s,
        len(batching.priorities),
        batching.default_priority,
    )
    return Batcher(spec, runner, batching)
