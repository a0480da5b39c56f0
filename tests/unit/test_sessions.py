"""The table of sessions: epochs that fall on the same places, and frames that name a session twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.sessions import SessionTable, check_frame
from serve_app.errors import InvalidInput
from serve_app.frame import Frame
from serve_app.spec import TensorSpec

SPEC = TensorSpec((1,), "float32")
#: Of 16 places, 7 is where half of these would lie, and 15 is the last.
EPOCHS = st.one_of(st.sampled_from([7, 23, 39, 2**62 + 7, 15, 31, 47]), st.integers(0, 2**63 - 1))


@given(st.lists(st.tuples(EPOCHS, st.booleans()), max_size=60))
def test_a_session_is_found_by_its_epoch_while_it_is_there(asked: list[tuple[int, bool]]) -> None:
    table, row_of = SessionTable(4, 100), dict[int, int]()
    for epoch, opens in asked:
        if opens and epoch not in row_of and epoch not in table.tombstones and len(row_of) < 4:
            row_of[epoch] = table.open(epoch, f"s{epoch}", 1, 0.0)
        elif not opens and epoch in row_of:
            table.end(row_of[epoch], "closed")
            table.free(row_of.pop(epoch))
        table.check()
        assert all(table.epoch[row] == epoch for epoch, row in row_of.items())
        assert all(table.holds(each) == (each in row_of) for each, _ in asked)


def frame_of(epochs: list[int]) -> Frame:
    zeros = np.zeros(len(epochs), np.int64)
    return Frame.of(
        "local", "test", epoch=np.array(epochs, np.int64), start=zeros, length=zeros, acked=zeros, rewind=zeros,
        close=zeros - 1, x=np.zeros((0, 1), np.float32),
    )  # fmt: skip


@given(st.lists(EPOCHS, max_size=40))
def test_a_frame_that_names_a_session_twice_is_refused(epochs: list[int]) -> None:
    if len(set(epochs)) == len(epochs):
        check_frame(frame_of(epochs), SPEC)
    else:
        with pytest.raises(InvalidInput, match="names a session twice"):
            check_frame(frame_of(epochs), SPEC)
