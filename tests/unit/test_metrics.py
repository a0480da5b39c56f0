"""What a replica publishes, without Ray: its metrics are replaced by ones that are written down."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.deployments import metrics
from serve_app.deployments.metrics import MAX_OBSERVED, BatcherMetrics, EngineMetrics
from serve_app.engine.stats import Stats, StepRecord
from serve_app.policy.autoscaling import IDLE


class Written:
    """A metric of any kind."""

    all: dict[str, list[float]] = {}

    def __init__(self, name: str, *_: Any) -> None:
        self._values = self.all.setdefault(name, [])

    def set_default_tags(self, tags: dict[str, str]) -> None:
        assert tags["model"] == "a model"

    def observe(self, value: float) -> None:
        self._values.append(value)

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._values.append(value)

    set = observe


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    Written.all = {}
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Written)
    return Written.all


def steps(n: int) -> list[StepRecord]:
    return [StepRecord(i, 1.0, i / 1000, i / 10, 0.0) for i in range(n)]


@pytest.mark.parametrize("num_steps", [0, 3, MAX_OBSERVED, 5000])
def test_histograms_have_some_of_the_steps_and_counters_all(written: dict[str, list[float]], num_steps: int) -> None:
    stats = Stats()
    for step in steps(num_steps):
        stats.add_step(step)
    engine: Any = SimpleNamespace(stats=stats, gauges=lambda: {"slots_used": 7})
    EngineMetrics("a model").publish(engine, steps(num_steps), IDLE)
    assert written["lockstep_steps"] == [num_steps] * (num_steps > 0)
    assert written["lockstep_slots_used"] == [7]
    sizes = written["lockstep_batch_size"]
    assert len(sizes) == min(num_steps, MAX_OBSERVED) == len(set(sizes))
    assert written["lockstep_queue_delay_s"] == [size / 1000 for size in sizes], "of the same steps"
    assert written["lockstep_step_time_s"] == [size / 10 for size in sizes]


def test_every_step_is_as_likely_as_another(written: dict[str, list[float]]) -> None:
    engine: Any = SimpleNamespace(stats=Stats(), gauges=dict)
    published = EngineMetrics("a model")
    for _ in range(2000):
        published.publish(engine, steps(4 * MAX_OBSERVED), IDLE)
    counts = Counter(written["lockstep_batch_size"])
    assert len(counts) == 4 * MAX_OBSERVED
    assert all(400 < count < 600 for count in counts.values()), "500 each, more or less"


def test_of_batches_too(written: dict[str, list[float]]) -> None:
    taken = [SimpleNamespace(size=i, waited_s=i / 1000, took_s=i / 10) for i in range(1000)]
    stats = SimpleNamespace(
        take_recent=lambda: taken, requests=1, rows=1, batches=1000, failed_rows=0, timed_out_rows=0
    )
    BatcherMetrics("a model").publish(SimpleNamespace(stats=stats, num_waiting=2))  # type: ignore[arg-type]
    assert written["lockstep_batches"] == [1000]
    assert len(set(written["lockstep_batch_rows"])) == MAX_OBSERVED == len(written["lockstep_batch_time_s"])
