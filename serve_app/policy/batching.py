"""Which sessions a step takes, how many timesteps of each, and what size it is padded to."""

from bisect import bisect_right

import numpy as np


def choose_batch(left: np.ndarray, max_batch_size: int, timesteps: np.ndarray) -> tuple[np.ndarray, int]:
    """Choose members of a step among waiting sessions.

    left [n]: timesteps that each has ready, longest waiting first, each at least 1; timesteps: how many a step may take
    of each, rising from 1. Returns the chosen indices, in order, and k: every member gives the same k timesteps, so
    nothing is padded. The longest waiting session is always in, so nobody starves; under that, k is the one that gives
    the step the most timesteps.
    """
    if (left == left[0]).all():
        chosen = np.arange(min(len(left), max_batch_size))
        return chosen, int(timesteps[bisect_right(timesteps, left[0]) - 1])
    capped = np.minimum(left, timesteps[-1])
    ready = np.bincount(capped)[::-1].cumsum()[::-1]  # [k]: how many have at least k timesteps
    ks = timesteps[: timesteps.searchsorted(capped[0], "right")]
    k = int(ks[(ks * np.minimum(ready[ks], max_batch_size)).argmax()])
    return (capped >= k).nonzero()[0][:max_batch_size], k


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4, … and the limit itself."""
    return (*(2**i for i in range((limit - 1).bit_length())), limit)


def pad_batch(batch: int) -> int:
    """The size that a step of `batch` sessions is padded to: 1, 2, 4, 8, 16, 32, then two or four sizes an octave.

    Few sizes mean few graphs; padding is less than half of a step up to 32 sessions, a third up to 256, a fifth above.
    """
    if batch <= 32:
        return 1 << (batch - 1).bit_length()
    octave = 1 << (batch - 1).bit_length() - 1
    part = octave // (2 if batch <= 256 else 4)
    return -(-batch // part) * part
