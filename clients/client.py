"""The way to a Lockstep application: `connect` gives a client, the client opens sessions."""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from clients.session import Session
from serve_app.directory import Turn
from serve_app.session import Session as Line
from serve_app.spec import ModelSpec


class Transport(Protocol):
    """How a client reaches the application."""

    async def open(
        self,
        session: str | None,
        model: str | None,
        initial_state: Sequence[np.ndarray] | None,
        checkpoint: bytes | None,
        turn: Turn,
    ) -> Line:
        """Open a session there."""
        ...

    async def models(self) -> dict[str, ModelSpec]:
        """The models that are served, by name."""
        ...

    async def stop(self) -> None:
        """Give up whatever is open."""
        ...


class Client:
    """Opens sessions. An asynchronous context manager: what is still open at its end is given up."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def open(
        self,
        session: str | None = None,
        model: str | None = None,
        initial_state: Sequence[np.ndarray] | None = None,
        *,
        checkpoint: bytes | None = None,
        priority: int = 0,
        max_wait_s: float = math.inf,
    ) -> Session:
        """Open a session: its id (None: a new one), the model (None: the only one), and a state to start from.

        initial_state: the tensors of the model's state, in its order and shaped as for a batch of 1. checkpoint: what
        `Session.export` gave; the session goes on from it, its first timestep is the one after those it has. Where all
        replicas are full it waits, if the application lets sessions wait, `max_wait_s` at most; those of the highest
        `priority`, 1, go first (0: the application's default). Raises SessionExists, UnknownModel, TooManySessions,
        TimedOut (it has waited too long), InvalidInput, Unavailable, StateLost (a checkpoint that is damaged, or of
        other options, weights or dtypes than those served).
        """
        turn = Turn(priority, max_wait_s)
        return Session(await self._transport.open(session, model, initial_state, checkpoint, turn))

    async def models(self) -> dict[str, ModelSpec]:
        """The models that are served, by name."""
        return await self._transport.models()

    async def stop(self) -> None:
        """Give up whatever is still open."""
        await self._transport.stop()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def connect(target: Any, *, resume_within_s: float | None = None) -> Client:
    """A client for `target`.

    A Serve handle of the application, or its name: frames go straight to the owners; Ray has to be connected.
    `ws://host:port` (or wss): one WebSocket a session; nothing of Ray is needed. A session whose connection is gone is
    tried to be resumed for `resume_within_s` (None: 30): more, where it has to outlive a cluster that starts again.
    Several such addresses, `ws://a:8000,ws://b:8000`: sessions are spread over them, and go on by another when theirs
    is gone.
    `grpc://host:port`: one stream of the Open Inference Protocol for all sessions, without initial states; they end
    with it.
    """
    if isinstance(target, str) and target.startswith("grpc://"):
        from clients.open_inference import OpenInferenceTransport

        return Client(OpenInferenceTransport(target))
    if isinstance(target, str) and target.startswith(("ws://", "wss://")):
        from clients.websocket import WebSocketTransport

        return Client(WebSocketTransport(target, resume_within_s))
    from clients.handle import HandleTransport

    return Client(HandleTransport(target if isinstance(target, str) else target.app_name))
