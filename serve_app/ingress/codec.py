"""One message ↔ bytes, in JSON (arrays are nested lists) and in msgpack (arrays are bytes with their dtype and shape).

JSON has neither NaN nor infinity: in what is written both become null. The tokens NaN and Infinity are read.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack
import numpy as np

from serve_app.directory import Turn
from serve_app.errors import InvalidInput
from serve_app.segment import Outputs, Timing
from serve_app.session import Session
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec

MAX_OUTPUT_BYTES = 2**20
"""Outputs are cut so that a message is about this large at most: many WebSocket clients take no larger one."""
OVERHEAD_BYTES = 2**16
MAX_NAME = 256
MAX_DIMS = 32
DTYPES = {np.dtype(char).name: np.dtype(char).newbyteorder("<") for char in "?bhilqBHILQefdFD"}


class Message:
    """A decoded message. Every look at a value checks it, and raises InvalidInput that says what is wrong with it."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def only(self, *known: str) -> None:
        """Refuse any other key: a misspelt one would silently mean nothing."""
        if unknown := self.values.keys() - set(known):
            raise InvalidInput(f"key {min(map(repr, unknown))} is not known here: {', '.join(known)}")

    def number(self, key: str) -> int | None:
        """A whole number from 0 on, of 63 bits; None without the key."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < 2**63:
            raise InvalidInput(f"{key} is {_describe(value)}, expected a whole number from 0 on")
        return value

    def seconds(self, key: str) -> float:
        """A duration, from 0 on; infinite without the key."""
        value = self.values.get(key, math.inf)
        if type(value) not in (int, float) or not value >= 0:
            raise InvalidInput(f"{key} is {_describe(value)}, expected seconds from 0 on")
        return float(value) if value <= sys.float_info.max else math.inf

    def turn(self) -> Turn:
        """What a new session says for the case that no place is free."""
        return Turn(self.number("priority") or 0, self.seconds("max_wait_s"))

    def text(self, key: str) -> str | None:
        """A short text; None without the key."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_NAME and is_unicode(value)):
            raise InvalidInput(f"{key} is {_describe(value)}, expected a text of 1 to {MAX_NAME} characters")
        return value

    def flag(self, key: str) -> bool:
        """A truth value; False without the key."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise InvalidInput(f"{key} is {_describe(value)}, expected true or false")
        return value

    def mapping(self, key: str) -> "Message":
        """A message within this one."""
        value = self._required(key)
        if not isinstance(value, dict):
            raise InvalidInput(f"{key} is {_describe(value)}, expected a map")
        return Message(value)

    def blob(self, key: str) -> bytes:
        """Bytes, which JSON has not."""
        value = self._required(key)
        if not isinstance(value, bytes):
            raise InvalidInput(f"{key} is {_describe(value)}, expected bytes: take msgpack, which has them")
        return value

    def array(self, key: str, spec: TensorSpec) -> np.ndarray:
        """An array. Lists, and bytes without a dtype, are taken for timesteps of `spec`; dtype and shape may differ."""
        return read_array(self._required(key), key, spec)

    def arrays(self, key: str) -> list[np.ndarray] | None:
        """A list of arrays of any dtype and shape; None without the key."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise InvalidInput(f"{key} is {_describe(value)}, expected a list of arrays")
        return [read_array(item, f"{key}[{i}]") for i, item in enumerate(value)]

    def _required(self, key: str) -> Any:
        if key not in self.values:
            raise InvalidInput(f"key {key!r} is missing")
        return self.values[key]


