"""Messages in both encodings: what is written is read again, and what is malformed is named."""

import json
import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve_app.errors import InvalidInput
from serve_app.ingress.codec import (
    DTYPES,
    JSON,
    MAX_OUTPUT_BYTES,
    MSGPACK,
    Encoding,
    Message,
    describe_model,
    describe_session,
    max_body,
    read_array,
    read_raw,
    read_session,
)
from serve_app.segment import Outputs
from serve_app.session import Session
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec

PAIR = TensorSpec((2,), "float32")
WHOLE = TensorSpec((2,), "int64")


def arrays(dtypes: list[str]) -> st.SearchStrategy[np.ndarray]:
    """Segments: the first axis is time."""
    shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)
    return st.sampled_from(dtypes).flatmap(lambda dtype: hnp.arrays(dtype, shapes))


REAL = [name for name in DTYPES if not name.startswith("complex")]


@given(arrays(list(DTYPES)))
def test_msgpack_brings_every_array_back_to_the_bit(x: np.ndarray) -> None:
    again = MSGPACK.decode(MSGPACK.encode({"x": x})).array("x", TensorSpec(x.shape[1:], x.dtype.name))
    assert (again.dtype, again.shape, again.tobytes()) == (x.dtype, x.shape, x.tobytes())


@given(arrays(REAL))
def test_json_brings_every_finite_array_back_to_the_bit(x: np.ndarray) -> None:
    if x.dtype.kind == "f":
        x = np.where(np.isfinite(x), x, x.dtype.type(1))
    again = JSON.decode(JSON.encode({"x": x})).array("x", TensorSpec(x.shape[1:], x.dtype.name))
    assert (again.dtype, again.shape, again.tobytes()) == (x.dtype, x.shape, x.tobytes())


@given(arrays(REAL))
def test_a_message_is_no_longer_than_the_limit_for_its_arrays(x: np.ndarray) -> None:
    for encoding in (JSON, MSGPACK):
        assert len(encoding.encode({"x": x})) <= max_body(x.nbytes)
    assert len(msgpack.packb({"x": x.tolist()})) <= max_body(x.nbytes)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_whatever_is_in_the_place_of_an_array_is_read_or_refused(value: Any) -> None:
    for spec in (PAIR, WHOLE, None):
        try:
            x = read_array(value, "x", spec)
        except InvalidInput:
            continue
        assert isinstance(value, list)
        assert spec is None or x.dtype == spec.dtype


@given(st.binary())
def test_whatever_arrives_is_a_message_or_refused(data: bytes) -> None:
    for encoding in (JSON, MSGPACK):
        try:
            message = encoding.decode(data)
        except InvalidInput:
            continue
        assert isinstance(message.values, dict)


