"""Which sessions a step takes, how many timesteps, and the sizes that it is padded to."""

import itertools
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serve_app.policy.batching import choose_batch, pad_batch, powers_of_two
from serve_app.policy.delay import StepTimes


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 20),
    st.sets(st.integers(2, 24)).map(lambda others: sorted({1, *others})),
    st.floats(0, 30) | st.just(np.inf),
)
def test_a_step_has_the_first_waiting_session_and_the_most_timesteps_with_it(
    left: list[int], max_batch_size: int, timesteps: list[int], limit_s: float
) -> None:
    times = StepTimes(timesteps)
    for size, k in itertools.product(range(8), timesteps[:-1]):
        times.add(k, 1 << size, k + size)
    times.seconds[-1] = 0  # the longest step has never been made: it may be tried
    chosen = np.zeros(max_batch_size, np.int64)
    batch, k = choose_batch(np.array(left), max_batch_size, np.array(timesteps), chosen, times.seconds, limit_s)
    members = chosen[:batch].tolist()
    assert k in timesteps
    assert members[0] == 0
    assert members == sorted(set(members))
    assert len(members) <= max_batch_size
    assert all(left[i] >= k for i in members)

    def count(k: int) -> int:
        return min(max_batch_size, sum(n >= k for n in left))

    def short_enough(k: int) -> bool:
        return k in (1, timesteps[-1]) or k + (count(k) - 1).bit_length() <= limit_s

    assert short_enough(k)
    assert len(members) * k == max(k * count(k) for k in timesteps if k <= left[0] and short_enough(k))


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
