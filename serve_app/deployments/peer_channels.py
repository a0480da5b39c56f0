"""What ingresses ask each other (see ingress.peers), as calls over TCP. Both ends are of one application: pickled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from serve_app.deployments.messages import CALLER_LOST, PICKLED, CallChannel, CallServer, Codec
from serve_app.ingress.peers import Asked, NotReached

QUESTIONS: Codec[Asked, Any] = PICKLED


def peer_server(answer: Callable[[Asked, asyncio.Event], Awaitable[Any]]) -> CallServer[Asked, Any]:
    """The port of one ingress; `answer` is what takes the questions (see Peers.answer)."""
    return CallServer(QUESTIONS, lambda asked: answer(asked, CALLER_LOST.get()))


class PeerChannels:
    """See ingress.peers.Calls: a connection to each ingress that was asked, by address."""

    def __init__(self) -> None:
        self._channels: dict[str, CallChannel[Asked, Any]] = {}

    async def call(self, address: str, asked: Asked) -> Any:
        """See Calls."""
        channel = self._channels.get(address)
        if channel is None or channel.is_lost:
            channel = self._channels[address] = CallChannel(QUESTIONS, address)
        try:
            await channel.connect()
        except OSError as error:
            if self._channels.get(address) is channel:
                del self._channels[address]
            raise NotReached(address) from error
        return await channel.call(asked)

    async def stop(self) -> None:
        """Ask nothing any more."""
        for channel in self._channels.values():
            await channel.close()
