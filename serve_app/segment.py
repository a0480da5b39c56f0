"""One session's timesteps: a segment in, its outputs out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive timesteps `x` [T, *features] of one session, the first at timestep `start` (None: the next)."""

    session: str
    x: np.ndarray
    start: int | None = None


@dataclass(slots=True)
class Timing:
    """Where the time of outputs went: waiting for steps, in steps, and how many sessions were in the last of these."""

    queue_us: int = 0
    compute_us: int = 0
    batch_size: int = 0

    def add(self, queue_us: int, compute_us: int, batch_size: int) -> None:
        """More outputs have come."""
        self.queue_us += queue_us
        self.compute_us += compute_us
        self.batch_size = batch_size


@dataclass(frozen=True, slots=True)
class Outputs:
    """Outputs of consecutive timesteps: every value is [T, *shape], the first of timestep `start`.

    timing: of those that came here since some were handed out before.
    """

    start: int
    values: Mapping[str, np.ndarray]
    timing: Timing = field(default_factory=Timing)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def end(self) -> int:
        """The timestep after the last."""
        return self.start + len(self)


class Run(NamedTuple):
    """The outputs of timesteps `start` … `end` of one session: rows from `at` on of arrays that others share."""

    start: int
    end: int
    values: Mapping[str, np.ndarray]
    at: int = 0

    def cut(self, start: int) -> "Run":
        """What is left from timestep `start` on."""
        skip = start - self.start
        return self if skip <= 0 else Run(self.start + skip, self.end, self.values, self.at + skip)

    def rows(self, name: str) -> np.ndarray:
        """This run of one output: a view."""
        return self.values[name][self.at : self.at + self.end - self.start]
