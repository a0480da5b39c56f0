"""Grants that an ingress asks for ahead: by itself, and with sequences that begin with them."""

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app import directory as directory_module
from serve_app.config import AppConfig, EngineConfig, ModelConfig, SessionConfig
from serve_app.directory import AHEAD, Grant, Owner
from serve_app.errors import LockstepError, TooManySessions, Unavailable
from serve_app.ingress import grants_ahead
from serve_app.ingress.grants_ahead import FEW, MAX_AHEAD, GrantsAhead
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.sequences import Request, Result, Space
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec
from tests.fakes import FloatSumModel
from tests.local import LocalCluster, local

SOON_S = 0.2
SPEC = ModelSpec("sum", TensorSpec((1,)), {})
OWNERS = [Owner(name, name, SPEC, SessionLimits(), max_sessions=100, max_bytes=100) for name in "xy"]


class Places:
    """A directory that has so many, as GrantsAhead asks it."""

    def __init__(self, free: int = 10**6) -> None:
        self.free, self.last, self.asked = free, 0, list[int]()
        self.out: dict[int, str] = {}
        self.fails = self.has_failed = False
        self.told = asyncio.Event()

    async def open_ahead(self, model: str | None, places: int, unused: dict[str, list[int]]) -> Sequence[Grant]:
        await asyncio.sleep(0)
        if self.fails:
            self.has_failed = True
            raise Unavailable("none is there")
        self.asked.append(places)
        for owner, epochs in unused.items():
            for epoch in epochs:
                assert self.out.pop(epoch) == owner
                self.free += 1
                self.told.set()
        grants = [Grant(AHEAD, self.last + i + 1, OWNERS[i % 2]) for i in range(min(places, self.free))]
        self.last, self.free = self.last + len(grants), self.free - len(grants)
        self.out |= {grant.epoch: grant.owner.name for grant in grants}
        return grants


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def some_ahead() -> tuple[Places, GrantsAhead]:
    """FEW + 1 grants of `sum` are there."""
    places = Places()
    ahead = GrantsAhead(places.open_ahead)
    for _ in range(FEW + 1):
        ahead.take("sum")
    await turns()
    assert len(places.out) == FEW + 1
    return places, ahead


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants_ahead, "LIFE_S", SOON_S)


async def test_where_few_sessions_begin_nothing_is_asked_for_ahead() -> None:
    places = Places()
    ahead = GrantsAhead(places.open_ahead)
    assert [ahead.take("sum") for _ in range(FEW)] == [None] * FEW
    assert [ahead.take("another") for _ in range(FEW)] == [None] * FEW
    await turns()
    assert places.asked == []
    await ahead.stop()


async def test_where_many_begin_all_but_the_first_find_one_and_few_asks_bring_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grants_ahead, "LIFE_S", 60.0)
    places = Places()
    ahead = GrantsAhead(places.open_ahead)
    found = []
    for _ in range(500):
        found.append(ahead.take("sum"))
        await turns()
    assert [grant is not None for grant in found] == [False] * (FEW + 1) + [True] * (500 - FEW - 1)
    assert len({grant.epoch for grant in found if grant is not None}) == 500 - FEW - 1
    assert max(places.asked) <= MAX_AHEAD
    assert len(places.asked) < 60
    assert ahead.take("another") is None, "those are of one model"
    await ahead.stop()
    assert len(places.out) == 500 - FEW - 1, "the others were given back"


@pytest.mark.usefixtures("_soon")
async def test_what_nobody_takes_in_time_is_given_back() -> None:
    places, ahead = await some_ahead()
    async with asyncio.timeout(10):
        await places.told.wait()
    await turns()
    assert places.out == {}
    assert ahead.take("sum") is None
    await ahead.stop()


@pytest.mark.parametrize("fails", [True, False])
async def test_a_directory_that_has_none_is_left_alone_for_a_while(fails: bool) -> None:
    places = Places(free=0)
    places.fails = fails
    asked: list[int] = []

    async def open_ahead(model: str | None, number: int, unused: dict[str, list[int]]) -> Sequence[Grant]:
        asked.append(number)
        return await places.open_ahead(model, number, unused)

    ahead = GrantsAhead(open_ahead)
    for _ in range(100):
        assert ahead.take("sum") is None
        await turns()
    assert len(asked) == 1
    places.fails, places.free = False, 100
    async with asyncio.timeout(10):
        while ahead.take("sum") is None:
            await asyncio.sleep(SOON_S / 10)
    await ahead.stop()


