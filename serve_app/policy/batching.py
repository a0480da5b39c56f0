"""Which sessions a step takes, and how many timesteps of each."""

import numpy as np


def choose_batch(left: np.ndarray, max_batch_size: int, max_timesteps: int) -> tuple[np.ndarray, int]:
    """Choose members of a step among waiting sessions.

    left [n]: timesteps that each has ready, longest waiting first, each at least 1. Returns the chosen indices, in
    order, and k: every member gives the same k timesteps, so nothing is padded. The longest waiting session is always
    in, so nobody starves; under that, k is the one that gives the step the most timesteps.
    """
    capped = np.minimum(left, max_timesteps)
    options = np.unique(capped[capped <= capped[0]])  # ascending, the last is capped[0]
    longer = len(capped) - np.searchsorted(np.sort(capped), options)  # how many have at least that much ready
    k = int(options[np.argmax(options * np.minimum(longer, max_batch_size))])
    return np.flatnonzero(capped >= k)[:max_batch_size], k
