"""What ingresses ask each other (see ingress.peers), as calls over TCP. Both ends are of one application: pickled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from serve_app.deployments.messages import CALLER_LOST, PICKLED, CallChannel, CallServer, Codec
from serve_app.ingress.peers import AreYouThere, Asked, NotReached

SILENT_S = ALIVE_WITHIN_S = 1.0
"""After so long without an answer it is asked whether anybody is there; when that has to be answered."""
QUESTIONS: Codec[Asked, Any] = PICKLED


def peer_server(answer: Callable[[Asked, asyncio.Event], Awaitable[Any]]) -> CallServer[Asked, Any]:
    """The port of one ingress; `answer` is what takes the questions (see Peers.answer)."""
    return CallServer(QUESTIONS, lambda asked: answer(asked, CALLER_LOST.get()))


class PeerChannels:
    """See ingress.peers.Calls: a connection to each ingress that was asked, by address."""

    def __init__(self) -> None:
        self._channels: dict[str, CallChannel[Asked, Any]] = {}

    async def call(self, address: str, asked: Asked) -> Any:
        """See Calls. An ingress that stands still has its connections, and says nothing: TimeoutError.

        One that says that it is there may take as long as it likes.
        """
        channel = self._channels.get(address)
        if channel is None or channel.is_lost:
            self._channels = {at: each for at, each in self._channels.items() if not each.is_lost}
            channel = self._channels[address] = CallChannel(QUESTIONS, address, answer_within_s=None)
        try:
            await channel.connect()
        except OSError as error:
            if self._channels.get(address) is channel:
                del self._channels[address]
            raise NotReached(address) from error
        asking = asyncio.ensure_future(channel.call(asked))
        try:
            while not (await asyncio.wait([asking], timeout=SILENT_S))[0]:
                async with asyncio.timeout(ALIVE_WITHIN_S):
                    await channel.call(asked._replace(question=AreYouThere()))
            return asking.result()
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def stop(self) -> None:
        """Ask nothing any more."""
        for channel in self._channels.values():
            await channel.close()