@pytest.mark.usefixtures("_soon")
async def test_what_is_not_used_is_given_back_though_the_directory_was_not_there_for_a_while() -> None:
    places, ahead = await some_ahead()
    places.fails = True
    async with asyncio.timeout(10):
        while not places.has_failed:
            await asyncio.sleep(SOON_S / 10)
        places.fails = False
        await places.told.wait()
    assert places.out == {}
    await ahead.stop()


@pytest.mark.usefixtures("_soon")
async def test_what_is_not_used_is_given_back_though_the_directory_was_slow_to_fail() -> None:
    places, may_fail = Places(), asyncio.Event()

    async def open_ahead(model: str | None, number: int, unused: dict[str, list[int]]) -> Sequence[Grant]:
        if unused and not places.has_failed:
            await may_fail.wait()
            places.has_failed = True
            raise Unavailable("it was not there")
        return await places.open_ahead(model, number, unused)

    ahead = GrantsAhead(open_ahead)
    for _ in range(FEW + 1):
        ahead.take("sum")
    async with asyncio.timeout(10):
        while ahead._looking is not None or not places.out:  # nothing is left to look after
            await asyncio.sleep(SOON_S / 10)
        may_fail.set()
        await places.told.wait()
    assert places.out == {}
    await ahead.stop()


async def test_none_is_of_an_owner_that_is_gone() -> None:
    places = Places()
    ahead = GrantsAhead(places.open_ahead)
    for _ in range(MAX_AHEAD):
        ahead.take("sum")
    await turns()
    assert set(places.out.values()) == {"x", "y"}
    ahead.drop("x")
    left = sum(owner == "y" for owner in places.out.values())
    assert [grant.owner.name for grant in (ahead.take("sum") for _ in range(left)) if grant is not None] == ["y"] * left
    await ahead.stop()
    assert len(places.out) == left


async def test_a_directory_that_does_not_answer_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grants_ahead, "GIVE_BACK_WITHIN_S", SOON_S)

    async def open_ahead(model: str | None, places: int, unused: dict[str, list[int]]) -> Sequence[Grant]:
        await asyncio.Event().wait()
        return []

    ahead = GrantsAhead(open_ahead)
    for _ in range(2 * FEW):
        assert ahead.take("sum") is None
    async with asyncio.timeout(10):
        await ahead.stop()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_each_grant_is_taken_once_or_given_back_once(seed: int) -> None:
    """Places notices if one is given back that it does not know, or twice."""

    async def run() -> None:
        random.seed(seed)
        places, taken = Places(free=random.choice([3, 40, 10**6])), set()
        ahead = GrantsAhead(places.open_ahead)
        for _ in range(300):
            what = random.random()
            if what < 0.7 and (grant := ahead.take(random.choice([None, "sum"]))) is not None:
                assert grant.epoch in places.out and grant.epoch not in taken
                taken.add(grant.epoch)
                if random.random() < 0.2:
                    taken.remove(grant.epoch)
                    ahead.give_back(grant)
            elif what > 0.95:
                ahead.drop(random.choice("xy"))
            elif what > 0.8:
                await turns()
        await ahead.stop()
        assert places.out.keys() == taken

    asyncio.run(run())


# With sequences.

CONFIG = AppConfig(
    model=ModelConfig("sum"),
    engine=EngineConfig(device="cpu", slots=64, max_batch_size=16, max_step_timesteps=4),
    session=SessionConfig(max_sessions=1024, max_segment_timesteps=64, max_window_timesteps=256),
)


@asynccontextmanager
async def stream(
    *models: FloatSumModel, config: AppConfig = CONFIG
) -> AsyncIterator[tuple[LocalCluster, Space, Counter[str]]]:
    """A cluster, the sequences of a stream without a name, and what the directory is asked."""
    async with local(*models, config=config, ack_on_receipt=False) as (cluster, hub):
        asked: Counter[str] = Counter()

        def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def counting(*args: Any) -> Any:
                asked[name] += 1
                return call(*args)

            return counting

        for name in ("open", "open_ahead"):
            setattr(hub._directory, name, counted(name, getattr(cluster, name)))
        space = InferenceServer(hub).own_space()
        yield cluster, space, asked
        space.abort()


async def ask(space: Space, sequence: int, value: float, *, start: bool = False, end: bool = False) -> float:
    done: asyncio.Future[Result | LockstepError] = asyncio.get_running_loop().create_future()
    space.ask(Request("sum", sequence, start, end, np.full((1, 1), value, np.float32)), done.set_result, space)
    result = await done
    if isinstance(result, LockstepError):
        raise result
    return float(result.values["total"][0, 0])


async def sequence(space: Space, number: int, length: int = 5) -> None:
    """One from start to end, whose outputs are right."""
    for i in range(length):
        assert await ask(space, number, number, start=i == 0, end=i == length - 1) == number * (i + 1)


