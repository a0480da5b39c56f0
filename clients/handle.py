"""Sessions over Serve, from a process that is connected to Ray: an outbox of its own, frames straight to the owners."""

from collections.abc import Sequence

import numpy as np

from serve_app.deployments.transport import RayDirectory
from serve_app.directory import Turn
from serve_app.ingress.hub import Hub
from serve_app.session import Session
from serve_app.spec import ModelSpec


class HandleTransport:
    """See client.Transport. `app` is the Serve application's name."""

    def __init__(self, app: str) -> None:
        self._directory = RayDirectory(app)
        self._hub = Hub(self._directory, ack_on_receipt=True)

    async def open(
        self,
        session: str | None,
        model: str | None,
        initial_state: Sequence[np.ndarray] | None,
        checkpoint: bytes | None,
        turn: Turn,
    ) -> Session:
        """See Transport."""
        return await self._hub.open(session, model, initial_state, checkpoint=checkpoint, turn=turn)

    async def models(self) -> dict[str, ModelSpec]:
        """See Transport."""
        return await self._hub.models()

    async def stop(self) -> None:
        """See Transport."""
        await self._hub.stop()
        await self._directory.close()
