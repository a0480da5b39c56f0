"""What the values of a column are, where they are mostly few."""

import numpy as np

FEW = 8


def distinct(column: np.ndarray) -> list[int]:
    """Each value of an integer column [n] once."""
    found: list[int] = []
    while len(column) and len(found) < FEW:
        found.append(int(column[0]))
        column = column[column != column[0]]
    return found + np.unique(column).tolist() if len(column) else found