@dataclass(frozen=True, slots=True)
class Encoding:
    """A way to write messages. `expansion`: an array takes at most about so many times its bytes."""

    name: str
    media_type: str
    expansion: int
    encode: Callable[[Mapping[str, Any]], bytes]
    parse: Callable[[Any], Any]

    def decode(self, data: bytes | str) -> Message:
        """The message in `data`. Raises InvalidInput."""
        try:
            values = self.parse(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidInput(f"the message is not {self.name}: {str(error) or type(error).__name__}") from error
        if not isinstance(values, dict):
            raise InvalidInput(f"the message is {_describe(values)}, expected a map of keys and values")
        return Message(values)

    def cut(self, outputs: Outputs, spec: ModelSpec) -> Iterator[Outputs]:
        """The outputs in parts that make messages of about MAX_OUTPUT_BYTES or less."""
        count = max(1, MAX_OUTPUT_BYTES // max(1, spec.output_bytes * self.expansion))
        for at in range(0, len(outputs), count):
            values = {name: value[at : at + count] for name, value in outputs.values.items()}
            yield Outputs(outputs.start + at, values, Timing() if at else outputs.timing)


def _to_json(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=_to_lists, allow_nan=False, separators=(",", ":")).encode()


def _to_lists(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} does not go into JSON. This is a bug.")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        return np.where(np.isfinite(value), value, None).tolist()  # type: ignore[call-overload]
    return value.tolist()


def _to_msgpack(message: Mapping[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(message, default=_to_bytes)
    return packed


def _to_bytes(value: Any) -> dict[str, Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} does not go into msgpack. This is a bug.")
    dtype = value.dtype
    return {
        "dtype": dtype.name,
        "shape": value.shape,
        "data": value.astype(dtype.newbyteorder("<"), copy=False).tobytes(),
    }


JSON = Encoding("JSON", "application/json", 16, _to_json, json.loads)
MSGPACK = Encoding("msgpack", "application/msgpack", 5, _to_msgpack, msgpack.unpackb)


def read_array(value: Any, where: str, spec: TensorSpec | None = None) -> np.ndarray:
    """An array from nested lists, raw bytes of `spec`, or a map of dtype, shape and data. Raises InvalidInput."""
    if isinstance(value, list):
        return _from_lists(value, where, spec)
    if isinstance(value, dict):
        return _from_map(Message(value), where)
    if isinstance(value, bytes) and spec is not None:
        return read_raw(value, where, spec)
    kinds = "nested lists, or a map of dtype, shape and data" + (", or raw bytes" if spec is not None else "")
    raise InvalidInput(f"{where} is {_describe(value)}, expected {kinds}")


def read_raw(data: bytes, where: str, spec: TensorSpec) -> np.ndarray:
    """Timesteps from their bytes, little-endian, one after the other. Raises InvalidInput."""
    if len(data) % max(1, spec.nbytes):
        raise InvalidInput(
            f"{where} has {len(data)} bytes, not a multiple of a timestep's {spec.nbytes} "
            f"({spec.dtype}, shape {list(spec.shape)})"
        )
    return _from_bytes(data, spec.dtype, (-1, *spec.shape))


def _from_map(value: Message, where: str) -> np.ndarray:
    if missing := {"dtype", "shape", "data"} - value.values.keys():
        raise InvalidInput(f"key {min(missing)!r} of {where} is missing")
    value.only("dtype", "shape", "data")
    dtype, shape, data = (value.values[key] for key in ("dtype", "shape", "data"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InvalidInput(f"{where}.dtype is {_describe(dtype)}, expected one of {', '.join(DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMS
        or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
    ):
        raise InvalidInput(f"{where}.shape is {_describe(shape)}, expected a list of whole numbers from 0 on")
    if not isinstance(data, bytes):
        raise InvalidInput(f"{where}.data is {_describe(data)}, expected bytes")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if len(data) != expected:
        raise InvalidInput(f"{where}.data has {len(data)} bytes, {shape} of {dtype} takes {expected}")
    try:
        return _from_bytes(data, dtype, tuple(shape))
    except ValueError as error:  # no data, but axes of millions
        raise InvalidInput(f"{where}.shape is {shape}: {error}") from error


def _from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    array: np.ndarray = np.frombuffer(data, DTYPES[dtype])
    if dtype == "bool":
        array = array.view(np.uint8) != 0  # other bytes than 0 and 1 are no bool
    return array.reshape(shape).astype(dtype, copy=False)


def _from_lists(value: list[Any], where: str, spec: TensorSpec | None) -> np.ndarray:
    dtype = np.dtype(spec.dtype) if spec else None
    if spec and not value:
        return np.empty((0, *spec.shape), dtype)
    if dtype is None or dtype.kind == "f":
        allowed, expected = {int, float}, "a number"
    elif dtype.kind == "b":
        allowed, expected = {bool}, "true or false"
    else:
        allowed, expected = {int}, "a whole number"
    _check_lists(value, where, allowed, expected, MAX_DIMS)
    try:
        with np.errstate(over="raise"):
            array: np.ndarray = np.array(value, dtype)
    except (OverflowError, FloatingPointError, ValueError) as error:
        raise InvalidInput(f"{where} holds a number that is too large for {dtype or 'any dtype'}: {error}") from error
    if array.dtype == object:
        raise InvalidInput(f"{where} holds a number that is too large for any dtype: keep within 64 bits")
    return array


def _check_lists(value: list[Any], where: str, allowed: set[type], expected: str, depth: int) -> tuple[int, ...]:
    """The shape of nested lists. Raises InvalidInput, naming the first place that is out of line."""
    kinds = set(map(type, value))
    if list not in kinds:
        for i, item in enumerate(value) if kinds - allowed else ():
            if type(item) not in allowed:
                raise InvalidInput(f"{where}[{i}] is {_describe(item)}, expected {expected}")
        return (len(value),)
    if depth == 1:
        raise InvalidInput(f"{where} is nested more than {MAX_DIMS} deep")
    shapes = []
    for i, item in enumerate(value):
        if not isinstance(item, list):
            raise InvalidInput(f"{where}[{i}] is {_describe(item)}, and its neighbours are lists")
        shapes.append(_check_lists(item, f"{where}[{i}]", allowed, expected, depth - 1))
        if shapes[i] != shapes[0]:
            raise InvalidInput(
                f"{where}[{i}] has shape {list(shapes[i])}, {where}[0] has {list(shapes[0])}: make them alike"
            )
    return (len(value), *shapes[0])


def is_unicode(text: str) -> bool:
    """Whether UTF-8 has it: JSON may escape half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe(value: Any) -> str:
    if isinstance(value, list | dict | bytes) or value is None or value is True or value is False:
        return {list: "a list", dict: "a map", bytes: "bytes", type(None): "null", bool: str(value).lower()}[
            type(value)
        ]
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


# What HTTP and WebSocket say of a session, in either encoding.


def max_body(nbytes: int) -> int:
    """How long a message with arrays of `nbytes` may be, in whatever encoding."""
    return OVERHEAD_BYTES + JSON.expansion * nbytes


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """A model, for its clients."""
    described: dict[str, Any] = {
        "model": spec.name,
        "input": _describe_tensor(spec.input),
        "outputs": {name: _describe_tensor(output) for name, output in spec.outputs.items()},
    }
    return described if spec.sample_rate is None else {**described, "sample_rate": spec.sample_rate}


def describe_session(session: Session) -> dict[str, Any]:
    """A session when it opens; `read_session` reads it."""
    described = {"session": session.name, **describe_model(session.spec), "limits": asdict(session.limits)}
    return {**described, **describe_numbers(session)}


def describe_numbers(session: Session) -> dict[str, int]:
    """Where a session is on its number line."""
    acked = min(session.acked, session.progress)
    numbers = {"next": session.next, "progress": session.progress, "acked": acked, "rewind": session.rewind}
    return numbers if session.kept is None else {**numbers, "kept": session.kept}


def describe_outputs(session: Session, outputs: Outputs) -> dict[str, Any]:
    """Outputs of a session; `read_timing` reads where their time went."""
    numbers = {**asdict(outputs.timing), **describe_numbers(session)}
    return {"start": outputs.start, "end": outputs.end, "outputs": outputs.values, **numbers}


def read_timing(message: Message) -> Timing:
    """Where the time of a message's outputs went."""
    return Timing(*(message.number(each.name) or 0 for each in fields(Timing)))


def read_session(message: Message) -> tuple[str, ModelSpec, SessionLimits]:
    """Name, model and limits of a session that `describe_session` has described."""
    try:
        return message.values["session"], read_model(message), SessionLimits(**message.values["limits"])
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"this does not describe a session: {error!r}") from error


def read_model(message: Message) -> ModelSpec:
    """The model that `describe_model` has described."""
    values = message.values
    try:
        outputs = {name: _read_tensor(output) for name, output in values["outputs"].items()}
        return ModelSpec(values["model"], _read_tensor(values["input"]), outputs, sample_rate=values.get("sample_rate"))
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"this does not describe a model: {error!r}") from error


def _describe_tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"shape": list(spec.shape), "dtype": spec.dtype}


def _read_tensor(described: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(tuple(described["shape"]), described["dtype"])
