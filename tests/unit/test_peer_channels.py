"""Questions of one ingress to another, over TCP."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve_app.deployments import peer_channels
from serve_app.deployments.peer_channels import PeerChannels, peer_server
from serve_app.ingress.hub import Hub
from serve_app.ingress.peers import Asked, NotReached, Peers

pytestmark = pytest.mark.asyncio


async def test_an_ingress_that_stands_still_is_given_up_and_one_that_takes_its_time_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_channels, "SILENT_S", 0.05)
    monkeypatch.setattr(peer_channels, "ALIVE_WITHIN_S", 0.2)
    stands_still = False

    async def next_of(number: int, asker_lost: asyncio.Event) -> int:
        await asyncio.sleep(0.4)
        return number + 1

    async def answer(asked: Asked, asker_lost: asyncio.Event) -> Any:
        if stands_still:
            await asyncio.Event().wait()
        return await peers.answer(asked, asker_lost)

    peers = Peers(cast(Hub, SimpleNamespace(sender="it")))
    peers.on(int, next_of)
    server, channels = peer_server(answer), PeerChannels()
    address = await server.start("127.0.0.1")
    assert await channels.call(address, Asked("it", "session", 1)) == 2
    stands_still = True
    with pytest.raises(TimeoutError):
        await channels.call(address, Asked("it", "session", 1))
    await channels.stop()
    await server.stop()
    with pytest.raises(NotReached):
        await PeerChannels().call(address, Asked("it", "session", 1))
