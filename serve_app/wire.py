"""Frames and answers ↔ bytes: msgpack, with every column and every tensor as one run of little-endian bytes."""

from typing import Any

import msgpack
import numpy as np

from serve_app.errors import LockstepError, from_wire
from serve_app.frame import Answer, Checkpoints, Frame, Notice, Open


def encode_frame(frame: Frame) -> bytes:
    """The inverse of `decode_frame`."""
    opens = [
        (ask.epoch, ask.session, pack_all(ask.initial_state), ask.start, ask.adopts, ask.rewind, ask.acked)
        for ask in frame.opens
    ]
    columns, x = _pack_array(frame.columns), _pack_array(frame.x)
    return _pack((frame.owner, frame.sender, columns, x, opens, list(frame.exports)))


def decode_frame(data: bytes | memoryview) -> Frame:
    """The frame; its arrays are read-only."""
    owner, sender, columns, x, opens, exports = msgpack.unpackb(data)
    asks = tuple(Open(epoch, session, unpack_all(state), *numbers) for epoch, session, state, *numbers in opens)
    return Frame(owner, sender, _unpack_array(columns), _unpack_array(x), asks, tuple(exports))


def encode_reply(reply: Answer | LockstepError) -> bytes:
    """What a call comes back with: its answer, or why there is none. The inverse of `decode_reply`."""
    if isinstance(reply, LockstepError):
        return _pack((reply.to_wire(), None, (), (), None))
    columns = (reply.epoch, reply.next, reply.rewind, reply.start, reply.length)
    outputs = {name: _pack_array(values) for name, values in reply.outputs.items()}
    notices = [(n.epoch, n.kind, n.error, n.reason, n.progress, n.rewind, n.acked) for n in reply.notices]
    kept = reply.checkpoints
    checkpoints = None if kept is None else pack_all((kept.epoch, kept.at, *kept.state))
    return _pack((None, _pack_array(np.concatenate([columns, reply.timing])), outputs, notices, checkpoints))


def decode_reply(data: bytes | memoryview) -> Answer | LockstepError:
    """The answer, its arrays read-only, or the error."""
    error, columns, outputs, notices, kept = msgpack.unpackb(data)
    if error is not None:
        return from_wire(error)
    values = {name: _unpack_array(array) for name, array in outputs.items()}
    table = _unpack_array(columns)
    epoch, following, rewind, start, length = table[:5]
    told = tuple(Notice(*notice) for notice in notices)
    checkpoints = None
    if kept is not None:
        of, at, *state = (_unpack_array(array) for array in kept)
        checkpoints = Checkpoints(of, at, tuple(state))
    return Answer(epoch, following, rewind, start, length, values, told, table[5:], checkpoints)


def _pack(message: Any) -> bytes:
    packed: bytes = msgpack.packb(message)
    return packed


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
