"""The sessions of a frame or a step, in its order. Mostly they stay together from the frame to its acknowledgement."""

import numpy as np

Positions = np.ndarray | slice
"""Of some members, as an index; EVERYONE when they are all of them, in that order."""

EVERYONE = slice(None)


class Finder:
    """Finds rows among others, with a table of all rows that is overwritten each time."""

    def __init__(self, max_rows: int) -> None:
        self._position = np.zeros(max_rows, np.int64)

    def find(self, rows: np.ndarray, members: np.ndarray) -> Positions:
        """Where `rows` are in `members` [n], which are distinct and have all of them."""
        if rows is members or (len(rows) == len(members) and (rows == members).all()):
            return EVERYONE
        self._position[members] = np.arange(len(members))
        positions: np.ndarray = self._position[rows]
        return positions
