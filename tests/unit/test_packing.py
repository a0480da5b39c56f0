"""Rows one behind the other."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.packing import pack


@settings(deadline=None, max_examples=300)
@given(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=64))
def test_each_token_has_a_place_of_its_own_and_few_bins_are_used(lengths: list[int]) -> None:
    packing = pack(lengths, room := 24)
    assert len(set(packing.places.tolist())) == sum(lengths)
    assert 0 <= packing.places.min() <= packing.places.max() < packing.bins * room
    end = 0
    for row, (start, length) in enumerate(zip(packing.starts, lengths, strict=True)):
        tokens = slice(end, end := end + length)
        assert packing.places[tokens].tolist() == list(range(start, start + length))
        assert start // room == (start + length - 1) // room, "a row is in one bin"
        assert set(packing.row[tokens].tolist()) == {row}
        assert packing.position[tokens].tolist() == list(range(length))
    used = np.bincount(packing.places // room, minlength=packing.bins)
    assert sum(used <= room / 2) <= 1, "of two that are half empty one would do"


def test_short_ones_fill_what_long_ones_leave() -> None:
    assert pack([4, 10, 6, 9, 1], 10).bins == 3
    assert pack([10] * 5, 10).bins == 5
