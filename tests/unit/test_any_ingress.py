"""Sequences and HTTP sessions over several ingresses, which die: no Ray, and what one asks another is a call."""

import asyncio
import pickle
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig, SessionConfig
from serve_app.errors import (
    InvalidInput,
    LockstepError,
    NotOwner,
    SessionExists,
    StartMismatch,
    StateLost,
)
from serve_app.ingress import sequences
from serve_app.ingress.http import build_http
from serve_app.ingress.hub import Hub
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.peers import Asked, NotReached, Peers, sender_at
from serve_app.ingress.sequences import Request, Result, SequenceId
from tests.fakes import FloatSumModel
from tests.local import LocalCluster, Mortal

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(
    model=ModelConfig("sum"),
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(max_sessions=64, max_segment_timesteps=64, max_window_timesteps=256),
    frame=FrameConfig(answer_within_s=0.05),
)
TOLD_S = 0.2
"""Then an owner knows that an answer has been sent."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequences, "SENT_BY_ANOTHER_AFTER_S", sequences.SENT_AFTER_S)


class Died(Exception):
    """The ingress, with the connection that was to bring the answer."""


class Directory(Mortal):
    """As one ingress sees it; counts what it is asked."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__(cluster)
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.asked[name] += 1
        return super().__getattr__(name)


