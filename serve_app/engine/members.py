"""The sessions of a frame or a step, in its order. Mostly they stay together from the frame to its acknowledgement."""

import numpy as np

Positions = np.ndarray | slice
"""Of some members, as an index; EVERYONE when they are all of them, in that order."""

EVERYONE = slice(None)


class Members:
    """Distinct rows [n] in an order."""

    __slots__ = ("_order", "rows")

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self._order: np.ndarray | None = None

    def find(self, rows: np.ndarray) -> Positions:
        """Where `rows` are, all of them members."""
        if rows is self.rows or (len(rows) == len(self.rows) and (rows == self.rows).all()):
            return EVERYONE
        if self._order is None:
            self._order = self.rows.argsort()
        positions: np.ndarray = self._order[self.rows.searchsorted(rows, sorter=self._order)]
        return positions