async def test_sequences_that_follow_each_other_ask_the_directory_seldom() -> None:
    async with stream(FloatSumModel(), FloatSumModel()) as (cluster, space, asked):

        async def one_after_the_other(first: int) -> None:
            for number in range(first, first + 20):
                await sequence(space, number)

        await asyncio.gather(*(one_after_the_other(first) for first in range(1, 401, 20)))
        assert asked["open"] + asked["open_ahead"] < 200
        async with asyncio.timeout(10):  # the owners hear of the last ends in a moment
            while (statistics := (await cluster.statistics())["sum"]).open:
                await asyncio.sleep(0.01)
        assert (statistics.opened, statistics.ended["closed"]) == (400, 400)
        assert all(engine.stats.timesteps for engine in cluster.engines.values()), "they are spread over owners"


async def test_a_session_that_began_ahead_is_known_when_its_owner_has_told_of_it() -> None:
    async with stream(FloatSumModel()) as (cluster, space, asked):
        for number in range(1, FEW + 2):
            await sequence(space, number)
        await turns()
        before = asked["open"]
        assert await ask(space, 100, 3, start=True) == 3
        assert asked["open"] == before
        before_it = (await cluster.statistics())["sum"].opened
        assert before_it == FEW + 2
        (described,) = await cluster.sessions("", 10)
        assert described.session.startswith("sequence 100 of sum @stream ")
        assert (await cluster.statistics())["sum"].open == 1, "places that are free are not open"
        assert await ask(space, 100, 4, end=True) == 7


async def test_an_id_that_is_used_again_is_another_session() -> None:
    """The grant that the second begins with may be older than that of the first."""
    async with stream(FloatSumModel()) as (cluster, space, asked):
        for _ in range(FEW + 1):
            await sequence(space, 7)
        await turns()
        before = asked["open"]
        assert await ask(space, 7, 3, start=True) == 3
        assert asked["open"] == before
        assert (await cluster.statistics())["sum"].open == cluster.engines["owner-0"].num_sessions == 1
        assert await ask(space, 7, 3, end=True) == 6


async def test_the_opening_of_one_that_begins_goes_with_the_frame_of_the_others() -> None:
    async with stream(FloatSumModel()) as (cluster, space, _):
        await asyncio.gather(*(ask(space, number, 1, start=True) for number in range(1, 21)))
        await turns()
        before = len(cluster.frames)
        await asyncio.gather(ask(space, 1, 1), ask(space, 100, 1, start=True), ask(space, 2, 1))
        first = cluster.frames[before]
        assert (len(first.opens), len(first.x)) == (1, 3)


async def test_sequences_begin_where_an_owner_lives() -> None:
    """One dies, of which there are grants: those that begin go on elsewhere, if they have begun there."""
    async with stream(FloatSumModel(), FloatSumModel()) as (cluster, space, _), asyncio.timeout(30):
        await asyncio.gather(*(sequence(space, number) for number in range(1, 41)))
        await cluster.kill("owner-0")
        await asyncio.gather(*(sequence(space, number) for number in range(101, 141)))
        for number in range(201, 241):
            await sequence(space, number, length=2)


@pytest.mark.parametrize("ends", ["kill", "drain"])
async def test_one_that_began_where_an_owner_has_just_left_goes_on_elsewhere_without_checkpoints(ends: str) -> None:
    """All its inputs are here, as long as none was accepted."""
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, checkpoint_timesteps=0))
    async with stream(FloatSumModel(), FloatSumModel(), config=config) as (cluster, space, _), asyncio.timeout(30):
        await asyncio.gather(*(sequence(space, number, 2) for number in range(1, 41)))
        await turns()
        await getattr(cluster, ends)("owner-0")
        before = len(cluster.frames)
        await asyncio.gather(*(sequence(space, number, 2) for number in range(101, 141)))
        assert any(frame.owner == "owner-0" and frame.opens for frame in cluster.frames[before:])


async def test_as_many_sequences_begin_at_once_as_there_are_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some places may be granted ahead meanwhile: whoever finds no other waits for those, and no more are taken."""
    monkeypatch.setattr(directory_module, "MIN_FREE", 0)
    monkeypatch.setattr(grants_ahead, "LIFE_S", SOON_S)
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, max_sessions=40))
    async with stream(FloatSumModel(), config=config) as (_, space, asked), asyncio.timeout(30):
        begun = [ask(space, number, 1, start=True) for number in range(1, 51)]
        found = await asyncio.gather(*begun, return_exceptions=True)
        assert asked["open_ahead"] > 0
        assert sum(each == 1 for each in found) == 40
        assert sum(isinstance(each, TooManySessions) for each in found) == 10
