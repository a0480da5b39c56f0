"""Questions of one ingress to another, over TCP."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serve_app.deployments import peer_channels
from serve_app.deployments.messages import ANSWER_WITHIN_S
from serve_app.deployments.peer_channels import PeerChannels, peer_server
from serve_app.ingress.hub import Hub
from serve_app.ingress.peers import AreYouThere, Asked, NotReached, Peers

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


async def test_an_ingress_that_says_that_it_is_there_may_take_as_long_as_it_likes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peer_channels, "SILENT_S", ANSWER_WITHIN_S / 2)
    monkeypatch.setattr(peer_channels, "ALIVE_WITHIN_S", ANSWER_WITHIN_S / 2)
    loop, is_there = asyncio.get_running_loop(), asyncio.Event()
    time = loop.time

    async def answer(asked: Asked, asker_lost: asyncio.Event) -> Any:
        if isinstance(asked.question, AreYouThere):
            is_there.set()
            return None
        monkeypatch.setattr(loop, "time", lambda: time() + ANSWER_WITHIN_S)
        await is_there.wait()
        return "at last"

    server, channels = peer_server(answer), PeerChannels()
    address = await server.start("127.0.0.1")
    assert await channels.call(address, Asked("it", "session", 1)) == "at last"
    await channels.stop()
    await server.stop()


async def test_connections_to_ingresses_that_are_gone_are_let_go() -> None:
    async def answer(asked: Asked, asker_lost: asyncio.Event) -> Any:
        return asked.question

    servers, channels = [peer_server(answer) for _ in range(3)], PeerChannels()
    gone, stays, new = [await server.start("127.0.0.1") for server in servers]
    for address in (gone, stays):
        assert await channels.call(address, Asked("it", "session", 1)) == 1
    lost, kept = channels._channels[gone], channels._channels[stays]
    await servers[0].stop()
    await (await lost._connected()).lost.wait()
    assert await channels.call(new, Asked("it", "session", 1)) == 1
    assert channels._channels.keys() == {stays, new} and channels._channels[stays] is kept
    await channels.stop()
    for server in servers[1:]:
        await server.stop()