@pytest.mark.parametrize(
    ("encoding", "data", "message"),
    [
        (JSON, b'{"x": [1,', "not JSON: Expecting value: line 1 column 10"),
        (JSON, b"\xff", "not JSON: 'utf-8'"),
        (JSON, b"[" * 100_000, "not JSON: maximum recursion"),
        (JSON, b"1" * 10_000, "not JSON: Exceeds the limit"),
        (JSON, b"[1]", "the message is a list, expected a map"),
        (JSON, b"null", "the message is null, expected a map"),
        (MSGPACK, b"", "not msgpack: Unpack failed: incomplete input"),
        (MSGPACK, b"\xc1", "not msgpack: FormatError"),
        (MSGPACK, b"\x81\xa1x", "not msgpack"),
        (MSGPACK, b"\x91" * 5000, "not msgpack: StackError"),
        (MSGPACK, b"\x80\x80", "not msgpack: .*extra data"),
        (MSGPACK, b"\x81\x01\x02", "not msgpack: int is not allowed for map key"),
        (MSGPACK, b"\xdd\xff\xff\xff\xff", "not msgpack: .*exceeds max_array_len"),
        (MSGPACK, b"\x07", "the message is 7, expected a map"),
    ],
)
def test_undecodable_messages_are_named(encoding: Encoding, data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        encoding.decode(data)


@pytest.mark.parametrize(
    ("value", "spec", "message"),
    [
        (None, PAIR, "x is null, expected nested lists, or a map of dtype, shape and data, or raw bytes"),
        ("AAAA", PAIR, "x is 'AAAA', expected nested lists"),
        (b"12345678", None, "x is bytes, expected nested lists, or a map of dtype, shape and data$"),
        (b"1234567", PAIR, r"x has 7 bytes, not a multiple of a timestep's 8 \(float32, shape \[2\]\)"),
        ([[1.0, 2.0], [1.0, None]], PAIR, r"x\[1\]\[1\] is null, expected a number"),
        ([[1.0, True]], PAIR, r"x\[0\]\[1\] is true, expected a number"),
        ([[1.0, "2"]], PAIR, r"x\[0\]\[1\] is '2', expected a number"),
        ([[1.0, {}]], PAIR, r"x\[0\]\[1\] is a map, expected a number"),
        ([[1, 2], [1, 2.0]], WHOLE, r"x\[1\]\[1\] is 2.0, expected a whole number"),
        ([[1]], TensorSpec((1,), "bool"), r"x\[0\]\[0\] is 1, expected true or false"),
        ([[1, 2], [1, 2, 3]], PAIR, r"x\[1\] has shape \[3\], x\[0\] has \[2\]"),
        ([[1, 2], 3], PAIR, r"x\[1\] is 3, and its neighbours are lists"),
        ([[1, 2**63]], WHOLE, "x holds a number that is too large for int64"),
        ([[1, -1]], TensorSpec((2,), "uint8"), "x holds a number that is too large for uint8"),
        ([[1, 1e39]], PAIR, "x holds a number that is too large for float32"),
        ([[1, 10**400]], PAIR, "x holds a number that is too large for float32"),
        ([[1, 10**30]], None, "x holds a number that is too large for any dtype"),
        (json.loads("[" * 40 + "]" * 40), PAIR, "nested more than 32 deep"),
        ({"dtype": "float32", "shape": [1]}, PAIR, "key 'data' of x is missing"),
        ({"dtype": "f", "shape": [], "data": b"", "start": 1}, PAIR, "key 'start' is not known here"),
        (
            {"dtype": "object", "shape": [1], "data": b"12345678"},
            PAIR,
            "x.dtype is 'object', expected one of bool",
        ),
        ({"dtype": [], "shape": [1], "data": b""}, PAIR, "x.dtype is a list"),
        ({"dtype": "int8", "shape": 3, "data": b"123"}, PAIR, "x.shape is 3, expected a list of whole numbers"),
        ({"dtype": "int8", "shape": [-3], "data": b"123"}, PAIR, "x.shape is a list, expected a list of whole"),
        (
            {"dtype": "int8", "shape": [3.0], "data": b"123"},
            PAIR,
            "x.shape is a list, expected a list of whole",
        ),
        ({"dtype": "int8", "shape": [3], "data": "123"}, PAIR, "x.data is '123', expected bytes"),
        ({"dtype": "int16", "shape": [3, 2], "data": b"123"}, PAIR, r"x.data has 3 bytes, \[3, 2\] of int16 takes 12"),
        ({"dtype": "int8", "shape": [0, *[2**31 - 1] * 3], "data": b""}, PAIR, "x.shape is .* too big"),
    ],
)
def test_malformed_arrays_are_named(value: Any, spec: TensorSpec | None, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_array(value, "x", spec)


def test_lists_take_the_dtype_of_the_model() -> None:
    x = read_array([[1, 2.5]], "x", PAIR)
    assert (x.dtype, x.tolist()) == (np.float32, [[1.0, 2.5]])
    assert read_array([], "x", PAIR).shape == (0, 2)
    assert read_array([[1, 2], [3, 4]], "state").dtype == np.int64
    assert read_raw(b"\1\0\2\0\3\0\4\0", "x", TensorSpec((2,), "int16")).tolist() == [[1, 2], [3, 4]]
    assert read_array({"dtype": "bool", "shape": [2], "data": b"\0\7"}, "x").tolist() == [False, True]


def test_json_writes_null_for_nan_and_reads_it_where_a_client_can_write_it() -> None:
    x = np.array([[1, np.nan], [np.inf, 2]], np.float32)
    assert json.loads(JSON.encode({"x": x})) == {"x": [[1.0, None], [None, 2.0]]}
    again = JSON.decode(b'{"x": [[1.0, NaN], [Infinity, 2.0]]}').array("x", PAIR)
    np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.only("n", "no"), "key 'flag' is not known here: n, no"),
        (lambda m: Message({b"a": 1, "b": 2}).only("n"), "key 'b' is not known here: n"),
        (lambda m: m.number("flag"), "flag is 1, expected|flag is true, expected a whole number from 0 on"),
        (lambda m: m.number("n"), "n is -1, expected a whole number from 0 on"),
        (lambda m: m.number("text"), "text is ''"),
        (lambda m: Message({"n": 2**63}).number("n"), "n is 9223372036854775808, expected a whole number"),
        (lambda m: m.text("text"), "text is '', expected a text of 1 to 256 characters"),
        (lambda m: m.text("long"), "long is 'aaaa.*…, expected a text"),
        (lambda m: m.text("half"), r"half is '\\ud800', expected a text"),
        (lambda m: m.flag("n"), "n is -1, expected true or false"),
        (lambda m: m.mapping("n"), "n is -1, expected a map"),
        (lambda m: m.mapping("none"), "key 'none' is missing"),
        (lambda m: m.arrays("n"), "n is -1, expected a list of arrays"),
        (lambda m: m.array("none", PAIR), "key 'none' is missing"),
    ],
)
def test_malformed_values_are_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        call(Message({"n": -1, "flag": True, "text": "", "long": "a" * 257, "half": "\ud800"}))


