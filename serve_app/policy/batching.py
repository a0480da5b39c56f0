"""Which sessions a step takes, how many timesteps of each, how it is cut, and what size it is padded to."""

import itertools
from collections.abc import Iterator

import numpy as np

from serve_app.compiled import compiled


@compiled
def choose_batch(
    left: np.ndarray,
    max_batch_size: int,
    timesteps: np.ndarray,
    chosen: np.ndarray,
    seconds: np.ndarray,
    limit_s: float,
) -> tuple[int, int]:
    """Choose members of a step among waiting sessions: B of them, their indices in order in `chosen` [:B].

    left [n]: timesteps that each has ready, longest waiting first, each at least 1; timesteps: how many a step may take
    of each, rising from 1. Returns B and k: every member gives the same k timesteps, so nothing is padded. The longest
    waiting session is always in, so nobody starves; under that, k is the one that gives the step the most timesteps,
    of those with which it takes at most `limit_s` as `seconds` has it (delay.StepTimes), or else the smallest.
    """
    last, of_first = len(timesteps) - 1, 0
    enough = np.zeros(len(timesteps), np.int64)  # how many have as many as each of `timesteps`, first: and no more
    for i in range(len(left)):
        which = last if left[i] >= timesteps[last] else np.searchsorted(timesteps, left[i], "right") - 1
        enough[which] += 1
        if i == 0:
            of_first = which
    for i in range(last, 0, -1):
        enough[i - 1] += enough[i]
    most, k, batch = 0, 0, 0
    for i in range(of_first + 1):
        count, size = min(enough[i], max_batch_size), 0
        while 1 << size < count:
            size += 1
        if timesteps[i] * count > most and (i == 0 or seconds[i, size] <= limit_s):
            most, k = timesteps[i] * count, timesteps[i]
    for i in range(len(left)):
        if left[i] >= k and batch < max_batch_size:
            chosen[batch] = i
            batch += 1
    return batch, k


def even_parts(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Cut counts[i] timesteps of each of B sessions, at least 1, into few parts: the same number of many sessions.

    Where they are of few lengths, each part goes to the end of the next shortest. Else the first has as many as all
    have; what is left of each is a sum of powers of two, and a part has a power of all those of which it is one.
    Yields indices of sessions, the timestep where each begins, and how many each has in the part.
    """
    lengths = np.unique(counts).tolist()
    num_bits = (lengths[-1] - lengths[0]).bit_length()
    if len(lengths) <= 1 + num_bits:
        for at, end in itertools.pairwise((0, *lengths)):
            members = np.flatnonzero(counts >= end)
            yield members, np.full(len(members), at), end - at
        return
    yield np.arange(len(counts)), np.zeros(len(counts), np.int64), lengths[0]
    left = counts - lengths[0]
    for bit in reversed(range(num_bits)):
        members = np.flatnonzero(left >> bit & 1)
        if len(members):
            yield members, lengths[0] + (left[members] >> bit + 1 << bit + 1), 1 << bit


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
