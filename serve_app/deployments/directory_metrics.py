"""What the directory shows in the Ray dashboard and to Prometheus, as `ray_lockstep_…`; without torch."""

from collections import Counter as Tally
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from serve_app.directory import SessionStatistics


class DirectoryMetrics:
    """Of the sessions of all replicas of a model together; `publish` is called from time to time."""

    def __init__(self) -> None:
        self._waiting = Gauge("lockstep_sessions_waiting", "Sessions that wait for a place.", ("model",))
        self._opened = Counter("lockstep_sessions_opened", "Sessions that were given a place.", ("model",))
        self._moved = Counter("lockstep_sessions_moved", "Sessions that went from a replica to another.", ("model",))
        self._refused = Counter("lockstep_sessions_refused", "Sessions without a place, by error.", ("model", "code"))
        self._published: Tally[tuple[str, str]] = Tally()

    def publish(self, statistics: Mapping[str, SessionStatistics], moved: Mapping[str, int]) -> None:
        """Bring everything up to date."""
        for model, found in statistics.items():
            self._waiting.set(found.waiting, {"model": model})
            self._raise(self._opened, (model, ""), found.opened, {"model": model})
            for code, count in found.refused.items():
                self._raise(self._refused, (model, code), count, {"model": model, "code": code})
        for model, count in moved.items():
            self._raise(self._moved, (model, " moved"), count, {"model": model})

    def _raise(self, counter: Counter, name: tuple[str, str], total: int, tags: dict[str, str]) -> None:
        if total > self._published[name]:
            counter.inc(total - self._published[name], tags)
            self._published[name] = total
