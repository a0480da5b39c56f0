"""Owners that die: their sessions go on at others, and each output comes exactly once, in order, as if nothing was."""

import asyncio
import dataclasses
import random
import time
from collections.abc import Sequence
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from serve_app import directory as directory_module
from serve_app.config import AppConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.errors import InvalidInput, StateLost, StepFailed, Unavailable, UnknownSession
from serve_app.frame import Answer, Frame, Notice
from serve_app.ingress import hub as hub_module
from serve_app.ingress import outbox as outbox_module
from serve_app.ingress.hub import NOWHERE, Hub
from serve_app.segment import Run
from serve_app.session import Session
from serve_app.spec import SessionLimits
from tests.fakes import FloatSumModel, SumModel
from tests.local import LocalCluster, local

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(
        max_sessions=512,
        max_segment_timesteps=64,
        max_window_timesteps=256,
        checkpoint_timesteps=10,
        checkpoint_apart_s=0,
    ),
    frame=FrameConfig(answer_within_s=0.2),
)


def numbers(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-99, 99, (n, 2))


async def collect(session: Session, *, acknowledge: bool) -> np.ndarray:
    """All outputs, which must follow each other."""
    found, at = [np.empty((0, 2), np.int64)], 0
    async for outputs in session.outputs():
        assert outputs.start == at
        at = outputs.end
        found.append(outputs.values["total"])
        if acknowledge:
            session.ack(at)
    return np.concatenate(found)


async def one(hub: Hub, seed: int, acknowledge: bool) -> int:
    """A session of random segments, sometimes pausing, sometimes waiting for its outputs; compared with the sums."""
    rng = random.Random(seed)
    initial = numbers(seed, 1) if rng.random() < 0.3 else None
    while True:
        try:
            session = await hub.open(f"session {seed}", initial_state=None if initial is None else [initial])
            break
        except Unavailable:  # all owners are gone, others come
            await asyncio.sleep(0.01)
    reader = asyncio.create_task(collect(session, acknowledge=acknowledge))
    x = numbers(seed, rng.randint(0, 240))
    while session.next < len(x):
        session.submit(x[session.next : session.next + rng.randint(1, 12)])
        if rng.random() < 0.7:
            await asyncio.sleep(rng.random() * 0.05)
        if rng.random() < 0.3:
            await session.wait()
    session.close()
    assert await session.closed() == "closed"
    expected = x.cumsum(0) + (0 if initial is None else initial)
    np.testing.assert_array_equal(await reader, expected)
    return len(x)


async def kill_some(cluster: LocalCluster, rng: random.Random) -> None:
    """An owner dies or stops in order, another comes; sometimes all of them are gone for a while."""
    while True:
        await asyncio.sleep(0.05 + rng.random() * 0.2)
        victims = cluster.alive if rng.random() < 0.2 else [rng.choice(cluster.alive)]
        for victim in victims:
            await (cluster.drain if rng.random() < 0.4 else cluster.kill)(victim)
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.2)
        for _ in victims:
            cluster.add(SumModel())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("acknowledge", [False, True])
async def test_nothing_is_lost_or_doubled_whoever_dies(seed: int, acknowledge: bool) -> None:
    rng = random.Random(seed)
    models = [SumModel() for _ in range(3)]
    async with local(*models, config=CONFIG, ack_on_receipt=not acknowledge) as (cluster, hub):
        cluster.delay_s = lambda: rng.random() * 0.02
        killer = asyncio.create_task(kill_some(cluster, rng))
        async with asyncio.timeout(60):
            ran = await asyncio.gather(*(one(hub, 1000 * seed + i, acknowledge) for i in range(40)))
        killer.cancel()
        assert len(cluster.engines) > 4, "somebody has died"
        assert sum(ran) > 1000
        for name in cluster.alive:
            cluster.engines[name].check()


async def test_only_what_is_not_in_the_checkpoint_runs_again() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        session = await hub.open()
        for _ in range(95):
            session.submit(np.ones((1, 2), np.int64))
            await session.wait()
        at, state = session.restore_point()
        assert at >= 80 and state is not None
        await cluster.kill("owner-0")
        cluster.add(SumModel())
        session.submit(np.ones((1, 2), np.int64))
        assert await session.wait() == 96
        assert [int(v) for v in session.read().values["total"][:, 0]] == list(range(1, 97))  # type: ignore[union-attr]
        assert cluster.engines["owner-1"].stats.timesteps == 96 - at


