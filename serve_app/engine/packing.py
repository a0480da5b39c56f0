"""Rows of several lengths in few of the same length, one behind the other: nothing but their ends is padding."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from serve_app.compiled import compiled


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
    counts = np.array(lengths)
    starts = np.empty_like(counts)
    tokens = np.empty((3, counts.sum()), np.int64)
    bins = _pack(counts, np.argsort(-counts, kind="stable"), room, starts, *tokens)
    return Packing(bins, starts.tolist(), *tokens)


@compiled
def _pack(
    lengths: np.ndarray,
    order: np.ndarray,
    room: int,
    starts: np.ndarray,
    places: np.ndarray,
    row_of: np.ndarray,
    position: np.ndarray,
) -> int:
    """Fill in the fields of Packing; returns how many bins there are. order: of the rows, in which they are placed."""
    bins, free = 0, np.empty_like(lengths)
    for row in order:
        number = 0
        while number < bins and free[number] < lengths[row]:
            number += 1
        if number == bins:
            free[number] = room
            bins += 1
        starts[row] = (number + 1) * room - free[number]
        free[number] -= lengths[row]
    token = 0
    for row in range(len(lengths)):
        for i in range(lengths[row]):
            places[token], row_of[token], position[token] = starts[row] + i, row, i
            token += 1
    return bins
