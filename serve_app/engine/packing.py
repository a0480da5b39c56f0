"""Rows of several lengths in few of the same length, one behind the other: nothing but their ends is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Packing(NamedTuple):
    """Where the tokens of rows are among those of `bins` bins, which lie one behind the other.

    starts: the first token of each row; places [tokens]: of all of them, row by row; row, position [tokens]: of which
    row each is, and where in it.
    """

    bins: int
    starts: list[int]
    places: np.ndarray
    row: np.ndarray
    position: np.ndarray


def pack(lengths: Sequence[int], room: int) -> Packing:
    """Rows of these lengths, each 1 to `room`, in bins of `room`: the longest first, each where it fits first.

    That takes at most 11/9 of the least number of bins there can be, and one (Johnson, 1973).
    """
    free: list[int] = []
    starts = [0] * len(lengths)
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        number = next((number for number, left in enumerate(free) if left >= lengths[row]), len(free))
        if number == len(free):
            free.append(room)
        starts[row] = (number + 1) * room - free[number]
        free[number] -= lengths[row]
    counts = np.array(lengths)
    row_of = np.repeat(np.arange(len(lengths)), counts)
    position = np.arange(len(row_of)) - (np.cumsum(counts) - counts)[row_of]
    return Packing(len(free), starts, np.array(starts)[row_of] + position, row_of, position)
