"""What an engine has done, in numbers: counters that only rise, and a window of recent steps."""

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_STEPS_KEPT = 4096
MAX_ENDED_KEPT = 65536


class StepRecord(NamedTuple):
    """One step: its sessions, timesteps of each (their mean), the longest wait among them, and how long it took.

    alone_s: of that, after the step before it was over.
    """

    batch_size: int
    timesteps: float
    waited_s: float
    took_s: float
    alone_s: float


@dataclass(slots=True)
class Stats:
    """Counters since the start. `recent` is for whoever reports.

    `session_steps` is the sum of all batch sizes; `graph_steps` counts the steps that were replays of a CUDA graph.
    """

    segments: int = 0
    timesteps: int = 0
    steps: int = 0
    graph_steps: int = 0
    session_steps: int = 0
    failed_steps: int = 0
    evictions: int = 0
    restores: int = 0
    checkpoints: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    taken: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=MAX_ENDED_KEPT))
    ended_epochs: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_ENDED_KEPT))
    recent: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=MAX_STEPS_KEPT))

    def add_step(self, record: StepRecord) -> None:
        """Count one step that went well."""
        self.steps += 1
        self.session_steps += record.batch_size
        self.timesteps += round(record.batch_size * record.timesteps)
        self.recent.append(record)

    def take_recent(self) -> list[StepRecord]:
        """The steps since the last call."""
        return [self.recent.popleft() for _ in range(len(self.recent))]

    def take_taken(self) -> list[tuple[int, str]]:
        """The sessions that were taken in since the last call: epochs, and names."""
        return [self.taken.popleft() for _ in range(len(self.taken))]

    def take_ended(self) -> list[int]:
        """The epochs of sessions that ended since the last call."""
        return [self.ended_epochs.popleft() for _ in range(len(self.ended_epochs))]
