"""States in slots and pages, against a plain list of what should be where."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.state_pool import StatePool
from serve_app.models.interface import State
from serve_app.spec import TensorSpec

SLOTS = 6


class Nested:
    """A model with a state of two tensors, batched in different dimensions."""

    input = TensorSpec((1,))
    outputs = {"y": TensorSpec((1,))}

    def initial_state(self, batch: int) -> State:
        return {"a": torch.zeros(2, batch, 3), "b": (torch.full((batch,), -1, dtype=torch.int64),)}

    def forward(self, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        raise NotImplementedError


def pool() -> StatePool:
    return StatePool(Nested(), SLOTS, torch.device("cpu"))


def filled(values: list[int]) -> State:
    """A state for each of `values`, each number of it that."""
    numbers = torch.tensor(values)
    return {"a": numbers.float()[None, :, None].expand(2, -1, 3), "b": (numbers,)}


def found(state: State) -> list[int]:
    values: list[int] = state["b"][0].tolist()
    assert torch.equal(
        state["a"], torch.tensor([v if v >= 0 else 0 for v in values]).float()[None, :, None].expand(2, -1, 3)
    )
    return values


def test_the_next_step_of_the_same_sessions_takes_the_states_as_they_came() -> None:
    states, slots = pool(), np.array([4, 1])
    given = filled([7, 8])
    states.scatter(slots, given)
    taken = states.gather(slots.copy())
    assert taken["b"][0] is given["b"][0]
    assert taken["a"].is_contiguous()
    assert found(taken) == [7, 8]
    assert found(states.gather(np.array([1, 4, 0]))) == [8, 7, -1]


@settings(deadline=None)
@given(st.data())
def test_states_are_where_they_were_put(data: st.DataObject) -> None:
    states, expected, pages = pool(), [-1] * SLOTS, dict[int, int]()  # by slot, by page
    some = st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=SLOTS, unique=True)
    slots = [0]
    for number in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()):  # else the same as before
            slots = data.draw(some)
        index = np.array(slots)
        match data.draw(st.sampled_from(["step", "step", "gather", "read", "reset", "exchange", "states"])):
            case "step":
                assert found(states.gather(index)) == [expected[slot] for slot in slots]
                states.scatter(index, filled([100 * number + slot for slot in slots]))
                expected = [100 * number + slot if slot in slots else value for slot, value in enumerate(expected)]
            case "gather":
                assert found(states.gather(index)) == [expected[slot] for slot in slots]
            case "read":
                a, b = states.read(index).arrays()
                assert b[:, 0].tolist() == [expected[slot] for slot in slots]
                assert a.shape == (len(slots), 2, 1, 3)
            case "reset":
                states.reset(index)
                expected = [-1 if slot in slots else value for slot, value in enumerate(expected)]
            case "exchange":
                coming = data.draw(st.lists(st.sampled_from([-1, *pages]), min_size=len(slots), max_size=len(slots)))
                coming = [page if page not in coming[:i] else -1 for i, page in enumerate(coming)]
                leaving = len(slots) - data.draw(st.integers(0, len(slots)))
                taken = states.exchange(index, leaving, np.array(coming))
                kept = {page: value for page, value in pages.items() if page not in coming}
                gone = slots[len(slots) - leaving :]
                for slot, page in zip(slots, coming, strict=True):
                    before = expected[slot]
                    if slot in gone:
                        kept[int(taken[gone.index(slot)])] = before
                    if page >= 0:
                        expected[slot] = pages[page]
                pages = kept
            case "states":
                assert found(states.states())[:SLOTS] == expected
    assert states.num_pages_used == len(pages)
