"""Which replica gets a new session, and which are to give some to others."""

from collections import Counter
from collections.abc import Mapping

LEVEL = 0.1
"""Owners are as good as even while none has so much more or less than all have on the average."""


def choose_owner(load: Mapping[str, int], capacity: Mapping[str, int]) -> str | None:
    """The owner with the smallest share of its capacity taken, None when all are full. Ties go to the first."""
    free = [owner for owner in load if load[owner] < capacity[owner]]
    return min(free, key=lambda owner: load[owner] / capacity[owner], default=None)


def moves_of(
    load: Mapping[str, int], capacity: Mapping[str, int], leaving: Mapping[str, int], limit: int
) -> Counter[str]:
    """How many sessions each owner is to give away, `limit` in all at most, so that all have the same share taken.

    load: sessions of each, of which `leaving` are on their way to where `choose_owner` says. One moves only if the
    owner that gets it has no larger share then than the one that gave it has left: so none ever moves back.
    """
    after = dict(load)
    moves: Counter[str] = Counter()

    def share(owner: str) -> float:
        return after[owner] / capacity[owner]

    def move(giver: str) -> bool:
        taker = choose_owner({owner: count for owner, count in after.items() if owner != giver}, capacity)
        if taker is None:
            return False
        after[giver] -= 1
        after[taker] += 1
        return True

    for owner in load:
        for _ in range(min(leaving[owner], load[owner])):
            move(owner)
    mean = sum(load.values()) / max(1, sum(capacity.values()))
    while after and moves.total() < limit:
        giver, taker = max(after, key=share), min(after, key=share)
        is_level = share(giver) <= (1 + LEVEL) * mean + 1e-9 and share(taker) >= (1 - LEVEL) * mean - 1e-9
        if is_level or (after[taker] + 1) / capacity[taker] > (after[giver] - 1) / capacity[giver] or not move(giver):
            break
        moves[giver] += 1
    return moves
