"""Which replica gets a new session."""

from collections.abc import Mapping


def choose_owner(load: Mapping[str, int], capacity: Mapping[str, int]) -> str | None:
    """The owner with the smallest share of its capacity taken, None when all are full. Ties go to the first."""
    free = [owner for owner in load if load[owner] < capacity[owner]]
    return min(free, key=lambda owner: load[owner] / capacity[owner], default=None)
