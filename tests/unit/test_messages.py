"""Calls over TCP between processes of the cluster."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serve_app.deployments import messages
from serve_app.deployments.messages import HEADER, MAX_TOKEN_BYTES, TOKEN, CallChannel, CallServer, Codec
from serve_app.errors import LockstepError, Overloaded, from_wire
from serve_app.wire import Parts

pytestmark = pytest.mark.asyncio


def encode_reply(reply: bytes | LockstepError) -> Parts:
    return [b"!", reply.to_wire()["message"].encode()] if isinstance(reply, LockstepError) else [b".", reply]


def decode_reply(data: memoryview) -> bytes | LockstepError:
    if data[:1] == b"!":
        return from_wire({"code": "overloaded", "message": bytes(data[1:]).decode()})
    return bytes(data[1:])


CODEC: Codec[bytes, bytes] = Codec(lambda data: [data], bytes, encode_reply, decode_reply)


async def shuffled(question: bytes) -> bytes:
    await asyncio.sleep(random.random() / 100)
    return question[::-1]


@asynccontextmanager
async def answering(answer: object = shuffled) -> AsyncIterator[tuple[CallServer[bytes, bytes], str]]:
    server = CallServer(CODEC, answer)  # type: ignore[arg-type]
    address = await server.start("127.0.0.1")
    yield server, address
    await server.stop()


async def test_each_call_gets_its_own_answer_whatever_their_sizes_and_order() -> None:
    rng = random.Random(0)
    async with answering() as (_, address):
        channel = CallChannel(CODEC, address)
        asked = [rng.randbytes(rng.choice([0, 1, 17, 4096, messages.BUFFER_BYTES, 3_000_000])) for _ in range(40)]
        assert await asyncio.gather(*map(channel.call, asked)) == [question[::-1] for question in asked]
        await channel.close()
        assert channel.is_lost


async def test_what_the_other_side_raises_is_raised_here() -> None:
    async def full(question: bytes) -> bytes:
        raise Overloaded("no room")

    async with answering(full) as (_, address):
        channel = CallChannel(CODEC, address)
        with pytest.raises(Overloaded, match="no room"):
            await channel.call(b"")
        assert not channel.is_lost
        await channel.close()


async def test_a_call_fails_when_the_other_side_goes_and_the_next_ones_at_once() -> None:
    asked = asyncio.Event()

    async def never(question: bytes) -> bytes:
        asked.set()
        return await asyncio.Future()

    server = CallServer(CODEC, never)
    channel = CallChannel(CODEC, await server.start("127.0.0.1"))
    call = asyncio.create_task(channel.call(b"x"))
    await asked.wait()
    await server.stop()
    with pytest.raises(ConnectionError):
        await call
    with pytest.raises(ConnectionError):
        await channel.call(b"y")
    assert channel.is_lost
    await channel.close()


async def test_the_last_answer_arrives_whole_when_the_server_stops() -> None:
    """It has the states of all sessions, which is more than sockets take at once."""
    stopping = asyncio.Event()

    async def last(question: bytes) -> bytes:
        await stopping.wait()
        return bytes(64 * 2**20)

    async with answering(last) as (server, address):
        channel = CallChannel(CODEC, address)
        call = asyncio.create_task(channel.call(b"x"))
        while not any(caller.calls for caller in server._callers):
            await asyncio.sleep(0.01)
        stopping.set()
        stopped = asyncio.create_task(server.stop())
        await asyncio.sleep(0.01)
        more = [asyncio.create_task(channel.call(bytes(2**20))) for _ in range(8)]
        await stopped
        assert len(await call) == 64 * 2**20
        assert all(isinstance(each, ConnectionError) for each in await asyncio.gather(*more, return_exceptions=True))
        await channel.close()


async def test_a_channel_that_was_closed_connects_no_more() -> None:
    async with answering() as (server, address):
        channel = CallChannel(CODEC, address)
        assert not channel.is_lost
        await channel.close()
        with pytest.raises(ConnectionError, match="closed here"):
            await channel.call(b"x")
        assert channel.is_lost and not server._callers


async def test_nobody_listens() -> None:
    async with answering() as (_, address):
        pass
    channel = CallChannel(CODEC, address)
    with pytest.raises(OSError, match="onnect"):
        await channel.call(b"")
    assert channel.is_lost
    await channel.close()
    assert not await messages.is_listening(address)


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(TOKEN, 5) + b"wrong",
        HEADER.pack(TOKEN + 1, 5) + b"right",
        HEADER.pack(TOKEN, MAX_TOKEN_BYTES + 1),
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
async def test_who_does_not_begin_with_the_token_is_not_listened_to(
    monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(messages, "_is_token", lambda said: said == "right")
    answered = []

    async def answer(question: bytes) -> bytes:
        answered.append(question)
        return question

    async with answering(answer) as (_, address):
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        writer.write(sent + HEADER.pack(1, 4) + b"evil")
        assert await reader.read() == b""
        writer.close()
    assert not answered
