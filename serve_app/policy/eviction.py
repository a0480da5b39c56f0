"""Whose state leaves the device when slots run out."""

import numpy as np


def choose_victims(used_at: np.ndarray, waiting: np.ndarray, count: int) -> np.ndarray:
    """The `count` of n sessions to evict: those without work before those with, longest unused first.

    used_at [n]: when each was last in a step; waiting [n]: whether it has timesteps ready. Returns indices.
    """
    return np.lexsort((used_at, waiting))[:count]
