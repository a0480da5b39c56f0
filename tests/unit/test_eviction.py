"""Whose state leaves the device."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve_app.policy.eviction import choose_victims

Session = tuple[bool, int]
"""Whether it waits, and when it was used."""


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=60), st.data())
def test_victims_are_those_that_can_wait_best(sessions: list[Session], data: st.DataObject) -> None:
    """Slots lie at random; some are free, and the newest may be out of the question."""
    num_free, slots = data.draw(st.integers(0, 3)), data.draw(st.randoms()).sample(range(len(sessions)), len(sessions))
    order = sorted(range(len(sessions)), key=lambda i: sessions[i][1])  # the longest unused first
    limit = data.draw(st.integers(1, len(sessions)))
    count = data.draw(st.integers(1, limit))
    newer, row_of = np.zeros(len(sessions) + 1, np.int64), np.full(len(sessions), -1)
    ring = [len(sessions), *(slots[i] for i in order), len(sessions)]
    for before, after in itertools.pairwise(ring):
        newer[before] = after
    for i in order[num_free:]:
        row_of[slots[i]] = i
    waiting = np.array([int(waits) for waits, _ in sessions])
    victims = np.full(count, -1)
    choose_victims(newer, row_of, waiting, limit, victims)

    def rank(place: int) -> tuple[bool, int]:
        return place >= num_free and sessions[order[place]][0], place

    assert victims.tolist() == [slots[order[place]] for place in sorted(range(limit), key=rank)[:count]]
