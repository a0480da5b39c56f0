"""Frames and answers ↔ bytes: what they say as msgpack, then every column and tensor as one run of little-endian bytes.

Arrays are not copied on the way: a message is the parts to be sent one after the other, an array that has come lies in
the bytes that did.
"""

from collections.abc import Sequence
from math import prod
from struct import Struct
from typing import Any

import msgpack
import numpy as np

from serve_app.errors import LockstepError, from_wire
from serve_app.frame import Answer, Checkpoints, Frame, Notice, Open

Parts = Sequence[bytes | memoryview]
"""Of a message, to be sent one after the other. Arrays in them are to stay as they are until then."""
LENGTH = Struct("<I")
ALIGNMENT = 16
JOINED_BYTES = 65536
"""Of a message that is quicker to copy than to send in parts."""


def encode_frame(frame: Frame) -> Parts:
    """The inverse of `decode_frame`."""
    message = _Writer()
    opens = [
        (ask.epoch, ask.session, message.add_all(ask.initial_state), ask.start, ask.adopts, ask.rewind, ask.acked)
        for ask in frame.opens
    ]
    columns, x = message.add(frame.columns), message.add(frame.x)
    return message.parts((frame.owner, frame.sender, columns, x, opens, list(frame.exports)))


def decode_frame(data: bytes | memoryview) -> Frame:
    """The frame; its arrays are read-only, and in `data`."""
    message = _Reader(data)
    owner, sender, columns, x, opens, exports = message.said
    asks = tuple(Open(epoch, session, message.arrays(state), *numbers) for epoch, session, state, *numbers in opens)
    return Frame(owner, sender, message.array(columns), message.array(x), asks, tuple(exports))


def encode_reply(reply: Answer | LockstepError) -> Parts:
    """What a call comes back with: its answer, or why there is none. The inverse of `decode_reply`."""
    message = _Writer()
    if isinstance(reply, LockstepError):
        return message.parts((reply.to_wire(), None, (), (), None))
    columns = (reply.epoch, reply.next, reply.rewind, reply.start, reply.length)
    table = message.add(np.concatenate([columns, reply.timing]))
    outputs = {name: message.add(values) for name, values in reply.outputs.items()}
    notices = [(n.epoch, n.kind, n.error, n.reason, n.progress, n.rewind, n.acked) for n in reply.notices]
    kept = reply.checkpoints
    checkpoints = None if kept is None else message.add_all((kept.epoch, kept.at, *kept.state))
    return message.parts((None, table, outputs, notices, checkpoints))


def decode_reply(data: bytes | memoryview) -> Answer | LockstepError:
    """The answer, its arrays read-only, or the error."""
    message = _Reader(data)
    error, columns, outputs, notices, kept = message.said
    if error is not None:
        return from_wire(error)
    values = {name: message.array(array) for name, array in outputs.items()}
    table = message.array(columns)
    epoch, following, rewind, start, length = table[:5]
    told = tuple(Notice(*notice) for notice in notices)
    checkpoints = None
    if kept is not None:
        of, at, *state = (message.array(array) for array in kept)
        checkpoints = Checkpoints(of, at, tuple(state))
        values = {name: array.copy() for name, array in values.items()}  # or one kept would keep all these states
    return Answer(epoch, following, rewind, start, length, values, told, table[5:], checkpoints)


class _Writer:
    """Gathers the arrays of a message."""

    def __init__(self) -> None:
        self._runs: list[memoryview] = []
        self._end = 0

    def add(self, array: np.ndarray) -> tuple[str, tuple[int, ...], int]:
        """What is said of an array: its dtype, its shape, and where it begins behind what is said."""
        dtype, shape, run = _pack_array(array)
        begin = self._end
        self._runs.append(run)
        self._end += len(run) + _gap(len(run))
        return dtype, shape, begin

    def add_all(self, arrays: tuple[np.ndarray, ...] | None) -> list[Any] | None:
        return None if arrays is None else [self.add(array) for array in arrays]

    def parts(self, said: Any) -> Parts:
        """The message."""
        head: bytes = msgpack.packb(said)
        parts: list[bytes | memoryview] = [LENGTH.pack(len(head)), head, bytes(_gap(LENGTH.size + len(head)))]
        for run in self._runs:
            parts += run, bytes(_gap(len(run)))
        return [b"".join(parts)] if self._end < JOINED_BYTES else [part for part in parts if len(part)]


class _Reader:
    """A message, and the arrays in it. `said`: what it says of them, and else."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).toreadonly()
        (length,) = LENGTH.unpack_from(self._data)
        self._begin = LENGTH.size + length + _gap(LENGTH.size + length)
        self.said = msgpack.unpackb(self._data[LENGTH.size : LENGTH.size + length])

    def array(self, said: tuple[str, list[int], int]) -> np.ndarray:
        dtype, shape, begin = said
        count = prod(shape)
        if count == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self._data, dtype, count, self._begin + begin).reshape(shape)

    def arrays(self, said: list[Any] | None) -> tuple[np.ndarray, ...] | None:
        return None if said is None else tuple(self.array(array) for array in said)


def _gap(length: int) -> int:
    """Bytes to the next place where any array may begin."""
    return -length % ALIGNMENT


def _pack_array(array: np.ndarray) -> tuple[str, tuple[int, ...], memoryview]:
    """Copied only where it is not one run of little-endian bytes already."""
    dtype = array.dtype.newbyteorder("<")
    flat = np.ascontiguousarray(array, dtype).reshape(-1)
    return dtype.str, array.shape, flat.view(np.uint8).data


def _unpack_array(packed: tuple[str, list[int], bytes]) -> np.ndarray:
    dtype, shape, data = packed
    return np.frombuffer(data, dtype).reshape(shape)


def pack_all(arrays: tuple[np.ndarray, ...] | None) -> list[Any] | None:
    """Arrays as what msgpack takes."""
    return None if arrays is None else [_pack_array(array) for array in arrays]


def unpack_all(packed: list[Any] | None) -> tuple[np.ndarray, ...] | None:
    """The inverse of `pack_all`: read-only views."""
    return None if packed is None else tuple(_unpack_array(array) for array in packed)
