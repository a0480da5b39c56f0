"""Whose state leaves the device."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve_app.policy.eviction import choose_victims

Session = tuple[bool, int]
"""Whether it waits, and when it was used."""


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=1, max_size=60), st.data())
def test_victims_are_those_that_can_wait_best(sessions: list[Session], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sessions)))
    waiting, used_at = (np.array(column) for column in zip(*sessions, strict=True))
    victims = choose_victims(used_at.astype(float), waiting, count).tolist()
    assert len(set(victims)) == count
    assert sorted(sessions[i] for i in victims) == sorted(sessions)[:count]