async def test_nothing_runs_again_after_a_drain() -> None:
    """States in slots, states that are evicted, and sessions that have not run yet."""
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        sessions = [await hub.open() for _ in range(40)]  # in 16 slots
        ran = [seed % 7 for seed in range(40)]
        for session, count in zip(sessions, ran, strict=True):
            if count:
                session.submit(np.ones((count, 2), np.int64))
        for session in sessions:
            await session.wait()
        assert cluster.engines["owner-0"].gauges()["sessions_evicted"] > 0
        cluster.add(SumModel())
        await cluster.drain("owner-0")
        for session, count in zip(sessions, ran, strict=True):
            session.submit(np.ones((2, 2), np.int64))
            assert await session.wait() == count + 2
            outputs = session.read()
            assert outputs is not None
            assert outputs.values["total"][:, 0].tolist() == list(range(1, count + 3))
        assert cluster.engines["owner-1"].stats.timesteps == 2 * len(sessions)


async def test_inputs_are_kept_no_longer_than_they_are_needed() -> None:
    async with local(SumModel(), config=CONFIG) as (_, hub):
        session = await hub.open()
        for _ in range(500):
            session.submit(np.ones((1, 2), np.int64))
            await session.wait()
            session.read()
        assert len(session._inputs) <= 2 * CONFIG.session.checkpoint_timesteps
        assert len(session._checkpoints) <= 2


async def test_a_session_that_closes_while_its_owner_dies_ends_in_order() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        session = await hub.open()
        session.submit(np.ones((30, 2), np.int64))
        session.close()
        await cluster.kill("owner-0")
        cluster.add(SumModel())
        assert await session.closed() == "closed"
        assert session.progress == 30


async def test_a_failed_step_keeps_what_is_needed_to_go_on_elsewhere() -> None:
    class Failing(FloatSumModel):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if (x == 666).any():
                raise RuntimeError("such a number")
            return super().forward(x, state)

    async with local(Failing(), config=CONFIG) as (cluster, hub):
        session = await hub.open()
        session.submit(np.ones((3, 1), np.float32))
        await session.wait()
        session.submit(np.full((1, 1), 666, np.float32))
        with pytest.raises(StepFailed):
            await session.wait()
        await cluster.kill("owner-0")
        cluster.add(Failing())
        session.submit(np.ones((2, 1), np.float32))
        assert await session.wait() == 5
        assert session.read().values["total"][:, 0].tolist() == [1, 2, 3, 4, 5]  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", [False, True])
