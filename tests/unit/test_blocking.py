"""The client without an event loop, of a system in this process; and over no connection at all."""

import asyncio
import threading

import numpy as np
import pytest

from clients import blocking
from clients.blocking import BlockingClient
from serve_app.errors import InvalidInput, Unavailable
from tests.unit.test_websocket import system

pytestmark = pytest.mark.timeout(30)


class Stub:
    """Stands in for a Client that cannot be stopped."""

    async def stop(self) -> None:
        raise Unavailable("nobody is there")


def num_threads() -> int:
    return sum(thread.name == "lockstep-client" for thread in threading.enumerate())


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "connect", lambda target: Stub())


@pytest.mark.asyncio
async def test_a_read_that_timed_out_takes_no_outputs() -> None:
    def use(address: str) -> None:
        with BlockingClient(address) as client, client.open() as session:
            client._timeout_s = 0.01
            with pytest.raises(TimeoutError):
                next(session.outputs())
            client._timeout_s = None
            session.submit(np.ones((3, 2), np.int64))
            session.wait()
            outputs = session.read()
            assert outputs is not None and outputs.values["total"].tolist() == [[1, 1], [2, 2], [3, 3]]

    async with system() as sut:
        await asyncio.to_thread(use, sut.address)


@pytest.mark.usefixtures("stub")
def test_what_is_done_as_the_time_is_up_is_not_lost() -> None:
    async def late() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "done"
        raise AssertionError

    client = BlockingClient("anywhere", timeout_s=0.01)
    assert client.run(late()) == "done"
    with pytest.raises(Unavailable):
        client.stop()


@pytest.mark.usefixtures("stub")
def test_a_client_that_cannot_be_stopped_leaves_no_thread() -> None:
    client = BlockingClient("anywhere")
    assert num_threads() == 1
    with pytest.raises(Unavailable):
        client.stop()
    assert num_threads() == 0


def test_a_client_that_cannot_connect_leaves_no_thread() -> None:
    with pytest.raises(InvalidInput):
        BlockingClient("grpc://")
    assert num_threads() == 0
