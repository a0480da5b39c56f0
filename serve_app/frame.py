"""What travels between a sender (ingress or handle client) and an owner (replica): columns, not objects.

A call carries one Frame to the owner and one Answer back. A session is named by its epoch: the directory gives every
grant a number of its own, so the number says session, owner and whether the grant still holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NO_CLOSE = -1
"""`close` of a session that stays open."""
ABORT = -2
"""`close` of a session that ends at once, whatever is pending."""
MOVE = -3
"""`close` of a session that its owner is to give back to its sender, with its state, to go on elsewhere."""
ADOPTED = "taken over"
"""Why a session has ended for a sender: another goes on with it."""
UNKNOWN = -1
"""`acked` of a session of which nobody knows what its client has."""


@dataclass(frozen=True, slots=True)
class Open:
    """Take a session in. `initial_state`: the state's tensors in the order of the model's, None for the model's own.

    start: the first timestep that it brings; what was before ran elsewhere, and left that state. adopts: the epoch of a
    session that is here, or -1; it goes on under the new epoch with another sender. rewind: its failed steps before
    that. acked: its client has the outputs below; the sender has those from there to `start`. UNKNOWN, of one that is
    adopted: those that were acknowledged.
    """

    epoch: int
    session: str
    initial_state: tuple[np.ndarray, ...] | None = None
    start: int = 0
    adopts: int = -1
    rewind: int = 0
    acked: int = 0


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about one session that is not an output: opened, refused, failed, ended, or moving (elsewhere).

    Or that its state, which was asked for, is the model's own (fresh). `progress` of one that was adopted: the
    timesteps accepted, after `rewind` failed steps; `acked`: its outputs come from there on.
    """

    epoch: int
    kind: str
    error: Mapping[str, Any] | None = None
    reason: str = ""
    progress: int = 0
    rewind: int = 0
    acked: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """States of sessions `epoch` [n] after their first `at` [n] timesteps; tensors are [n, *shape for a batch of 1]."""

    epoch: np.ndarray
    at: np.ndarray
    state: tuple[np.ndarray, ...]


COLUMNS = ("length", "epoch", "start", "rewind", "close", "acked")
"""Of a frame, in the order in which it has them."""


def _column(index: int) -> property:
    def get(frame: "Frame") -> np.ndarray:
        column: np.ndarray = frame.columns[index]
        return column

    return property(get)


@dataclass(frozen=True, slots=True)
class Frame:
    """Entries of many sessions for one owner, at most one a session: `columns` int64 [6, n], a row for each of COLUMNS.

    `x` is [sum(length), *features].
    `start`, `length`: the timesteps that entry brings; length 0 brings none and asks for outputs again from `start` on.
    `acked`: the sender holds the outputs below. `rewind`: failed steps of the session that the sender knows of.
    `close`: close when everything below this timestep has been accepted, or NO_CLOSE, ABORT or MOVE.
    `exports`: epochs of sessions whose states the sender wants now, however long the last has been sent ago.
    """

    owner: str
    sender: str
    columns: np.ndarray
    x: np.ndarray
    opens: Sequence[Open] = ()
    exports: Sequence[int] = ()

    @staticmethod
    def of(
        owner: str,
        sender: str,
        *,
        epoch: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        acked: np.ndarray,
        rewind: np.ndarray,
        close: np.ndarray,
        x: np.ndarray,
        opens: Sequence[Open] = (),
    ) -> "Frame":
        """A frame of columns [n]."""
        return Frame(owner, sender, np.stack([length, epoch, start, rewind, close, acked]), x, opens)

    length, epoch, start, rewind, close, acked = map(_column, range(len(COLUMNS)))

    def __len__(self) -> int:
        return int(self.columns.shape[1])


@dataclass(frozen=True, slots=True)
class Answer:
    """What an owner has for one sender; columns are [n], each of `outputs` is [sum(length), *shape].

    Entry i brings the outputs of timesteps start[i] … start[i] + length[i] of session epoch[i], whose inputs below
    `next` are accepted after `rewind` failed steps. Notices come after the outputs. `timing` [3, n]: us that those
    timesteps waited for their steps, us that these took, and the sessions of the last of them. `checkpoints` are of
    sessions all of whose outputs up to there have been sent by then.
    """

    epoch: np.ndarray
    next: np.ndarray
    rewind: np.ndarray
    start: np.ndarray
    length: np.ndarray
    outputs: Mapping[str, np.ndarray]
    notices: Sequence[Notice]
    timing: np.ndarray
    checkpoints: Checkpoints | None = None
