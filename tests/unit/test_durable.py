"""Sessions that outlive all that holds them: ingress and owner together, or everything but the store."""

import asyncio
import dataclasses
import logging
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest

from clients.websocket import open_websocket
from serve_app import session as session_module
from serve_app.checkpoint import decode_checkpoint
from serve_app.checkpoint_store import key_of
from serve_app.config import AppConfig, DurabilityConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.deployments.registration import News
from serve_app.errors import NotOwner, StateLost, TooManySessions, Unavailable, UnknownSession
from serve_app.frame import Answer, Frame
from serve_app.ingress import keeper as keeper_module
from serve_app.ingress.hub import NOWHERE, Hub
from serve_app.session import Session
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec
from tests.fakes import SumModel
from tests.local import LocalCluster, Mortal, local
from tests.unit.test_websocket import System, break_connection, carrier, collect, line, ones, serving, talk

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

CONFIG = AppConfig(
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(
        max_sessions=64,
        max_segment_timesteps=64,
        max_window_timesteps=256,
        checkpoint_timesteps=10,
        checkpoint_apart_s=0,
    ),
    frame=FrameConfig(answer_within_s=0.05),
)


class Ingresses:
    """Any number of ingresses of a cluster; `kill` ends one as a signal does."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self._stack = AsyncExitStack()
        self._mortal: dict[str, Mortal] = {}
        self.hubs: dict[str, Hub] = {}

    async def add(self) -> str:
        """One more; its address."""
        mortal = Mortal(self.cluster)
        hub = Hub(mortal, ack_on_receipt=False)
        self._stack.push_async_callback(hub.stop)
        address = await self._stack.enter_async_context(serving(hub))
        self._mortal[address], self.hubs[address] = mortal, hub
        return address

    def kill(self, address: str) -> None:
        self._mortal.pop(address).dead = True

    @property
    def alive(self) -> list[str]:
        return list(self._mortal)

    async def stop(self) -> None:
        await self._stack.aclose()


@asynccontextmanager
async def ingresses(*models: SumModel, config: AppConfig = CONFIG) -> AsyncIterator[Ingresses]:
    """A cluster with two ingresses."""
    async with local(*(models or (SumModel(),)), config=config) as (cluster, _):
        found = Ingresses(cluster)
        await found.add()
        await found.add()
        try:
            yield found
        finally:
            await found.stop()


def go_to(session: Session, address: str) -> None:
    """Its connection breaks; the next goes there."""
    carrier(session)._addresses[0] = address
    break_connection(session)


SEEN: WeakKeyDictionary[Session, list[list[int]]] = WeakKeyDictionary()
"""Outputs that were read."""


async def run(session: Session, timesteps: int) -> None:
    """Submit ones and wait for their outputs, one segment after another."""
    seen = SEEN.setdefault(session, [])
    for _ in range(timesteps // 5):
        await session.wait(session.submit(np.array(ones(5))))
        outputs = session.read()
        assert outputs is not None and outputs.start == len(seen)
        seen += outputs.values["total"].tolist()


async def kept(session: Session, at_least: int) -> None:
    """Go on until it is known that so much is kept."""
    while (session.kept or 0) < at_least:
        await run(session, 5)


async def orphaned(sut: Ingresses) -> Session:
    """The session "a", whose ingress and owner are gone, and of which a checkpoint is kept; there is another owner."""
    first, *_ = sut.alive
    session = await open_websocket(first, session="a")
    await kept(session, 40)
    carrier(session)._stopped = True
    sut.kill(first)
    await sut.cluster.kill("owner-0")
    break_connection(session)
    sut.cluster.add(SumModel())
    return session


async def finish(session: Session) -> None:
    """Close it; its outputs must all have come, once and in order."""
    session.close()
    assert await session.closed() == "closed"
    assert SEEN[session] + await collect(session) == line(0, session.next)


async def test_a_session_outlives_its_ingress_and_its_owner() -> None:
    async with ingresses() as sut:
        first, second = sut.alive
        session = await open_websocket(first)
        await kept(session, 40)
        ran = session.progress
        session.submit(np.array(ones(3)))
        sut.kill(first)
        await sut.cluster.kill("owner-0")
        sut.cluster.add(SumModel())
        go_to(session, second)
        await run(session, 50)
        await finish(session)
        assert sut.cluster.engines["owner-1"].stats.timesteps <= session.next - 40, "it went on from what was kept"
        assert session.next > ran


async def test_nothing_has_to_be_kept_yet() -> None:
    """Of a session that is lost before its first checkpoint, its initial state is kept."""
    async with ingresses() as sut:
        first, second = sut.alive
        session = await open_websocket(first, session="a", initial_state=[np.array([[40, 40]])])
        await run(session, 5)
        while not sut.cluster.directory._kept:
            await asyncio.sleep(0.001)
        sut.kill(first)
        await sut.cluster.kill("owner-0")
        sut.cluster.add(SumModel())
        go_to(session, second)
        await run(session, 5)
        assert SEEN[session] == [[40 + i, 40 + i] for i in range(1, 11)]


@pytest.mark.parametrize("url", ["{}", "file://{}"])
async def test_a_session_outlives_the_whole_cluster_where_there_is_a_store(url: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, durability=DurabilityConfig(store=url.format(tmp_path)))
    async with ingresses(config=config) as before:
        (first, _) = before.alive
        sessions = [await open_websocket(first) for _ in range(5)]
        await asyncio.gather(*(kept(session, 40) for session in sessions))
        async with ingresses(config=config) as after:  # which knows the folder, and nothing else
            before.kill(first)
            await before.cluster.kill("owner-0")
            for session in sessions:
                go_to(session, after.alive[0])
            await asyncio.gather(*(run(session, 50) for session in sessions))
            await asyncio.gather(*map(finish, sessions))
            await dropped(after.cluster)
    assert not any((tmp_path / "app").iterdir())


async def dropped(cluster: LocalCluster) -> None:
    """The owners report what has ended, until nothing is kept any more."""
    while cluster.actor._store is None or cluster.actor._store.keys():
        for name in cluster.alive:
            stats = cluster.engines[name].stats
            await cluster.actor.report(name, News(stats.take_taken(), stats.take_ended()), dict(stats.ends))
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_killed_together_each_output_comes_once(seed: int, tmp_path: Path) -> None:
    """Ingress with owner, now and then the directory with them; connections, beside that."""
    rng = random.Random(seed)
    config = dataclasses.replace(CONFIG, durability=DurabilityConfig(store=str(tmp_path)))
    async with ingresses(SumModel(), SumModel(), config=config) as sut:
        sessions = [await open_websocket(rng.choice(sut.alive)) for _ in range(12)]

        async def one(session: Session) -> None:
            reader = asyncio.create_task(collect(session))
            while session.next < 400:
                session.submit(np.array(ones(rng.randint(1, 12))))
                if rng.random() < 0.5:
                    await session.wait(session.next - rng.randint(0, min(5, session.next)))
                if rng.random() < 0.1:
                    go_to(session, rng.choice(sut.alive))
                await asyncio.sleep(rng.random() * 0.02)
            session.close()
            assert await session.closed() == "closed"
            assert await reader == line(0, session.next)

        async def killer() -> None:
            while True:
                await asyncio.sleep(0.1 + rng.random() * 0.2)
                victim = rng.choice(sut.alive)
                await sut.add()
                sut.kill(victim)
                await sut.cluster.kill(rng.choice(sut.cluster.alive))
                sut.cluster.add(SumModel())
                if rng.random() < 0.5:
                    await sut.cluster.start_directory()
                for session in sessions:
                    if carrier(session)._addresses[0] == victim and session.end_reason is None:
                        go_to(session, rng.choice(sut.alive))

        killing = asyncio.create_task(killer())
        await asyncio.gather(*map(one, sessions))
        killing.cancel()
        assert len(sut.cluster.engines) > 4
        await asyncio.gather(*(carrier(session).stop() for session in sessions))
        for name in sut.cluster.alive:
            sut.cluster.engines[name].check()


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners do not answer who takes a session over from another sender."""
    call = LocalCluster.call

    async def failing(cluster: LocalCluster, owner: str, frame: Frame) -> Answer:
        if any(ask.adopts >= 0 for ask in frame.opens):
            raise StateLost("no way to it")
        return await call(cluster, owner, frame)

    monkeypatch.setattr(LocalCluster, "call", failing)


