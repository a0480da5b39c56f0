"""Which sessions a step takes, and how many timesteps of each."""

import numpy as np


def choose_batch(left: np.ndarray, max_batch_size: int, max_timesteps: int) -> tuple[np.ndarray, int]:
    """Choose members of a step among waiting sessions.

    left [n]: timesteps that each has ready, longest waiting first, each at least 1. Returns the chosen indices, in
    order, and k: every member gives the same k timesteps, so nothing is padded. The longest waiting session is always
    in, so nobody starves; under that, k is the one that gives the step the most timesteps.
    """
    if left.min() == left.max():
        return np.arange(min(len(left), max_batch_size)), min(int(left[0]), max_timesteps)
    capped = np.minimum(left, max_timesteps)
    ready = np.bincount(capped)[::-1].cumsum()[::-1]  # [k]: how many have at least k timesteps
    ks = np.arange(capped[0] + 1)
    k = int((ks * np.minimum(ready[ks], max_batch_size)).argmax())
    return (capped >= k).nonzero()[0][:max_batch_size], k
