"""Brings checkpoints of a sender's sessions to the directory, beside everything else."""

import asyncio
import contextvars
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from serve_app.checkpoint import Checkpoint, encode_checkpoint
from serve_app.directory import Held, Slab
from serve_app.errors import LockstepError, NotOwner, Overloaded
from serve_app.session import Session, State

logger = logging.getLogger(__name__)

MAX_SLAB_BYTES = 8 * 2**20
"""States of one call; it holds one more when that is larger."""
RETRY_DELAY_S = 1.0


class Keeping(Protocol):
    """The part of the directory that keeps checkpoints."""

    async def keep(self, sender: str, slab: Slab) -> dict[str, LockstepError]:
        """Keep checkpoints; of which sessions none was, and why."""
        ...


class Due(NamedTuple):
    """A state of a session, to be kept."""

    session: Session
    at: int
    state: State


class Keeper:
    """One call at a time; what has come meanwhile goes with the next, of each session the latest only.

    `superseded` hears of each session that another sender has gone on with since the epoch that it is told.
    """

    def __init__(self, directory: Keeping, sender: str, superseded: Callable[[Session, int], None]) -> None:
        self._directory = directory
        self._sender = sender
        self._superseded = superseded
        self._pending: dict[str, Due] = {}
        self._task: asyncio.Task[None] | None = None

    def keep(self, session: Session, at: int, state: State) -> None:
        """See session.Keep."""
        self._pending[session.name] = Due(session, at, state)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    async def stop(self) -> None:
        """Keep nothing any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while slab := self._next_slab():
            held = {name: Held(due.session.epoch, due.session.owner) for name, due in slab.items()}
            try:
                encoded = await asyncio.to_thread(_encode, slab, held)
                refused = await self._directory.keep(self._sender, encoded)
            except Exception as error:  # the directory starts again, its store does not answer, …
                logger.warning("checkpoints of %d sessions are not kept, trying again: %s", len(slab), error)
                self._pending = {**slab, **self._pending}
                await asyncio.sleep(RETRY_DELAY_S)
            else:
                self._settle(slab, held, refused)
        self._task = None

    def _next_slab(self) -> dict[str, Due]:
        slab: dict[str, Due] = {}
        nbytes = 0
        while self._pending and nbytes < MAX_SLAB_BYTES:
            name = next(iter(self._pending))
            due = self._pending.pop(name)
            if due.session.end_reason is None:
                slab[name] = due
                nbytes += sum(array.nbytes for array in due.state or ())
        return slab

    def _settle(self, slab: Mapping[str, Due], held: Mapping[str, Held], refused: Mapping[str, LockstepError]) -> None:
        for name, due in slab.items():
            error = refused.get(name)
            if error is None:
                due.session.kept = max(due.session.kept or 0, due.at)
            elif isinstance(error, NotOwner):
                self._superseded(due.session, held[name].epoch)
        full = [error for error in refused.values() if isinstance(error, Overloaded)]
        if full:
            logger.warning("checkpoints of %d sessions are not kept: %s", len(full), full[0])


def _encode(slab: Mapping[str, Due], held: Mapping[str, Held]) -> Slab:
    encoded = {}
    for name, (session, at, state) in slab.items():
        spec, epoch = session.spec, held[name].epoch
        checkpoint = Checkpoint(name, spec.name, spec.fingerprint, epoch, at, state)
        encoded[name] = held[name], encode_checkpoint(checkpoint)
    return encoded