@pytest.mark.usefixtures("deaf")
async def test_a_session_goes_on_though_its_owner_does_not_answer_who_takes_it_over() -> None:
    """The directory has named an epoch that the owner does not know; that must not be the end of the session."""
    async with ingresses(SumModel(), SumModel()) as sut:
        first, second = sut.alive
        session = await open_websocket(first)
        await kept(session, 40)
        go_to(session, second)
        await run(session, 20)
        await finish(session)


async def test_an_owner_that_has_not_the_session_costs_only_what_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A takeover reached the owner, and its answer nobody: whoever comes next knows of the epoch before only."""
    async with ingresses() as sut:
        first, second = sut.alive
        session = await open_websocket(first, session="a")
        await kept(session, 40)
        record = sut.cluster.directory.lookup("a")
        attach = type(sut.cluster.directory).attach

        def forgetful(name: str, sender: str) -> tuple[Any, int]:
            grant, _ = attach(sut.cluster.directory, name, sender)
            return grant, record.epoch - 1

        monkeypatch.setattr(sut.cluster.directory, "attach", forgetful)
        go_to(session, second)
        await run(session, 20)
        await finish(session)


@pytest.mark.usefixtures("deaf")
async def test_an_ingress_that_is_behind_gives_its_copy_up_quietly(caplog: pytest.LogCaptureFixture) -> None:
    """Its own client is still there, while another has gone on with the session elsewhere."""
    async with ingresses(SumModel(), SumModel()) as sut:
        first, second = sut.alive
        before, after = (System(address, sut.cluster, sut.hubs[address]) for address in (first, second))
        async with talk(before, "?session=a&resumable=true") as old:
            assert (await old.receive("opened"))["kept"] == 0
            for start in range(0, 40, 10):
                await old.send("segment", x=ones(10), start=start, acked=start)
                await old.outputs(start, start + 10)
            await old.send("ack", acked=40)
            while sut.hubs[first].get("a").kept != 40:
                await asyncio.sleep(0.001)
            async with talk(after, "?session=a&resume=40") as new:
                opened = await new.receive("opened")
                assert opened["next"] == opened["kept"] == 40
                with caplog.at_level(logging.WARNING):
                    await old.send("segment", x=ones(10), start=40, acked=40)
                    await old.outputs(40, 50)
                    await old.send("ack", acked=50)
                    assert await old.closed() == 4409
                await new.send("segment", x=ones(20), start=40)
                assert await new.outputs(40, 60) == line(40, 60)
        assert caplog.messages == []


async def test_an_ingress_that_looks_for_another_owner_gives_up_when_its_client_has_gone_on() -> None:
    async with ingresses() as sut:
        first, second = sut.alive
        session = await open_websocket(first, session="a")
        await kept(session, 40)
        await sut.cluster.kill("owner-0")
        behind = sut.hubs[first].get("a")
        while behind.carrier is not NOWHERE:
            await asyncio.sleep(0.001)
        sut.cluster.add(SumModel())
        go_to(session, second)
        await run(session, 20)
        while behind.end_reason is None:
            await asyncio.sleep(0.001)
        await finish(session)
        assert sut.cluster.engines["owner-1"].gauges()["sessions_open"] == 0


async def test_an_ingress_with_an_old_copy_does_not_go_on_with_it(tmp_path: Path) -> None:
    """The directory has started again, and knows from the store only that another has gone on with the session."""
    config = dataclasses.replace(CONFIG, durability=DurabilityConfig(store=str(tmp_path)))
    async with ingresses(SumModel(), SumModel(), config=config) as sut:
        first, second = sut.alive
        session = await open_websocket(first, session="a")
        await kept(session, 40)
        while sut.hubs[first]._keeper._task is not None:  # or the next directory would hear of this one
            await asyncio.sleep(0.001)
        await sut.cluster.start_directory()
        go_to(session, second)
        await run(session, 5)
        await kept(session, 60)
        while sut.hubs[second].get("a").kept != session.kept:
            await run(session, 5)
        await sut.cluster.start_directory()
        assert sut.hubs[first].get("a").next < session.next
        sut.kill(second)
        go_to(session, first)
        await run(session, 20)
        await finish(session)


async def test_who_resumes_at_once_by_two_ways_has_the_session_by_one() -> None:
    async with ingresses() as sut:
        _, second = sut.alive
        third = await sut.add()
        session = await orphaned(sut)
        hubs = [sut.hubs[address] for address in (second, second, third, third)]
        found = await asyncio.gather(*(hub.resume("a", session.progress) for hub in hubs), return_exceptions=True)
        assert [type(each) for each in found if not isinstance(each, Session)] == [NotOwner] * 3
        assert sut.cluster.engines["owner-1"].gauges()["sessions_open"] == 1
        (resumed,) = [each for each in found if isinstance(each, Session)]
        again = await sut.hubs[third].resume("a", session.progress)
        assert again.next == resumed.next


async def test_a_foreign_client_is_told_from_where_to_resend() -> None:
    async with ingresses() as sut:
        first, second = sut.alive
        before, after = (System(address, sut.cluster, sut.hubs[address]) for address in (first, second))
        async with talk(before, "?session=a&resumable=true") as client:
            await client.receive("opened")
            for start in range(0, 40, 10):
                await client.send("segment", x=ones(10), acked=start)
                await client.outputs(start, start + 10)
            while not (at := sut.hubs[first].get("a").kept):
                await asyncio.sleep(0.001)
            sut.kill(first)
        await sut.cluster.kill("owner-0")
        sut.cluster.add(SumModel())
        async with talk(after, "?session=a&resume=1") as client:
            assert (
                f"goes on from timestep {at}: its outputs from 1 on"
                in (await client.refused("invalid_input"))["message"]
            )
        async with talk(after, "?session=a&resume=40&rewind=x") as client:
            assert "rewind is 'x'" in (await client.refused("invalid_input"))["message"]
        async with talk(after, "?session=a&resume=40&rewind=3") as client:
            opened = await client.receive("opened")
            assert {key: opened[key] for key in ("next", "progress", "acked", "rewind", "kept")} == {
                "next": at, "progress": at, "acked": at, "rewind": 3, "kept": at,
            }  # fmt: skip
            await client.send("segment", x=ones(1))  # not numbered, it would be taken for another timestep
            assert (await client.refused("start_mismatch"))["details"] == {"expected": at, "rewind": 3}
            await client.send("close")
            assert (await client.refused("start_mismatch"))["details"]["expected"] == at
            await client.send("segment", x=ones(1), start=40)
            assert (await client.refused("start_mismatch"))["details"]["expected"] == at
            await client.send("segment", x=ones(60 - at), start=at, acked=40)
            assert await client.outputs(40, 60) == line(40, 60)
            await client.send("segment", x=ones(1))
            assert await client.outputs(60, 61) == line(60, 61)


async def test_a_state_is_not_given_to_another_model() -> None:
    class OtherModel(SumModel):
        pass

    async with ingresses() as sut:
        first, second = sut.alive
        session = await open_websocket(first)
        await kept(session, 10)
        sut.kill(first)
        await sut.cluster.kill("owner-0")
        sut.cluster.add(OtherModel())
        go_to(session, second)
        with pytest.raises(Unavailable, match=r"with fingerprint .*, the one that is served has"):
            await session.closed()
        assert sut.cluster.directory.num_sessions() == {"owner-1": 0}


async def test_a_record_that_is_damaged_is_refused_and_told(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, durability=DurabilityConfig(store=str(tmp_path)))
    async with ingresses(config=config) as sut:
        first, second = sut.alive
        session = await open_websocket(first, session="a")
        await kept(session, 10)
        sut.kill(first)
        await sut.cluster.kill("owner-0")
        file = tmp_path / "app" / key_of("a")
        file.write_bytes(file.read_bytes()[:-1])
        sut.cluster.add(SumModel())
        go_to(session, second)
        with pytest.raises(Unavailable, match="what is kept of session 'a' is damaged or truncated"):
            await session.closed()


async def test_checkpoints_that_find_no_room_hold_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    config = dataclasses.replace(CONFIG, durability=DurabilityConfig(max_bytes=0))
    async with ingresses(config=config) as sut:
        session = await open_websocket(sut.alive[0])
        await run(session, 100)
        assert session.kept == 0
        assert "the limit is 0: raise durability.max_bytes" in caplog.text
        go_to(session, sut.alive[1])  # its owner lives
        await run(session, 10)
        await finish(session)


async def test_while_the_directory_is_away_checkpoints_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "RETRY_DELAY_S", 0.01)
    async with ingresses() as sut:
        session = await open_websocket(sut.alive[0])
        away, slabs = 3, []

        async def keep(sender: str, slab: Any) -> Any:
            nonlocal away
            away -= 1
            if away >= 0:
                raise Unavailable("it starts again")
            slabs.append(slab)
            return await sut.cluster.actor.keep(sender, slab)

        monkeypatch.setattr(sut.cluster, "keep", keep)
        await kept(session, 40)
        assert away < 0 and all(len(slab) == 1 for slab in slabs)
        await finish(session)


async def test_nothing_is_kept_beyond_what_the_client_has() -> None:
    """Or outputs would be lost that were sent and have not arrived."""
    async with local(SumModel(), config=CONFIG, ack_on_receipt=False) as (cluster, hub):
        session, other = await hub.open("a", resumable=True), await hub.open("b", resumable=True)

        async def stored() -> int:
            """After whatever was to be kept until now."""
            other.ack(other.progress)
            before = other.kept or 0
            while (other.kept or 0) <= before:
                await other.wait(other.submit(np.array(ones(5))))
                other.ack(other.progress)
            assert cluster.actor._store is not None
            return decode_checkpoint(cluster.actor._store.get(key_of("a")), "a").at

        await session.wait(session.submit(np.array(ones(40))))
        session.ack(5)
        assert await stored() == session.kept == 0
        session.ack(40)
        at = await stored()
        assert 0 < at <= 40 and at == session.kept


async def test_sessions_that_end_are_kept_no_longer() -> None:
    async with ingresses() as sut:
        sessions = [await open_websocket(address) for address in sut.alive]
        await asyncio.gather(*(kept(session, 10) for session in sessions))
        await finish(sessions[0])
        sessions[1].abort()
        await sessions[1].closed()
        await dropped(sut.cluster)
        with pytest.raises(UnknownSession):
            await sut.hubs[sut.alive[0]].resume(sessions[0].name, 0)


async def test_a_client_waits_while_there_is_no_room_for_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a cluster starts again there may be room for all only when its last replica is there."""
    async with ingresses() as sut:
        first, second = sut.alive
        session = await open_websocket(first)
        await kept(session, 40)
        resume, full = sut.hubs[second].resume, 3

        async def crowded(*args: Any) -> Session:
            nonlocal full
            full -= 1
            if full >= 0:
                raise TooManySessions("all replicas are full")
            return await resume(*args)

        monkeypatch.setattr(sut.hubs[second], "resume", crowded)
        go_to(session, second)
        await finish(session)
        assert full < 0


