"""Whose state leaves the device when slots run out."""

import numpy as np


def choose_victims(used_at: np.ndarray, waiting: np.ndarray, count: int) -> np.ndarray:
    """The `count` of n sessions to evict: those without work before those with, the longest unused of them.

    used_at [n]: when each was last in a step; waiting [n]: whether it has timesteps ready. Returns indices, unordered.
    """
    of_idle = np.where(waiting, np.inf, used_at)
    victims = _lowest(of_idle, count)
    if (of_idle[victims] < np.inf).all():
        return victims
    idle, busy = np.flatnonzero(~waiting), np.flatnonzero(waiting)
    return np.concatenate([idle, busy[_lowest(used_at[busy], count - len(idle))]])


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` lowest."""
    return np.argpartition(values, count - 1)[:count] if 0 < count < len(values) else np.arange(count)
