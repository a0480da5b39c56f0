"""Frames and answers come out of their bytes as they went in."""

import dataclasses
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serve_app.errors import LockstepError, NotOwner
from serve_app.frame import Answer, Checkpoints, Frame, Notice, Open
from serve_app.wire import JOINED_BYTES, Parts, decode_frame, decode_reply, encode_frame, encode_reply

DTYPES = st.sampled_from(["<f4", ">f4", "f2", "f8", "i8", "i4", "u1", "?"])
TENSORS = arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
NAMES = st.text(max_size=8)


def joined(parts: Parts) -> bytes:
    return b"".join(parts)


def columns(count: int) -> st.SearchStrategy[list[np.ndarray]]:
    return st.integers(0, 5).flatmap(lambda n: st.lists(arrays.arrays(np.int64, (n,)), min_size=count, max_size=count))


def assert_same(found: Any, expected: Any) -> None:
    """Equal in every field; arrays in values, shape and kind, whatever their byte order."""
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected, strict=False)
        assert found.shape == expected.shape
    elif dataclasses.is_dataclass(expected):
        assert type(found) is type(expected)
        for field in dataclasses.fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@given(NAMES, NAMES, columns(6), TENSORS, st.lists(st.none() | st.tuples(TENSORS, TENSORS), max_size=3))
def test_frame(
    owner: str, sender: str, ints: list[np.ndarray], x: np.ndarray, states: list[tuple[np.ndarray, ...] | None]
) -> None:
    opens = tuple(Open(2**62 + i, f"session {i}", state, i * 7, i - 1, i + 1, i * 3) for i, state in enumerate(states))
    frame = Frame(owner, sender, np.stack(ints), x, opens)
    assert_same(decode_frame(joined(encode_frame(frame))), frame)


@given(columns(8), st.dictionaries(NAMES, TENSORS, max_size=3), NAMES)
def test_answer(ints: list[np.ndarray], outputs: dict[str, np.ndarray], reason: str) -> None:
    error = NotOwner("no", expected=3, hint=None).to_wire()
    notices = (Notice(5, "refused", error), Notice(6, "ended", reason=reason, progress=7, rewind=3))
    kept = None if reason == "" else Checkpoints(ints[0], ints[1], tuple(outputs.values()))
    answer = Answer(*ints[:5], outputs, notices, np.stack(ints[5:]), kept)  # type: ignore[arg-type]
    assert_same(decode_reply(joined(encode_reply(answer))), answer)


def test_a_transposed_input_is_written_in_its_own_order() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    frame = Frame("o", "s", np.zeros((6, 3), np.int64), x)
    assert_same(decode_frame(joined(encode_frame(frame))).x, x)


def test_an_error_keeps_its_class_and_details() -> None:
    error = decode_reply(joined(encode_reply(NotOwner("gone", expected=4))))
    assert isinstance(error, LockstepError)
    assert (type(error), error.message, error.details) == (NotOwner, "gone", {"expected": 4})


def test_large_arrays_are_sent_from_where_they_are_and_read_where_they_came() -> None:
    x = np.arange(JOINED_BYTES, dtype=np.float32).reshape(-1, 8)
    parts = encode_frame(Frame("o", "s", np.zeros((6, 3), np.int64), x))
    (sent,) = (np.frombuffer(part, np.float32) for part in parts if len(part) == x.nbytes)
    assert np.shares_memory(sent, x)
    data = np.frombuffer(joined(parts), np.uint8)
    found = decode_frame(memoryview(data)).x
    assert np.shares_memory(found, data) and not found.flags.writeable and found.ctypes.data % 16 == 0
    np.testing.assert_array_equal(found, x)


def test_outputs_do_not_keep_the_states_that_came_with_them() -> None:
    none = np.zeros(0, np.int64)
    kept = Checkpoints(np.arange(3), np.arange(3), (np.zeros((3, JOINED_BYTES), np.float32),))
    answer = Answer(*[none] * 5, {"y": np.ones((4, 2), np.float32)}, (), np.zeros((3, 0), np.int64), kept)  # type: ignore[arg-type]
    data = np.frombuffer(joined(encode_reply(answer)), np.uint8)
    found = decode_reply(memoryview(data))
    assert isinstance(found, Answer) and found.checkpoints is not None
    assert not np.shares_memory(found.outputs["y"], data)
    assert np.shares_memory(found.checkpoints.state[0], data)
