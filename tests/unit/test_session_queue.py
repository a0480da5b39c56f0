"""New sessions that wait for a place: who gets the next, and who is told what."""

import asyncio
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.asyncio.client import connect as websocket

from clients.client import connect
from serve_app import lease
from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig, SessionConfig
from serve_app.directory import Claim, Directory, Grant, Owner, Turn
from serve_app.errors import ConfigError, InvalidInput, TimedOut, TooManySessions
from serve_app.ingress.hub import Hub
from serve_app.policy.session_queue import ASK_AGAIN_S, GONE_AFTER_S, QueueLimits, SessionQueue, retry_after_s
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec
from tests.fakes import SumModel
from tests.local import LocalCluster, local
from tests.unit.test_websocket import system

LIMITS = QueueLimits(max_waiting=3, max_wait_s=10, default_priority=2)
CONFIG = AppConfig(
    model=ModelConfig("sum"),
    engine=EngineConfig(device="cpu", slots=4, max_batch_size=4),
    session=SessionConfig(max_sessions=1, max_wait_s=5, default_priority=2),
    frame=FrameConfig(answer_within_s=0.2),
)


class Queued:
    """A directory with an owner of `places`, and its clock."""

    def __init__(self, places: int = 1, limits: QueueLimits = LIMITS) -> None:
        self.directory = Directory(1)
        spec = ModelSpec("sum", TensorSpec((1,)), {})
        self.owner = Owner("x", "x", spec, SessionLimits(), places, max_bytes=100, queue=limits)
        self.directory.register(self.owner)
        self.now = 0.0
        self.began: dict[str, float] = {}

    def ask(self, session: str, priority: int = 0, max_wait_s: float = float("inf")) -> Grant | TooManySessions:
        """Ask for a place; where it may wait, the error that says so."""
        self.directory.tick(self.now)
        self.directory.heard("x")
        waited_s = self.now - self.began.setdefault(session, self.now)
        try:
            return self.directory.open(session, "s", turn=Turn(priority, max_wait_s), waited_s=waited_s)
        except TooManySessions as error:
            if "ask_again_s" not in error.details:
                raise
            return error

    def waits(self, session: str, priority: int = 0) -> bool:
        return not isinstance(self.ask(session, priority), Grant)

    def end(self, session: str) -> None:
        self.directory.ended("x", [self.directory.lookup(session).epoch])

    @property
    def num_waiting(self) -> int:
        return self.directory.statistics()["sum"].waiting


@pytest.fixture
def queued() -> Iterator[Queued]:
    queued = Queued()
    yield queued
    queued.directory._tallies["sum"].queue.check()


def test_who_is_first_in_line_gets_the_place_whoever_asks_before(queued: Queued) -> None:
    assert not queued.waits("open")
    assert [queued.waits(session) for session in "abc"] == [True] * 3
    queued.end("open")
    assert queued.waits("b") and queued.waits("c")
    assert not queued.waits("a")
    assert queued.waits("b") and queued.num_waiting == 2


def test_a_higher_priority_goes_first(queued: Queued) -> None:
    queued.ask("open")
    assert queued.waits("low", 3) and queued.waits("usual") and queued.waits("high", 1)
    queued.end("open")
    assert queued.waits("low", 3) and queued.waits("usual") and not queued.waits("high", 1)
    queued.end("high")
    assert queued.waits("low", 3) and not queued.waits("usual")
    queued.end("usual")
    assert not queued.waits("low", 3)


def test_when_too_many_wait_the_last_is_refused_with_a_hint(queued: Queued) -> None:
    queued.ask("open")
    for session in "abc":
        assert queued.waits(session)
    with pytest.raises(TooManySessions, match=r"1 sessions are open.*and 3 wait, all that session.max_waiting allows"):
        queued.ask("d")
    assert queued.waits("high", 1), "it takes the place of the last"
    with pytest.raises(TooManySessions) as refused:
        queued.ask("c")
    assert refused.value.retry and refused.value.retry_after_s == 1
    assert queued.num_waiting == 3
    assert queued.directory.statistics()["sum"].refused == {"too_many_sessions": 2}