def test_seconds_that_no_float_holds_are_for_ever() -> None:
    assert Message({"wait": 10**400}).seconds("wait") == Message({}).seconds("wait") == math.inf


def test_outputs_are_cut_to_messages_that_any_client_takes() -> None:
    spec = ModelSpec("sum", PAIR, {"a": TensorSpec((3,), "float64"), "b": TensorSpec((), "int8")})
    n, rng = 100_000, np.random.default_rng(0)
    outputs = Outputs(5, {"a": rng.random((n, 3)) * 1e-300, "b": np.full(n, -128, np.int8)})
    for encoding in (JSON, MSGPACK):
        parts = list(encoding.cut(outputs, spec))
        assert [part.start for part in parts] == [5, *(part.end for part in parts[:-1])]
        np.testing.assert_array_equal(np.concatenate([part.values["a"] for part in parts]), outputs.values["a"])
        longest = max(len(encoding.encode({"outputs": part.values})) for part in parts)
        assert MAX_OUTPUT_BYTES / 8 < longest <= MAX_OUTPUT_BYTES


def test_a_session_is_described_and_read() -> None:
    spec = ModelSpec("vad", TensorSpec((512,)), {"speech": TensorSpec(())}, state_bytes=0, sample_rate=16000)
    limits = SessionLimits(max_segment=7, max_window=70, refuse_nan=False)
    described = describe_session(Session("a", spec, limits, carrier=None))  # type: ignore[arg-type]
    for encoding in (JSON, MSGPACK):
        assert read_session(encoding.decode(encoding.encode(described))) == ("a", spec, limits)
    for values, message in (({"session": "a"}, "a model: KeyError"), (describe_model(spec), "a session: KeyError")):
        with pytest.raises(InvalidInput, match=f"does not describe {message}"):
            read_session(Message(values))
