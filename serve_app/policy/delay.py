"""How long a step may take so that what arrives meets a delay target, and how long steps do take."""

import math
from collections.abc import Sequence

import numpy as np

PATIENCE_S = 5.0
"""While every session has had more ready than a step takes for so long, nobody gains by short steps: none are made."""
SIZES = 32
"""Batch sizes are told apart by powers of two."""
SLOWER, FASTER = 0.5, 0.05
"""Weights of a step that took longer, or less long, than was known of its size: a target is for nearly all of them."""


def step_limit_s(target_s: float, in_flight: int, waiting: int, max_batch_size: int) -> float:
    """Seconds that a step launched now may take, with `waiting` sessions to choose from; 0 is a target of none.

    Who comes right after the launch waits for the steps on their way, for this one, and has a turn with the rest of
    those who wait: all that within the target.
    """
    if target_s <= 0:
        return math.inf
    return target_s / (in_flight + 1 + max(1, -(-waiting // max_batch_size)))


class StepTimes:
    """Seconds of steps, by how many timesteps and sessions they were of; 0 where there was none.

    `seconds` [timesteps, SIZES]: by place in `timesteps`, and by the bits of one less than the batch size.
    """

    def __init__(self, timesteps: Sequence[int] | np.ndarray) -> None:
        self._timesteps = np.array(timesteps, np.int64)
        self.seconds = np.zeros((len(timesteps), SIZES))

    def add(self, k: int, batch: int, seconds: float) -> None:
        """A step of k timesteps of `batch` sessions has taken so long.

        Longer ones of as many sessions take at most in proportion, so a slow one, which might not be made again for
        that, does not stay slow by one bad measurement.
        """
        which, size = int(np.searchsorted(self._timesteps, k)), (batch - 1).bit_length()
        before = self.seconds[which, size]
        weight = 1 if not before else SLOWER if seconds > before else FASTER
        now = self.seconds[which, size] = before + weight * (seconds - before)
        longer = self.seconds[which + 1 :, size]
        np.minimum(longer, now / k * self._timesteps[which + 1 :], out=longer)