def test_who_has_waited_too_long_is_told_so_and_waits_no_more(queued: Queued) -> None:
    queued.ask("open")
    queued.now = 100
    first = queued.ask("a")
    assert isinstance(first, TooManySessions) and first.details == {"ask_again_s": ASK_AGAIN_S}
    soon = queued.ask("b", max_wait_s=0.125)
    assert isinstance(soon, TooManySessions) and soon.details == {"ask_again_s": 0.125}
    queued.now += 0.125
    with pytest.raises(TimedOut, match=r"has waited 0.1 s for a place, and 1 sessions are open"):
        queued.ask("b", max_wait_s=0.125)
    queued.now += 9.75
    assert queued.waits("a")
    queued.now += 0.125
    with pytest.raises(TimedOut, match=r"10.0 s") as late:
        queued.ask("a")
    assert late.value.retry
    assert queued.num_waiting == 0
    assert queued.directory.statistics()["sum"].refused == {"timed_out": 2}


def test_who_does_not_ask_any_more_holds_up_nobody(queued: Queued) -> None:
    queued.ask("open")
    queued.ask("gone")
    queued.now = GONE_AFTER_S / 2
    queued.ask("a")
    queued.end("open")
    assert queued.waits("a")
    queued.now = GONE_AFTER_S + 0.1
    assert not queued.waits("a")


def test_a_directory_that_starts_again_lets_those_who_wait_keep_their_order() -> None:
    after = Queued()
    after.ask("open")
    after.now, after.began = 50, {"open": 0, "second": 45, "first": 44}
    assert after.waits("second") and after.waits("first")
    after.end("open")
    assert after.waits("second") and not after.waits("first")


def test_sessions_that_move_do_not_wait_behind_new_ones(queued: Queued) -> None:
    grant = queued.ask("open")
    assert isinstance(grant, Grant)
    queued.waits("a")
    queued.directory.register(dataclasses.replace(queued.owner, name="y"))
    queued.directory.unregister("x")
    assert queued.directory.open("open", "s", claim=Claim(grant.epoch)).owner.name == "y"


def test_without_a_queue_one_too_many_is_refused_at_once() -> None:
    queued = Queued(2, QueueLimits())
    queued.ask("a"), queued.ask("b")
    with pytest.raises(TooManySessions, match="2 sessions are open, all that the replicas take: try again later"):
        queued.ask("c")
    queued.end("a")
    assert isinstance(queued.ask("c"), Grant)


def test_the_hint_is_how_long_places_took_to_become_free() -> None:
    assert retry_after_s([], 5, 10) == 1
    assert retry_after_s([0, 2, 4, 6], 4, 8) == 10
    assert retry_after_s([9.9], 0, 10) == 1
    assert retry_after_s([0], 100, 50) == 60


@pytest.mark.parametrize("seed", range(20))
def test_places_are_given_in_order_and_never_too_many(seed: int) -> None:
    """At random: sessions come, give up, ask in any order and end. Whoever gets a place is who should."""
    rng, places = random.Random(seed), 3
    queued = Queued(places, QueueLimits(max_waiting=1000, max_wait_s=1000))
    there: dict[str, tuple[int, float, int]] = {}  # those who wait: priority, since when, number
    opened: list[str] = []
    for number in range(600):
        queued.now += 0.01
        if rng.random() < 0.4:
            there[f"s{number}"] = rng.randint(1, 3), queued.now, number
        elif there and rng.random() < 0.1:
            session = rng.choice(list(there))
            del there[session]
            queued.directory._tallies["sum"].queue.leave((session, "s"))  # as time would do it
        elif opened and rng.random() < 0.5:
            queued.end(opened.pop(rng.randrange(len(opened))))
        for session in rng.sample(list(there), len(there)):
            grant = queued.ask(session, there[session][0])
            if isinstance(grant, Grant):
                assert not any(place < there[session] for other, place in there.items() if other != session) or (
                    places - len(opened) > sum(place < there[session] for place in there.values())
                )
                del there[session]
                opened.append(session)
                assert len(opened) <= places
        queued.directory._tallies["sum"].queue.check()
        assert queued.num_waiting == len(there)
        assert not there or len(opened) == places or min(there.values())[2] == number, "a place is free and kept"


def test_what_the_queue_forgets_is_the_same_as_if_it_had_never_been() -> None:
    queue = SessionQueue()
    for number, asked_at in enumerate((0.0, 0.5, 0.9)):
        assert queue.ask((f"s{number}", "s"), 1, 0, asked_at) == number
    assert queue.ask(("s3", "s"), 1, 0, 1.2) == 2
    queue.leave(("s0", "s"))
    queue.check()
    assert len(queue) == 3


