"""What the values of a column are, where they are mostly one."""

import numpy as np


def distinct(column: np.ndarray) -> list[int]:
    """Each value of an integer column [n] once, rising."""
    if len(column) and (column == column[0]).all():
        return [int(column[0])]
    return np.unique(column).tolist()  # type: ignore[no-any-return]