class Ingress:
    """One at an address, as its clients see it."""

    def __init__(self, cluster: LocalCluster, address: str, listening: dict[str, "Ingress"]) -> None:
        self.directory, self.died = Directory(cluster), asyncio.Event()
        self.listening = listening
        self.hub = Hub(self.directory, ack_on_receipt=False, sender=sender_at(address))
        self.peers = Peers(self.hub, self)
        self.inference = InferenceServer(self.hub, peers=self.peers)
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(build_http(self.hub, self.inference)), base_url="http://test"
        )
        listening[address] = self

    def kill(self) -> None:
        self.directory.dead = True
        self.died.set()

    async def until_death(self, work: Any, error: Exception) -> Any:
        """What comes of work that is done here, unless this dies first."""
        working, dying = asyncio.ensure_future(work), asyncio.ensure_future(self.died.wait())
        try:
            await asyncio.wait((working, dying), return_when=asyncio.FIRST_COMPLETED)
            if not self.died.is_set():
                return working.result()
            raise error
        finally:
            dying.cancel()
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def call(self, address: str, asked: Asked) -> Any:
        """See peers.Calls."""
        other = self.listening[address]
        if other.died.is_set() or self.died.is_set():
            raise NotReached(address)
        asked = pickle.loads(pickle.dumps(asked))
        reply = await other.until_death(other.peers.answer(asked, self.died), ConnectionError())
        return pickle.loads(pickle.dumps(reply))

    async def infer(
        self,
        sequence: SequenceId,
        values: Any,
        *,
        start: bool = False,
        end: bool = False,
        client: str | None = None,
        timestep: int | None = None,
    ) -> list[float]:
        """A single request, and its outputs. Raises Died."""
        x = np.array(list(values), np.float32).reshape(-1, 1)
        request = Request("sum", sequence, start, end, x, timestep=timestep)
        return totals(await self.until_death(self.inference.space(client).run(request), Died()))

    def on_stream(self, stream: object, sequence: SequenceId, values: Any, **more: Any) -> asyncio.Future[Any]:
        """A request on a stream of the client `me`; what comes of it."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        x = np.array(list(values), np.float32).reshape(-1, 1)
        request = Request("sum", sequence, more.pop("start", False), more.pop("end", False), x, **more)
        self.inference.space("me").ask(request, done.set_result, stream)
        return done


async def die_meanwhile(cluster: LocalCluster, one: Ingress, values: list[int], ran: int, **more: bool) -> None:
    """It dies while a request runs, with which `ran` timesteps have: nobody hears the answer."""
    await asyncio.sleep(TOLD_S)
    cluster.delay_s = lambda: 0.05
    lost = asyncio.create_task(one.infer(7, values, **more))
    await asyncio.sleep(0.02)
    one.kill()
    with pytest.raises(Died):
        await lost
    while cluster.engines["owner-0"].stats.timesteps < ran:
        await asyncio.sleep(0.005)


def totals(result: Result) -> list[float]:
    return [float(value) for value in result.values["total"][:, 0]]


@asynccontextmanager
async def ingresses(count: int = 2, config: AppConfig = CONFIG, owners: int = 1) -> AsyncIterator[list[Any]]:
    """The cluster, and so many ingresses."""
    cluster = LocalCluster([FloatSumModel() for _ in range(owners)], config)
    await cluster.start_directory()
    listening: dict[str, Ingress] = {}
    some = [Ingress(cluster, f"10.0.0.{i}:1", listening) for i in range(count)]
    try:
        yield [cluster, *some]
    finally:
        for ingress in list(listening.values()):
            await ingress.hub.stop()
        await cluster.stop()
    for engine in cluster.engines.values():
        engine.check()


async def expect(kind: type[LockstepError], work: Any) -> LockstepError:
    with pytest.raises(kind) as raised:
        await work
    assert type(raised.value) is kind
    return raised.value


@pytest.mark.parametrize("client", [None, "me"])
async def test_requests_of_a_sequence_come_in_through_any_ingress(client: str | None) -> None:
    async with ingresses(3) as (_, *some):
        assert await some[0].infer(7, [1], start=True, client=client) == [1]
        for i in range(1, 30):
            assert await some[i % 3].infer(7, [i], client=client) == [sum(range(i + 1)) + 1]
        assert [ingress.directory.asked["describe"] for ingress in some] == [0, 1, 1]  # not once a request
        assert await some[1].infer(7, [], end=True, client=client) == []
        for ingress in some:
            assert "START flag" in str(await expect(InvalidInput, ingress.infer(7, [1], client=client)))
        for ingress in some:
            assert await ingress.infer(7, [5], start=True, end=True, client=client) == [5]


async def test_a_number_and_a_text_are_two_sequences() -> None:
    async with ingresses() as (_, one, two):
        assert await one.infer(7, [1], start=True) == [1]
        assert await two.infer("7", [2], start=True) == [2]
        assert await two.infer(7, [1]) == [2]
        assert await one.infer("7", [1]) == [3]


async def test_what_starts_at_another_ingress() -> None:
    """In the space that all share it is a conflict, as at the same one; a client with a name begins again."""
    async with ingresses() as (cluster, one, two):
        await one.infer(7, [1], start=True)
        assert "open already" in str(await expect(SessionExists, two.infer(7, [9], start=True)))
        assert await two.infer(7, [1]) == [2]
        await one.infer(7, [1], start=True, client="me")
        assert await two.infer(7, [9], start=True, client="me") == [9]
        assert await one.infer(7, [1], client="me") == [10]
        assert await two.infer(7, [1]) == [3]
        await asyncio.sleep(TOLD_S)
        assert cluster.engines["owner-0"].gauges()["sessions_open"] == 2


async def test_a_sequence_whose_answers_have_been_sent_goes_on_when_its_ingress_dies() -> None:
    async with ingresses(3) as (_, one, two, three):
        await one.infer(7, [1, 2], start=True)
        assert await two.infer(7, [3]) == [6]
        await asyncio.sleep(TOLD_S)
        one.kill()
        assert await two.infer(7, [4]) == [10]
        assert await three.infer(7, [5]) == [15]
        assert "open already" in str(await expect(SessionExists, three.infer(7, [9], start=True)))
        assert await three.infer(7, [6], end=True) == [21]


async def test_an_answer_that_may_be_lost_is_had_again_and_nothing_runs_twice() -> None:
    async with ingresses() as (cluster, one, two):
        await one.infer(7, [1, 2], start=True)
        await die_meanwhile(cluster, one, [3, 4], ran=4)
        error = await expect(StartMismatch, two.infer(7, [3, 4]))
        assert error.details == {"expected": 2}
        assert "resend from timestep 2" in str(error)
        assert await two.infer(7, [3]) == [6]
        assert await two.infer(7, [4, 5]) == [10, 15]  # one of these has run
        assert await two.infer(7, [6], end=True) == [21]
        assert cluster.engines["owner-0"].stats.timesteps == 6


async def test_a_request_on_its_way_to_an_ingress_that_dies_is_told_so_once() -> None:
    async with ingresses() as (cluster, one, two):
        await one.infer(7, [1, 2], start=True)
        await two.infer(7, [3])
        cluster.delay_s = lambda: 0.05
        asking = asyncio.create_task(two.infer(7, [4]))
        await asyncio.sleep(0.01)
        one.kill()
        error = await expect(StartMismatch, asking)
        start = error.details["expected"]
        assert await two.infer(7, [1, 2, 3, 4, 5][start:], end=True) == [1, 3, 6, 10, 15][start:]
        assert cluster.engines["owner-0"].stats.timesteps == 5


@pytest.mark.parametrize("client", [None, "me"])
@pytest.mark.parametrize("is_known", [False, True])
async def test_a_client_that_starts_again_after_a_break_is_not_held_up_by_what_is_left(
    client: str | None, is_known: bool
) -> None:
    """is_known: it has heard of the break before."""
    async with ingresses() as (cluster, one, two):
        await one.infer(7, [1, 2], start=True, client=client)
        one.kill()
        if is_known:
            await expect(StartMismatch, two.infer(7, [3], client=client))
        assert await two.infer(7, [5], start=True, client=client) == [5]
        assert await two.infer(7, [5], client=client) == [10]
        await asyncio.sleep(TOLD_S)
        assert cluster.engines["owner-0"].gauges()["sessions_open"] == 1


async def test_the_last_request_may_be_lost_too() -> None:
    async with ingresses() as (cluster, one, two):
        await one.infer(7, [1], start=True)
        await die_meanwhile(cluster, one, [2], ran=2, end=True)
        assert (await expect(StartMismatch, two.infer(7, [2], end=True))).details == {"expected": 1}
        assert await two.infer(7, [2], end=True) == [3]
        await asyncio.sleep(TOLD_S)
        assert cluster.engines["owner-0"].gauges()["sessions_open"] == 0


async def test_a_client_that_counts_is_never_in_doubt() -> None:
    """It resends what was not answered, where it began: nothing else is needed."""
    async with ingresses() as (cluster, one, two):
        await one.infer(7, [1, 2], start=True)
        await one.infer(7, [3], timestep=2)
        one.kill()
        assert await two.infer(7, [3], timestep=2) == [6]
        assert await two.infer(7, [3], timestep=2) == [6]
        assert await two.infer(7, [3, 4], timestep=2) == [6, 10]
        assert "a segment of session" in str(await expect(StartMismatch, two.infer(7, [9], timestep=9)))
        await asyncio.sleep(TOLD_S)
        assert await two.infer(7, [3, 4], timestep=2) == [6, 10], "it has not said that it has them"
        assert await two.infer(7, [5], timestep=4) == [15]
        error = await expect(StartMismatch, two.infer(7, [3], timestep=2))
        assert "go on from 5" in str(error)
        assert await two.infer(7, [6], timestep=5, end=True) == [21]
        assert cluster.engines["owner-0"].stats.timesteps == 6


async def test_a_client_that_counts_has_its_sequence_back_from_a_stream_that_hangs() -> None:
    async with ingresses() as (cluster, one, two):
        stream = object()
        assert totals(await one.on_stream(stream, 7, [1, 2], start=True, timestep=0)) == [1, 3]
        cluster.delay_s = lambda: 0.05
        lost = one.on_stream(stream, 7, [3], timestep=2)
        for ingress in (one, two, one):
            stream = object()
            assert totals(await ingress.on_stream(stream, 7, [3], timestep=2)) == [6]
        assert lost.done(), "nobody reads it, but nothing is left open"
        assert "in use on another stream" in (await one.on_stream(object(), 7, [4])).message
        assert "in use on another stream" in (await two.on_stream(object(), 7, [4])).message
        assert totals(await two.on_stream(object(), 7, [5], start=True, timestep=0)) == [5]
        assert cluster.engines["owner-0"].stats.timesteps == 4


async def test_a_sequence_is_lost_with_its_ingress_and_its_owner() -> None:
    async with ingresses(owners=2) as (cluster, one, two):
        await one.infer(7, [1, 2], start=True)
        one.kill()
        (owner,) = [name for name, count in cluster.directory.num_sessions().items() if count]
        await cluster.kill(owner)
        await cluster.actor.lost(owner)
        assert "start it again" in str(await expect(StateLost, two.infer(7, [3])))
        assert await two.infer(7, [5], start=True) == [5]


async def test_an_owner_dies_and_the_sequence_is_found_by_any_ingress() -> None:
    async with ingresses(owners=2) as (cluster, one, two):
        await one.infer(7, [1, 2], start=True)
        await two.infer(7, [3])
        (owner,) = [name for name, count in cluster.directory.num_sessions().items() if count]
        await cluster.kill(owner)
        assert await two.infer(7, [4]) == [10]
        assert await one.infer(7, [5], end=True) == [15]


async def test_another_ingress_at_the_address_of_a_dead_one_is_another() -> None:
    async with ingresses() as (cluster, one, two):
        await one.infer(7, [1], start=True)
        await two.infer(7, [1])
        await asyncio.sleep(TOLD_S)
        one.kill()
        next_one = Ingress(cluster, "10.0.0.0:1", two.listening)
        two.listening["left"] = one  # to be stopped
        assert await two.infer(7, [1]) == [3]
        assert await next_one.infer(7, [1]) == [4]


async def test_a_stream_takes_a_sequence_over_and_single_requests_find_it_there() -> None:
    async with ingresses() as (_, one, two):
        stream, other = object(), object()
        await one.infer(7, [1], start=True, client="me")
        asked = [two.on_stream(stream, 7, [n]) for n in (1, 2, 3)]
        assert [totals(await each) for each in asked] == [[2], [4], [7]]
        asks = sum(two.directory.asked.values())
        assert [totals(await two.on_stream(stream, 7, [0])) for _ in range(20)] == [[7]] * 20
        assert sum(two.directory.asked.values()) == asks
        assert "in use on another stream" in str(await expect(SessionExists, one.infer(7, [1], client="me")))
        assert "in use on another stream" in (await one.on_stream(other, 7, [1])).message
        two.inference.space("me").leave(stream)
        assert await one.infer(7, [1], client="me") == [8]
        assert totals(await one.on_stream(other, 7, [1], end=True)) == [9]
        assert "START flag" in (await two.on_stream(stream, 8, [1])).message


@pytest.mark.parametrize("turns", range(1, 12))
async def test_a_stream_that_ends_while_it_takes_a_sequence_over_loses_nothing(turns: int) -> None:
    async with ingresses() as (_, one, two):
        stream = object()
        await one.infer(7, [1], start=True, client="me")
        asked = two.on_stream(stream, 7, [2])
        for _ in range(turns):
            await asyncio.sleep(0)
        two.inference.space("me").leave(stream)
        assert totals(await asked) == [3]
        assert await one.infer(7, [3], client="me") == [6]


async def test_after_a_break_a_stream_has_to_say_where_it_goes_on() -> None:
    """What else was sent before the error was read must not be taken for what is sent again."""
    async with ingresses() as (cluster, one, two):
        assert totals(await one.on_stream(object(), 7, [1, 2], start=True)) == [1, 3]
        one.kill()
        stream = object()
        pending = [two.on_stream(stream, 7, [n]) for n in (3, 4)]
        assert [(await each).details for each in pending] == [{"expected": 0}] * 2
        assert (await two.on_stream(stream, 7, [5])).details == {"expected": 0}
        again = [two.on_stream(stream, 7, [1, 2], timestep=0), two.on_stream(stream, 7, [3])]
        assert [totals(await each) for each in again] == [[1, 3], [6]]
        assert totals(await two.on_stream(stream, 7, [4])) == [10]
        assert cluster.engines["owner-0"].stats.timesteps == 4


@pytest.mark.parametrize("ends", [False, True])
async def test_an_answer_that_is_lost_with_the_ingress_that_asked_for_it_is_had_again(ends: bool) -> None:
    async with ingresses(3) as (cluster, one, two, three):
        await one.infer(7, [1, 2], start=True)
        cluster.delay_s = lambda: 0.05
        asking = asyncio.create_task(two.infer(7, [3], end=ends))
        await asyncio.sleep(0.02)
        two.kill()
        with pytest.raises(Died):
            await asking
        await asyncio.sleep(TOLD_S)
        assert (await expect(StartMismatch, three.infer(7, [3], end=ends))).details == {"expected": 2}
        assert await one.infer(7, [3], end=ends) == [6]
        if not ends:
            assert await three.infer(7, [4]) == [10]
        assert cluster.engines["owner-0"].stats.timesteps == (3 if ends else 4)


async def test_what_is_to_be_resent_is_kept_until_it_is() -> None:
    async with ingresses(3) as (cluster, one, two, three):
        await one.infer(7, [1, 2], start=True)
        await asyncio.sleep(TOLD_S)
        assert await two.infer(7, [3]) == [6]
        two.kill()
        assert (await expect(StartMismatch, three.infer(7, [4]))).details == {"expected": 2}
        await asyncio.sleep(TOLD_S)
        assert await one.infer(7, [3]) == [6]
        assert await three.infer(7, [4], end=True) == [10]
        assert cluster.engines["owner-0"].stats.timesteps == 4


async def test_an_error_that_is_lost_is_told_again() -> None:
    async with ingresses(3) as (cluster, one, two, three):
        await one.infer(7, [1, 2], start=True)
        await asyncio.sleep(TOLD_S)
        cluster.delay_s = lambda: 0.05
        for each in (two, three):  # the answer is lost, and then the error
            asking = asyncio.create_task(each.infer(7, [3]))
            while not any(way is each.died for way in ways_of(one)):
                await asyncio.sleep(0)
            each.kill()
            with pytest.raises(Died):
                await asking
        assert (await expect(StartMismatch, one.infer(7, [3]))).details == {"expected": 2}
        assert await one.infer(7, [3]) == [6]


def ways_of(ingress: Ingress) -> set[asyncio.Event]:
    (sequence,) = ingress.inference.space(None)._sequences.values()
    return sequence._ways


async def test_two_ingresses_that_take_over_at_once() -> None:
    async with ingresses(3) as (_, one, *others):
        await one.infer(7, [1], start=True)
        await asyncio.sleep(TOLD_S)
        one.kill()
        found = await asyncio.gather(*(each.infer(7, [1]) for each in others), return_exceptions=True)
        for each in found:
            assert each in ([2], [3]) or isinstance(each, NotOwner | StartMismatch), each
        while True:
            try:
                last = await others[0].infer(7, [0], timestep=None)
                break
            except (NotOwner, StartMismatch):
                pass
        assert last[0] <= 3
        assert await others[1].infer(7, [0]) == last


async def test_an_ingress_that_stops_leaves_its_sequences_to_the_others() -> None:
    async with ingresses() as (_, one, two):
        await one.infer(7, [1], start=True)
        await asyncio.sleep(TOLD_S)
        await one.hub.stop()
        one.kill()
        assert await two.infer(7, [1], end=True) == [2]


async def test_the_sequences_of_a_stream_without_a_name_cost_the_directory_nothing_more() -> None:
    async with ingresses() as (cluster, one, _):
        space = one.inference.own_space()
        for sequence in range(1, 20):
            x = np.ones((1, 1), np.float32)
            for i in range(3):
                done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                space.ask(Request("sum", sequence, i == 0, i == 2, x), done.set_result, one)
                assert totals(await done) == [i + 1]
        assert one.directory.asked.keys() <= {"open", "open_ahead", "gone"}
        assert one.directory.asked["open"] == 19
        done = asyncio.get_running_loop().create_future()
        space.ask(Request("sum", 99, True, False, x), done.set_result, one)
        await done
        assert not any(described.resumable for described in cluster.directory.sessions("", 100))


async def segment(ingress: Ingress, values: Any, status: int = 202, **more: Any) -> Any:
    body = {"x": [[value] for value in values], **more}
    response = await ingress.http.post("/v1/sessions/a/segments", json=body)
    assert response.status_code == status, response.text
    return response.json()


async def outputs(ingress: Ingress, start: int, status: int = 200) -> Any:
    response = await ingress.http.get("/v1/sessions/a/outputs", params={"start": start, "wait_s": 2})
    assert response.status_code == status, response.text
    return [value for (value,) in response.json()["outputs"]["total"]]


async def test_an_http_session_by_any_ingress() -> None:
    async with ingresses() as (_, one, two):
        assert (await one.http.post("/v1/sessions", json={"session": "a"})).status_code == 201
        assert (await segment(two, [1, 2]))["end"] == 2
        assert await outputs(one, 0) == [1, 3]
        raw = np.array([3], "<f4").tobytes()
        response = await two.http.post(
            "/v1/sessions/a/segments?start=2&acked=2", content=raw, headers={"content-type": "application/octet-stream"}
        )
        assert (response.status_code, response.json()["end"], response.json()["acked"]) == (202, 3, 2)
        assert await outputs(two, 2) == [6]
        assert two.directory.asked["describe"] == 1
        shown = [(await each.http.get("/v1/sessions/a")).json() for each in (one, two)]
        assert shown[0] == shown[1]
        assert shown[0]["next"] == 3
        assert (await segment(two, [1], 409, start=9))["error"]["details"]["expected"] == 3
        assert (await two.http.post("/v1/sessions/b/segments", json={"x": [[1]]})).status_code == 404
        assert (await two.http.post("/v1/sessions/a/segments", content=b"x" * 10**6)).status_code == 413
        assert (await two.http.delete("/v1/sessions/a")).json()["reason"] == "closed"
        await two.http.get("/v1/sessions/a/outputs", params={"start": 3})
        async with asyncio.timeout(5):
            while (await one.http.post("/v1/sessions", json={"session": "a"})).status_code != 201:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("has_asked", [False, True])
async def test_an_http_session_goes_on_when_its_ingress_dies(has_asked: bool) -> None:
    async with ingresses() as (cluster, one, two):
        await one.http.post("/v1/sessions", json={"session": "a"})
        await segment(one, [1, 2], start=0)
        if has_asked:
            await segment(two, [3], start=2)
        await asyncio.sleep(TOLD_S)
        one.kill()
        assert "sender" in (await two.http.get("/v1/sessions/a")).json()
        accepted = 3 if has_asked else 2
        error = (await segment(two, [4], 409))["error"]
        assert error["details"]["expected"] == accepted
        assert (await segment(two, [3, 4], start=2))["end"] == 4
        found: list[float] = []
        while len(found) < 4:
            found += await outputs(two, len(found))
        assert found == [1, 3, 6, 10]
        assert cluster.engines["owner-0"].stats.timesteps == 4
        assert (await two.http.delete("/v1/sessions/a", params={"start": 4})).json()["reason"] == "closed"


async def test_an_http_session_of_a_dead_ingress_can_be_aborted() -> None:
    async with ingresses() as (cluster, one, two):
        await one.http.post("/v1/sessions", json={"session": "a"})
        one.kill()
        assert (await two.http.delete("/v1/sessions/a", params={"abort": True})).json() == {"reason": "aborted"}
        await asyncio.sleep(TOLD_S)
        assert cluster.engines["owner-0"].gauges()["sessions_open"] == 0


class Client:
    """A client of single requests, who knows nothing of ingresses: it resends what is not answered, as it is told."""

    def __init__(self, rng: random.Random, sequence: int) -> None:
        self.rng, self.sequence = rng, sequence
        self.x = [float(rng.randint(-9, 9)) for _ in range(rng.randint(5, 40))]
        self.expected = np.cumsum(self.x).tolist()
        self.name = rng.choice([None, "me", "you"])
        self.num_given_up = 0  # timesteps of sequences that were started again, at most

    async def run(self, alive: Callable[[], list[Ingress]]) -> None:
        at = sent = 0
        while at < len(self.x):
            end = min(len(self.x), at + self.rng.randint(1, 6))
            if at == 0:
                self.num_given_up += sent
            sent = max(sent, end)
            ingress = self.rng.choice(alive())
            try:
                found = await ingress.infer(
                    self.sequence, self.x[at:end], start=at == 0, end=end == len(self.x), client=self.name
                )
            except Died:
                continue  # with the next try it is told where to go on, or nothing has run
            except StartMismatch as error:
                at = error.details["expected"]
                continue
            except StateLost:  # a second ingress has died while it took the sequence over
                at = 0
                continue
            assert found == self.expected[at:end], f"{self.sequence} from {at} on"
            at = end
            if self.rng.random() < 0.3:
                await asyncio.sleep(self.rng.random() * 0.1)


@pytest.mark.parametrize("seed", range(6))
async def test_each_output_comes_once_whatever_ingresses_die(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of many sequences through whichever ingress, while they die at random and others start."""
    monkeypatch.setattr(sequences, "SENT_BY_ANOTHER_AFTER_S", 1.0)  # nothing here stands still for so long
    rng = random.Random(seed)
    async with ingresses(3, owners=2) as (cluster, *some):
        listening = some[0].listening
        cluster.delay_s = lambda: rng.random() * 0.01
        clients = [Client(random.Random(rng.random()), sequence) for sequence in range(1, 31)]

        def alive() -> list[Ingress]:
            return [each for each in listening.values() if not each.died.is_set()]

        async def die() -> None:
            for number in range(8):
                await asyncio.sleep(rng.random() * 0.5)
                rng.choice(alive()).kill()
                Ingress(cluster, f"10.0.1.{number}:1", listening)

        async with asyncio.timeout(60), asyncio.TaskGroup() as together:
            for work in (die(), *(client.run(alive) for client in clients)):
                together.create_task(work)
        ran = sum(engine.stats.timesteps for engine in cluster.engines.values())
        needed = sum(len(client.x) for client in clients)
        assert needed <= ran <= needed + sum(client.num_given_up for client in clients)