def test_settings_of_the_queue_are_checked() -> None:
    for wrong in ({"max_wait_s": -1}, {"max_waiting": 0}, {"default_priority": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            SessionConfig(**wrong)  # type: ignore[arg-type]


async def ends(hub: Hub, name: str) -> None:
    session = hub.get(name)
    session.submit(np.ones((1, 2), np.int64))
    session.close()
    await session.closed()
    session.ack(session.progress)


@pytest.mark.asyncio
async def test_a_session_waits_until_another_has_ended() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        await hub.open("a")
        waiting = [asyncio.create_task(hub.open("b")), asyncio.create_task(hub.begin("c", None, Turn(1)))]
        await asyncio.sleep(0.3)
        assert cluster.directory.statistics()["sum"].waiting == 2
        await ends(hub, "a")
        assert (await waiting[1]).name == "c"
        assert not waiting[0].done()
        await ends(hub, "c")
        assert (await waiting[0]).name == "b"


@pytest.mark.asyncio
async def test_who_gives_up_takes_no_place_though_it_was_granted() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        opening = asyncio.create_task(hub.open("a"))
        await asyncio.sleep(0)
        opening.cancel()  # it is asked for already
        await asyncio.gather(opening, return_exceptions=True)
        await hub.open("b")
        waiting = asyncio.create_task(hub.open("c"))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await ends(hub, "b")
        await hub.open("d")
        assert cluster.directory.num_sessions() == {"owner-0": 1}


@pytest.mark.asyncio
async def test_a_session_that_has_waited_too_long_is_refused_by_all_ways() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_wait_s=0.3))
    async with local(SumModel(), config=config) as (_, hub):
        await hub.open("a")
        with pytest.raises(TimedOut, match=r"has waited 0.3 s for a place"):
            await hub.open("b")
        with pytest.raises(TooManySessions):
            await hub.open("b", turn=Turn(max_wait_s=0))


@asynccontextmanager
async def served() -> AsyncIterator[tuple[LocalCluster, Hub, str]]:
    """A cluster whose one place is taken by session `open`; its hub, and where it is served: ws://host:port."""
    async with system(config=CONFIG) as sut:
        await sut.hub.open("open")
        yield sut.cluster, sut.hub, sut.address


async def waiting(cluster: LocalCluster, num: int) -> None:
    async with asyncio.timeout(5):
        while True:
            cluster.directory.tick(lease.now())
            if cluster.directory.statistics()["sum"].waiting == num:
                return
            await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_over_http_and_websocket_sessions_wait_too_and_leave_the_line_with_their_client() -> None:
    async with served() as (cluster, hub, address), httpx.AsyncClient(base_url=address.replace("ws", "http")) as client:
        lines = connect(address)
        ways: list[Any] = [
            lambda name, priority: client.post("/v1/sessions", json={"session": name, "priority": priority}),
            lambda name, priority: lines.open(name, priority=priority, max_wait_s=60),
        ]
        for way in ways:
            leaves, stays = [asyncio.ensure_future(way(name, 3)) for name in ("leaves", "stays")]
            await waiting(cluster, 2)
            leaves.cancel()
            await waiting(cluster, 1)
            first = asyncio.ensure_future(way("first", 1))
            await waiting(cluster, 2)
            for session, due in (("open", first), ("first", stays)):
                await ends(hub, session)
                await asyncio.wait_for(due, 5)
            await ends(hub, "stays")
            await hub.open("open")
        response = await client.post("/v1/sessions", json={"max_wait_s": 0})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_sessions")
        assert int(response.headers["retry-after"]) >= 1
        response = await client.post("/v1/sessions", json={"max_wait_s": 0.1})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timed_out")
        assert int(response.headers["retry-after"]) >= 1
        response = await client.post("/v1/sessions", json={"max_wait_s": -1})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_input")
        for wrong in ("priority=first", "max_wait_s=nan"):
            async with websocket(f"{address}/v1/session?{wrong}") as refused:
                assert "invalid_input" in str(await refused.recv())
        with pytest.raises(TimedOut, match="has waited"):
            await lines.open(max_wait_s=0.1)
        with pytest.raises(InvalidInput, match="priority is -1"):
            await lines.open(priority=-1)
        await lines.stop()


@pytest.mark.asyncio
async def test_what_a_client_sends_while_it_waits_is_taken_up_when_it_has_its_place() -> None:
    async with served() as (cluster, hub, address), websocket(f"{address}/v1/session?session=a") as early:
        for x in ([[1, 1]], [[2, 2]]):
            await early.send(json.dumps({"type": "segment", "x": x}))
        await waiting(cluster, 1)
        await asyncio.sleep(0.3)
        await ends(hub, "open")
        assert json.loads(await early.recv())["type"] == "opened"
        totals: list[list[int]] = []
        while len(totals) < 2:
            totals += json.loads(await early.recv())["outputs"]["total"]
        assert totals == [[1, 1], [3, 3]]
