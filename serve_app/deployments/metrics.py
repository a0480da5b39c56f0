"""What a replica shows in the Ray dashboard and to Prometheus, as `ray_lockstep_…`."""

import random
from collections import Counter as Tally
from collections.abc import Sequence
from typing import TypeVar

from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.engine.batcher import Batcher
from serve_app.engine.engine import Engine
from serve_app.engine.stats import StepRecord
from serve_app.policy.autoscaling import Load

SECONDS = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
SIZES = [float(2**n) for n in range(12)]
MAX_OBSERVED = 10
"""So many steps of those since the last time go into histograms, drawn at random. The node's agent of Ray repeats every
single observation, in Python, and above the priority of replicas: all steps of 10 s took it 50 ms at once."""
T = TypeVar("T")


def drawn(steps: Sequence[T]) -> Sequence[T]:
    """Some of them, for histograms."""
    return steps if len(steps) <= MAX_OBSERVED else random.sample(steps, MAX_OBSERVED)


class EngineMetrics:
    """Publishes an engine's numbers; `publish` is called from time to time."""

    def __init__(self, model: str) -> None:
        self._gauges = {
            name: Gauge(f"lockstep_{name}", description, ("model",))
            for name, description in {
                "sessions_open": "Sessions that are open.",
                "sessions_running": "Sessions with timesteps ready to run.",
                "sessions_evicted": "Sessions whose state is in host memory.",
                "slots_used": "Slots with a session's state in them.",
                "slot_use": "Share of the slots with a session's state in them.",
                "load": "Share of the highest rate, on the average of some seconds.",
                "longest_wait_s": "How long who waits longest for a step has waited, on the average of some seconds.",
                "pending_bytes": "Inputs accepted and not run yet.",
                "retained_bytes": "Outputs not acknowledged yet.",
            }.items()
        }
        self._counters = {
            name: Counter(f"lockstep_{name}", description, ("model",))
            for name, description in {
                "segments": "Segments accepted.",
                "timesteps": "Timesteps run, summed over sessions.",
                "steps": "Batched forwards.",
                "graph_steps": "Batched forwards that were replays of a CUDA graph.",
                "failed_steps": "Batched forwards that raised.",
                "evictions": "States moved to host memory.",
                "restores": "States moved back into a slot.",
                "checkpoints": "States sent to where the sessions come from.",
            }.items()
        }
        # Ray's annotation says one tag; any number is documented.
        self._ends = Counter("lockstep_session_ends", "Sessions ended, by reason.", ("model", "reason"))  # type: ignore[arg-type]
        self._refusals = Counter("lockstep_refusals", "Entries refused, by error.", ("model", "code"))  # type: ignore[arg-type]
        self._batch_size = Histogram("lockstep_batch_size", "Sessions of a step.", SIZES, ("model",))
        self._queue_delay = Histogram(
            "lockstep_queue_delay_s", "Longest wait of a session in a step's batch.", SECONDS, ("model",)
        )
        self._step_time = Histogram("lockstep_step_time_s", "Time of a step.", SECONDS, ("model",))
        for metric in (*self._gauges.values(), *self._counters.values(), self._ends, self._refusals):
            metric.set_default_tags({"model": model})  # a dict for each: Serve writes into it
        for histogram in (self._batch_size, self._queue_delay, self._step_time):
            histogram.set_default_tags({"model": model})
        self._published: Tally[str] = Tally()

    def publish(self, engine: Engine, steps: Sequence[StepRecord], load: Load) -> None:
        """Bring everything up to date. steps: those since the last time."""
        for name, value in {**engine.gauges(), "load": load.share, "longest_wait_s": load.delay_s}.items():
            self._gauges[name].set(value)
        for name, counter in self._counters.items():
            self._raise(counter, name, getattr(engine.stats, name), {})
        for reason, count in list(engine.stats.ends.items()):
            self._raise(self._ends, f"end {reason}", count, {"reason": reason})
        for code, count in list(engine.stats.refusals.items()):
            self._raise(self._refusals, f"refusal {code}", count, {"code": code})
        for step in drawn(steps):
            self._batch_size.observe(step.batch_size)
            self._queue_delay.observe(step.waited_s)
            self._step_time.observe(step.took_s)

    def _raise(self, counter: Counter, name: str, total: int, tags: dict[str, str]) -> None:
        """Ray's counters take increments; the engine counts totals."""
        if total > self._published[name]:
            counter.inc(total - self._published[name], tags)
            self._published[name] = total


class BatcherMetrics:
    """The same for a stateless model."""

    def __init__(self, model: str) -> None:
        self._waiting = Gauge("lockstep_rows_waiting", "Rows that wait for their batch.", ("model",))
        self._counters = {
            name: Counter(f"lockstep_{name}", description, ("model",))
            for name, description in {
                "requests": "Requests taken in.",
                "rows": "Rows run.",
                "batches": "Batches run.",
                "failed_rows": "Rows on which the model failed.",
                "timed_out_rows": "Rows that have waited too long.",
            }.items()
        }
        self._rows = Histogram("lockstep_batch_rows", "Rows of a batch.", SIZES, ("model",))
        self._delay = Histogram("lockstep_rows_delay_s", "Longest wait of a batch's rows.", SECONDS, ("model",))
        self._time = Histogram("lockstep_batch_time_s", "Time of a batch.", SECONDS, ("model",))
        for metric in (self._waiting, *self._counters.values()):
            metric.set_default_tags({"model": model})  # a dict for each: Serve writes into it
        for histogram in (self._rows, self._delay, self._time):
            histogram.set_default_tags({"model": model})
        self._published: Tally[str] = Tally()

    def publish(self, batcher: Batcher) -> None:
        """Bring everything up to date."""
        self._waiting.set(batcher.num_waiting)
        for name, counter in self._counters.items():
            total = getattr(batcher.stats, name)
            if total > self._published[name]:
                counter.inc(total - self._published[name])
                self._published[name] = total
        for batch in drawn(batcher.stats.take_recent()):
            self._rows.observe(batch.size)
            self._delay.observe(batch.waited_s)
            self._time.observe(batch.took_s)
