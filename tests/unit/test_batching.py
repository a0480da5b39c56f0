"""Which sessions a step takes, how many timesteps, and the sizes that it is padded to."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve_app.policy.batching import choose_batch, pad_batch, powers_of_two


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sets(st.integers(2, 24)).map(lambda others: sorted({1, *others})),
)
def test_a_step_has_the_first_waiting_session_and_the_most_timesteps_with_it(
    left: list[int], max_batch_size: int, timesteps: list[int]
) -> None:
    chosen = np.zeros(max_batch_size, np.int64)
    batch, k = choose_batch(np.array(left), max_batch_size, np.array(timesteps), chosen)
    members = chosen[:batch].tolist()
    assert k in timesteps
    assert members[0] == 0
    assert members == sorted(set(members))
    assert len(members) <= max_batch_size
    assert all(left[i] >= k for i in members)

    def most(k: int) -> int:
        return k * min(max_batch_size, sum(n >= k for n in left))

    assert len(members) * k == max(most(k) for k in timesteps if k <= left[0])


@given(st.integers(1, 100_000))
def test_padding_is_bounded_and_has_few_sizes(batch: int) -> None:
    size = pad_batch(batch)
    assert batch <= size == pad_batch(size)
    assert size - batch < (size / 2 if batch <= 32 else size / 3 if batch <= 256 else size / 5)


def test_there_are_few_padded_sizes() -> None:
    assert sorted({pad_batch(batch) for batch in range(1, 513)}) == [
        1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512,
    ]  # fmt: skip


@given(st.integers(1, 300))
def test_powers_of_two_end_at_the_limit(limit: int) -> None:
    powers = powers_of_two(limit)
    assert (powers[0], powers[-1]) == (1, limit)
    assert all(a < b <= 2 * a for a, b in pairwise(powers))
