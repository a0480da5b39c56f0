"""What a session keeps of its outputs until they are acknowledged, or read."""

import weakref
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.ingress.hub import NOWHERE
from serve_app.segment import Run
from serve_app.session import MAX_SHARED_RUNS, Session
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec

SPEC = ModelSpec("count", TensorSpec((1,)), {"y": TensorSpec((2,)), "step": TensorSpec((), "int64")})
STEPS = np.arange(400)
LINE: dict[str, np.ndarray] = {"y": np.stack([STEPS, -STEPS], 1).astype(np.float32), "step": STEPS}
OTHERS = 700
"""Rows of other sessions in the same answer."""


def lone(*, ack_on_receipt: bool = False) -> Session:
    return Session("a", SPEC, SessionLimits(64, 256), NOWHERE, ack_on_receipt=ack_on_receipt)


def run_of(start: int, end: int, before: int = 3) -> Run:
    """With `before` rows of others before it, and some behind."""
    rows = np.r_[STEPS[:before], STEPS[start:end], STEPS[: OTHERS - before]]
    return Run(start, end, {name: values[rows] for name, values in LINE.items()}, before)


def is_line(values: dict[str, np.ndarray], start: int, end: int) -> bool:
    return values.keys() == LINE.keys() and all(
        np.array_equal(values[name], line[start:end]) and values[name].dtype == line.dtype
        for name, line in LINE.items()
    )


def overlapping(lengths: list[int], later: list[int], again: list[int]) -> list[tuple[int, int]]:
    """Runs next to each other, of which some come later than others and with what has come before."""
    runs = list(pairwise(accumulate(lengths, initial=0)))
    order = sorted(range(len(runs)), key=lambda i: i + later[i])
    return [(max(0, runs[i][0] - again[i]), runs[i][1]) for i in order]


EVENTS = st.lists(
    st.tuples(
        st.integers(1, 5),
        st.sampled_from([0, 0, 0, 1, 3]),
        st.sampled_from([0, 0, 0, 2, 9]),
        st.sampled_from([0] * 8 + [2, 17, 90]),
    ),
    min_size=2 * MAX_SHARED_RUNS,
    max_size=60,
)
"""Lengths of runs, how many others each lets go first, how much it repeats, and what is then acknowledged or read."""


@given(EVENTS, st.data())
def test_what_is_not_acknowledged_is_there_whatever_came_when(
    events: list[tuple[int, int, int, int]], data: st.DataObject
) -> None:
    lengths, later, again, acks = map(list, zip(*events, strict=True))
    session = lone()
    for (start, end), acked in zip(overlapping(lengths, later, again), acks, strict=True):
        session.deliver(0, 0, run_of(start, end))
        session.ack(min(session.acked + acked, session.progress))
        if (outputs := session.peek(session.acked)) is not None:
            assert is_line(dict(outputs.values), session.acked, session.progress)
        assert (outputs is None) == (session.acked == session.progress)
        first = data.draw(st.integers(session.acked, session.progress))
        last = data.draw(st.integers(first, session.progress))
        assert is_line(session.between(first, last), first, last)
    assert session.progress == sum(lengths)
    session.ack(session.progress)
    assert session.peek(0) is None


@given(EVENTS)
def test_each_output_is_read_once_whatever_came_when(events: list[tuple[int, int, int, int]]) -> None:
    lengths, later, again, takes = map(list, zip(*events, strict=True))
    session, read = lone(ack_on_receipt=True), 0
    for (start, end), taken in zip(overlapping(lengths, later, again), takes, strict=True):
        session.deliver(0, 0, run_of(start, end))
        if taken and (outputs := session.read()) is not None:
            assert outputs.start == read and session.peek(0) is None
            assert is_line(dict(outputs.values), read, read := session.progress)
    if (outputs := session.read()) is not None:
        assert is_line(dict(outputs.values), read, session.progress)
    assert session.read() is None


@pytest.mark.parametrize("ack_on_receipt", [False, True])
def test_a_session_that_does_not_acknowledge_keeps_few_answers_of_others(ack_on_receipt: bool) -> None:
    session = lone(ack_on_receipt=ack_on_receipt)
    brought = []
    for timestep in range(150):
        run = run_of(timestep, timestep + 1)
        brought += [weakref.ref(values) for values in run.values.values()]
        session.deliver(0, 0, run)
        del run
        assert sum(values() is not None for values in brought) < MAX_SHARED_RUNS * len(LINE)
    outputs = session.peek(0)
    assert outputs is not None and is_line(dict(outputs.values), 0, 150)


def test_each_output_is_copied_once_at_most() -> None:
    session, prompt = lone(), lone()
    brought, first = [], []
    for timestep in range(150):
        run = run_of(timestep, timestep + 1)
        session.deliver(0, 0, run)
        prompt.deliver(0, 0, run)
        assert np.shares_memory(prompt.between(timestep, timestep + 1)["y"], run.values["y"])
        prompt.ack(timestep + 1)
        brought.append(run.values["y"])
        first.append(session.between(0, 1)["y"])
    assert np.shares_memory(first[0], brought[0]) and not np.shares_memory(first[-1], brought[0])
    assert all(np.shares_memory(values, first[-1]) for values in first[MAX_SHARED_RUNS - 1 :])
