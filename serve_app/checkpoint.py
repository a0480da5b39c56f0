"""A session's checkpoint as a record that outlives who wrote it: it says what it is of, and proves to be whole."""

import hashlib
from dataclasses import dataclass

import msgpack
import numpy as np

from serve_app.errors import StateLost
from serve_app.wire import pack_all, unpack_all

MAGIC = b"lockstep"
VERSION = 1
_AT_VERSION, _AT_DIGEST, _AT_BODY = 8, 10, 26


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state of a session after its first `at` timesteps (None: the model's own initial state).

    model, fingerprint: of whom the state is, see spec.ModelSpec. epoch: the grant under which it was written.
    """

    session: str
    model: str
    fingerprint: str
    epoch: int
    at: int
    state: tuple[np.ndarray, ...] | None


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The inverse of `decode_checkpoint`: magic, version, digest, and a body in msgpack."""
    of = checkpoint
    body: bytes = msgpack.packb((of.session, of.model, of.fingerprint, of.epoch, of.at, pack_all(of.state)))
    head = MAGIC + VERSION.to_bytes(2, "little")
    return b"".join((head, _digest(head, body), body))


def decode_checkpoint(data: bytes, session: str) -> Checkpoint:
    """The checkpoint; its arrays are read-only views into `data`. Raises StateLost unless it is a whole one."""
    if len(data) < _AT_BODY:
        raise _unusable(session, f"is truncated: it has {len(data)} bytes, the shortest has more than {_AT_BODY}")
    if data[:_AT_VERSION] != MAGIC:
        raise _unusable(session, f"is no checkpoint: it begins with {data[:_AT_VERSION]!r}, expected {MAGIC!r}")
    version = int.from_bytes(data[_AT_VERSION:_AT_DIGEST], "little")
    if version != VERSION:
        raise _unusable(session, f"is of format {version}, this version of Lockstep reads {VERSION}")
    if data[_AT_DIGEST:_AT_BODY] != _digest(data[:_AT_DIGEST], data[_AT_BODY:]):
        raise _unusable(session, f"is damaged or truncated: its {len(data)} bytes do not have the digest they name")
    name, model, fingerprint, epoch, at, state = msgpack.unpackb(data[_AT_BODY:])
    if name != session:
        raise _unusable(session, f"is one of session {name!r}")
    return Checkpoint(name, model, fingerprint, epoch, at, unpack_all(state))


def _digest(head: bytes, body: bytes) -> bytes:
    found = hashlib.blake2b(head, digest_size=_AT_BODY - _AT_DIGEST)
    found.update(body)
    return found.digest()


def _unusable(session: str, why: str) -> StateLost:
    return StateLost(f"what is kept of session {session!r} {why}: open a new session")