async def test_an_owner_may_die_just_when_it_has_taken_a_session_in(
    parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call brings that it has, another fails, and whoever opens the session is told of the first after both."""
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        call, dies, waits = cluster.call, asyncio.get_running_loop().create_future(), asyncio.Event()

        async def dying(owner: str, frame: Frame) -> Answer:
            if owner == "owner-0" and not frame.opens:
                waits.set()
                await dies
            answer = await call(owner, frame)
            if owner == "owner-0" and frame.opens and cluster.engines[owner].gauges()["sessions_open"] == 2:
                cluster.add(SumModel())
                dies.set_exception(StateLost("it has died"))
                cluster.stopped.add(owner)  # nor is it heard of, so that nothing is placed there
                moving = [Notice(ask.epoch, "moving") for ask in frame.opens if parts]
                answer = dataclasses.replace(answer, notices=(*answer.notices, *moving))
            return answer

        monkeypatch.setattr(cluster, "call", dying)
        grants = Mock(side_effect=cluster.directory.open)
        monkeypatch.setattr(cluster.directory, "open", grants)
        async with asyncio.timeout(10):
            first = await hub.open()
            await waits.wait()
            for session in [first, await hub.open()]:
                session.submit(np.ones((3, 2), np.int64))
                assert await session.wait() == 3
        assert cluster.engines["owner-1"].gauges()["sessions_open"] == 2
        assert grants.call_count == 4, "each session has moved once"


async def test_a_session_whose_next_owner_dies_too_is_still_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        session, call = await hub.open(), cluster.call

        async def dying(owner: str, frame: Frame) -> Answer:
            if owner == "owner-1":
                cluster.add(SumModel())
                raise StateLost("it has died")
            return await call(owner, frame)

        monkeypatch.setattr(cluster, "call", dying)
        cluster.add(SumModel())
        await cluster.kill("owner-0")
        async with asyncio.timeout(10):
            session.submit(np.ones((3, 2), np.int64))
            assert await session.wait() == 3
        assert cluster.engines["owner-2"].gauges()["sessions_open"] == 1
        assert hub.get(session.name) is session


async def test_without_another_owner_it_is_lost_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "MOVE_WITHIN_S", 0.2)
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        session = await hub.open()
        await cluster.kill("owner-0")
        with pytest.raises(StateLost):
            async with asyncio.timeout(5):
                await session.closed()
        assert not hub.num_sessions


async def test_a_session_that_is_given_up_is_not_moved() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        session = await hub.open()
        session.abort()
        await cluster.kill("owner-0")
        cluster.add(SumModel())
        with pytest.raises(StateLost):
            await session.closed()
        assert cluster.engines["owner-1"].gauges()["sessions_open"] == 0


async def test_without_checkpoints_a_dead_owner_takes_its_sessions_along() -> None:
    config = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, checkpoint_timesteps=0))
    async with local(SumModel(), SumModel(), config=config) as (cluster, hub):
        session = await hub.open()
        await cluster.kill("owner-0")
        with pytest.raises(StateLost):
            await session.closed()


async def test_a_step_that_failed_while_the_way_was_broken_is_told() -> None:
    async with local(FloatSumModel(), config=CONFIG) as (_, hub):
        spec = (await hub.models())["silero_vad"]
    session = Session("a", spec, SessionLimits(64, 256), NOWHERE, keeps_unanswered=True)
    session.submit(np.ones((5, 1), np.float32))
    assert [len(session.take(64).x), len(session.take(64).x)] == [5, 0]
    session.resumed(2, 0)  # two have arrived
    assert session.take(64).start == 2
    session.resumed(3, 1)  # and the fourth has failed
    with pytest.raises(StepFailed, match="resend from 3"):
        session.submit(np.ones((1, 1), np.float32))
    assert session.submit(np.ones((1, 1), np.float32)) == 4
    entry = session.take(64)
    assert (entry.start, len(entry.x), entry.rewind) == (3, 1, 1)


X = np.ones((12, 1), np.float32)


async def alone(**kwargs: bool) -> Session:
    """A session that has no owner."""
    async with local(FloatSumModel(), config=CONFIG) as (_, hub):
        spec = (await hub.models())["silero_vad"]
    return Session("a", spec, SessionLimits(64, 8), NOWHERE, **kwargs)


def run_of(start: int, end: int) -> Run:
    return Run(start, end, {"total": X[start:end].cumsum(0)})


def fail_at(session: Session, timestep: int, rewind: int) -> None:
    failed = StepFailed("the model failed", expected=timestep, rewind=rewind)
    session.notice("failed", failed.to_wire(), "", 0)


async def test_inputs_are_kept_until_the_first_checkpoint_of_a_session_that_was_taken_over() -> None:
    session = await alone(retains=True)
    session.adopt(0)
    session.adopted(0, 0)
    session.submit(X[:4])
    session.take(64)
    session.deliver(4, 0, run_of(0, 2))
    assert not session.can_move
    session.checkpoint(2, (X,))
    assert session.can_move
    session.moved(NOWHERE, 2)
    assert len(session.take(64).x) == 2


async def test_what_is_submitted_after_a_failed_step_is_kept_where_the_owner_had_more_from_elsewhere() -> None:
    session = await alone(retains=True)
    session.adopt(0)
    session.adopted(4, 0)
    fail_at(session, 0, 1)
    session.submit(X[:2], 0)
    session.take(64)
    session.submit(X[:2])
    session.deliver(2, 1, run_of(0, 2))
    session.arrived(2)
    assert len(session.take(64).x) == 2


async def test_a_session_does_not_go_on_from_a_state_before_the_outputs_below_are_here() -> None:
    session = await alone(retains=True, ack_on_receipt=False)
    session.adopt(0)
    session.adopted(4, 0)
    session.deliver(4, 0, run_of(2, 4))  # the answer before is on its way
    session.checkpoint(4, (X,))
    assert not session.can_move
    session.deliver(4, 0, run_of(0, 2))
    assert session.can_move


async def test_a_failed_step_is_told_once_though_it_is_heard_of_twice() -> None:
    session = await alone(keeps_unanswered=True)
    session.submit(X[:4])
    session.resumed(0, 1)
    with pytest.raises(StepFailed):
        session.check()
    session.submit(X[:4])
    fail_at(session, 0, 1)
    session.check()
    assert session.next == 4


async def test_a_step_that_fails_when_it_runs_again_gives_up_nothing_that_ran_before() -> None:
    """Of a session that has moved: its client has had the outputs."""
    session = await alone(retains=True)
    session.submit(X[:6])
    session.take(64)
    session.deliver(6, 0, run_of(0, 4))
    session.moved(NOWHERE, 0)
    session.take(64)
    fail_at(session, 2, 1)
    assert session.next == 4
    with pytest.raises(StepFailed, match="resend from 4") as caught:
        session.check()
    assert caught.value.details["expected"] == 4
    entry = session.take(64)
    assert (entry.start, len(entry.x), entry.rewind) == (2, 2, 1)


async def test_what_runs_again_is_sent_in_parts_that_fit_the_owners_window() -> None:
    session = await alone(retains=True)
    session.submit(X[:8])
    session.take(64)
    session.deliver(8, 0, run_of(0, 4))
    session.read()
    session.submit(X[8:])
    session.moved(NOWHERE, 0)
    assert [len(session.take(64).x) for _ in range(2)] == [8, 4]


async def test_outputs_that_came_too_early_count_no_more_when_another_owner_has_the_session() -> None:
    """A step that fails there changes what comes after it."""
    session = await alone(retains=True)
    session.submit(X[:6])
    session.take(64)
    session.deliver(6, 0, run_of(4, 6))
    session.moved(NOWHERE, 0)
    session.take(64)
    session.deliver(6, 0, run_of(0, 2))
    fail_at(session, 2, 1)
    session.submit(X[:4], 2)
    session.take(64)
    session.deliver(6, 1, run_of(2, 4))
    assert session.progress == 4


async def test_a_failed_step_may_be_heard_of_before_its_session_is_known_to_be_taken_over() -> None:
    session = await alone(retains=True)
    session.adopt(0)
    fail_at(session, 2, 2)
    session.adopted(4, 1)
    assert (session.next, session.accepted, session.rewind) == (2, 2, 2)


async def test_sessions_of_an_owner_that_stands_still_go_on_when_its_lease_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directory_module, "LEASE_S", 0.2)
    monkeypatch.setattr(outbox_module, "LATE_S", 0.5)
    async with local(SumModel(), SumModel(), config=CONFIG) as (cluster, hub):
        cluster.directory._started_at -= 60
        sessions = [await hub.open() for _ in range(4)]
        stopped = sessions[0].owner
        cluster.stopped.add(stopped)
        gone, asked = cluster.gone, list[Sequence[str]]()

        async def gone_later(owners: Sequence[str]) -> list[str]:
            asked.append(owners)
            if len(asked) == 1:
                raise RuntimeError("who watches over owners has failed")
            return await gone(owners)

        monkeypatch.setattr(cluster, "gone", gone_later)
        began = time.monotonic()
        for session in sessions:
            session.submit(np.ones((3, 2), np.int64))
        assert await asyncio.gather(*(session.wait() for session in sessions)) == [3] * 4
        assert stopped not in {session.owner for session in sessions}
        assert time.monotonic() - began < 5
        cluster.stopped.clear()
        for session in sessions:
            session.submit(np.ones((3, 2), np.int64))
        assert await asyncio.gather(*(session.wait() for session in sessions)) == [6] * 4


async def test_a_session_is_moved_by_hand_and_nothing_runs_again() -> None:
    """While it runs, with others at the same owner; there and back."""
    async with local(SumModel(), SumModel(), SumModel(), config=CONFIG) as (cluster, hub):
        sessions = [await hub.open(f"{i}") for i in range(6)]
        readers = [asyncio.create_task(collect(session, acknowledge=False)) for session in sessions]
        session, x = sessions[0], numbers(1, 200)
        first = session.owner
        for at in range(0, 200, 4):
            for each in sessions:
                each.submit(x[at : at + 4])
            if at in (80, 120):
                to = "owner-2" if session.owner != "owner-2" else None
                assert await hub.migrate("0", to) == session.owner
                while session.owner == first:
                    await asyncio.sleep(0.001)
                assert to in (None, session.owner)
                first = session.owner
            await session.wait()
        await asyncio.gather(*(each.wait() for each in sessions))
        ran = sum(engine.stats.timesteps for engine in cluster.engines.values())
        assert ran == 6 * 200
        for each, reader in zip(sessions, readers, strict=True):
            each.close()
            np.testing.assert_array_equal(await reader, x.cumsum(0))
        for engine in cluster.engines.values():
            engine.check()
            assert engine.gauges()["retained_bytes"] == 0


async def test_who_cannot_move_is_told_why() -> None:
    fixed = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, checkpoint_timesteps=0))
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        await hub.open("a")
        with pytest.raises(UnknownSession):
            await hub.migrate("b")
        with pytest.raises(Unavailable, match="no other replica"):
            await hub.migrate("a")
        cluster.add(SumModel())
        with pytest.raises(InvalidInput, match="cannot go to 'owner-0', choose one of: owner-1"):
            await hub.migrate("a", "owner-0")
    async with local(SumModel(), SumModel(), config=fixed) as (_, hub):
        await hub.open("a")
        with pytest.raises(InvalidInput, match="checkpoint_timesteps"):
            await hub.migrate("a")