async def test_an_ingress_that_stops_while_it_takes_a_session_over_leaves_it_to_others() -> None:
    async with ingresses() as sut:
        first, second = sut.alive
        third = await sut.add()
        session = await open_websocket(first, session="a")
        await kept(session, 40)
        carrier(session)._stopped = True
        break_connection(session)
        sut.cluster.delay_s = lambda: 0.02
        resuming = asyncio.create_task(sut.hubs[second].resume("a", session.progress))
        while not any(ask.adopts >= 0 for frame in sut.cluster.frames for ask in frame.opens):
            await asyncio.sleep(0)
        resuming.cancel()
        await asyncio.gather(resuming, return_exceptions=True)
        await sut.hubs[second].stop()
        assert sut.cluster.engines["owner-0"].gauges()["sessions_open"] == 1
        resumed = await sut.hubs[third].resume("a", session.progress)
        assert resumed.next == session.next


def lone(**options: Any) -> Session:
    spec = ModelSpec("sum", TensorSpec((1,)), {"y": TensorSpec((1,))})
    return Session("a", spec, SessionLimits(64, 256), NOWHERE, **options)


async def test_a_client_keeps_its_inputs_until_they_are_safe_but_not_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "MAX_RETAINED", 20)

    def first(session: Session, kept: int | None, at: int) -> int:
        """The first input that is here when outputs up to `at` are."""
        session.kept = kept
        while session.next < at:
            end = session.submit(np.ones((5, 1), np.float32))
            session.take(64)
            run = session_module.Run(end - 5, end, {"y": np.ones((5, 1), np.float32)})
            session.deliver(end, 0, run)
            session.read()
        return session._inputs[0][0] if session._inputs else session.next

    session = lone(keeps_unanswered=True)
    assert first(session, 0, 15) == 0
    assert first(session, 5, 25) == 5
    assert first(session, 5, 60) == 40, "20 timesteps are kept"
    with pytest.raises(StateLost, match="can go on from timestep 5, its inputs are here from 40 on: open a new one"):
        session.resumed(5, 0)
    assert first(session, 50, 65) == 50, "it can be resumed again"
    session.resumed(50, 0)
    assert len(session.take(64).x) == 15
    assert first(lone(keeps_unanswered=True), None, 40) == 40, "by an ingress that keeps nothing"


async def test_a_session_that_is_in_the_store_only_can_be_aborted(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, durability=DurabilityConfig(store=str(tmp_path)))
    async with ingresses(SumModel(), config=config) as sut:
        _, second = sut.alive
        await orphaned(sut)
        await sut.cluster.start_directory()
        await sut.hubs[second].drop("a")
        await asyncio.gather(*sut.cluster.actor._drops)
        assert not any((tmp_path / "app").iterdir())
        await sut.hubs[second].open("a")
