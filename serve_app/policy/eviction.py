"""Whose state leaves the device when slots run out."""

import numpy as np

from serve_app.compiled import compiled


@compiled
def choose_victims(newer: np.ndarray, row_of: np.ndarray, waiting: np.ndarray, limit: int, victims: np.ndarray) -> None:
    """Fill `victims` with slots: free ones, then those of sessions without work, then others; the longest unused first.

    newer [n + 1]: the slot that was used next after each, of slot n the one that was used before all; row_of [n]: the
    session in each, -1 in none; waiting: timesteps that each session has ready. Only the first `limit` slots in the
    order of use may leave, at least as many as there are victims.
    """
    count = 0
    for busy in (False, True):
        slot = len(row_of)
        for _ in range(limit):
            if count == len(victims):
                return
            slot = newer[slot]
            row = row_of[slot]
            if (row >= 0 and waiting[row] > 0) == busy:
                victims[count] = slot
                count += 1
