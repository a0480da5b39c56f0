"""One session's timesteps: a segment in, its outputs out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive timesteps `x` [T, *features] of one session, the first at timestep `start` (None: the next)."""

    session: str
    x: np.ndarray
    start: int | None = None


@dataclass(frozen=True, slots=True)
class Outputs:
    """Outputs of consecutive timesteps: every value is [T, *shape], the first of timestep `start`."""

    start: int
    values: Mapping[str, np.ndarray]

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
        skip = max(0, start - self.start)
        return Run(self.start + skip, self.end, self.values, self.at + skip)

    def rows(self, name: str) -> np.ndarray:
        """This run of one output: a view."""
        return self.values[name][self.at : self.at + self.end - self.start]
