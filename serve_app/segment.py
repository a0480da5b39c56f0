"""What travels through a plain handle call: one segment in, its outputs out."""

from collections.abc import Mapping
from dataclasses import dataclass

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

    def cut(self, start: int) -> "Outputs":
        """What is left from timestep `start` on."""
        skip = start - self.start
        if skip <= 0:
            return self
        return Outputs(start, {name: value[skip:] for name, value in self.values.items()})
