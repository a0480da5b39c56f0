"""Sessions through hub, outbox and engine, in one process."""

import asyncio
import dataclasses
import itertools
import random
from uuid import uuid4

import numpy as np
import pytest

from serve_app.config import AppConfig, EngineConfig, FrameConfig, ModelConfig, SessionConfig
from serve_app.directory import Ask, Grant
from serve_app.engine.engine import spare_rows_of
from serve_app.errors import (
    InvalidInput,
    NotOwner,
    SessionEnded,
    SessionExists,
    StartMismatch,
    StateLost,
    StepFailed,
    TooManySessions,
    Unavailable,
    UnknownModel,
    UnknownSession,
    WindowFull,
)
from serve_app.frame import Answer, Frame
from serve_app.ingress import hub as hub_module
from serve_app.ingress import outbox as outbox_module
from serve_app.ingress.hub import Hub
from serve_app.session import Session
from tests.fakes import FloatSumModel, SumModel
from tests.local import REQUEST, LocalCluster, Mortal, local

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(
    engine=EngineConfig(device="cpu", slots=16, max_batch_size=8, max_step_timesteps=4),
    session=SessionConfig(max_sessions=512, max_segment_timesteps=64, max_window_timesteps=256),
    frame=FrameConfig(answer_within_s=0.2),
)
ALONE = dataclasses.replace(CONFIG, session=dataclasses.replace(CONFIG.session, checkpoint_timesteps=0))
"""Sessions that end with their owner."""
PATIENT = dataclasses.replace(CONFIG, frame=FrameConfig(answer_within_s=60))  # no call comes back for its time


def ones(n: int) -> np.ndarray:
    return np.ones((n, 2), np.int64)


async def collect(session: Session) -> list[int]:
    return [int(v) async for outputs in session.outputs() for v in outputs.values["total"][:, 0]]


async def test_many_sessions_get_each_output_once_in_order() -> None:
    async with local(SumModel(), SumModel(), config=CONFIG) as (cluster, hub):

        async def one(seed: int) -> None:
            rng, n = random.Random(seed), 0
            session = await hub.open()
            reader = asyncio.create_task(collect(session))
            for _ in range(rng.randint(0, 12)):
                n = session.submit(ones(rng.randint(1, 20)))
                if rng.random() < 0.5:
                    assert await session.wait(rng.randint(0, n)) <= n
            session.close()
            assert await session.closed() == "closed"
            assert await reader == list(range(1, n + 1))

        await asyncio.gather(*(one(seed) for seed in range(200)))
        assert cluster.directory.num_sessions() != {}
        assert all(stats.segments > 100 for stats in (engine.stats for engine in cluster.engines.values()))
        assert hub.num_sessions == 0
    for engine in cluster.engines.values():
        engine.check()


async def test_segments_of_many_sessions_share_a_frame() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        sessions = await asyncio.gather(*(hub.open() for _ in range(100)))
        before = len(cluster.frames)
        for session in sessions:
            session.submit(ones(1))
        await asyncio.gather(*(session.wait() for session in sessions))
        brought = [int((frame.length > 0).sum()) for frame in cluster.frames[before:] if frame.length.sum()]
        assert brought == [50, 50]  # the one travels while the other one runs


def held_up(cluster: LocalCluster) -> tuple[list[int], asyncio.Event]:
    """Frames from now on arrive when that is set: the timesteps of each."""
    arrived, may_arrive = cluster.call, asyncio.Event()
    sent: list[int] = []

    async def call(owner: str, frame: Frame) -> Answer:
        sent.append(len(frame.x))
        await may_arrive.wait()
        return await arrived(owner, frame)

    cluster.call = call  # type: ignore[method-assign]
    return sent, may_arrive


async def test_two_frames_are_on_their_way_at_most_whatever_is_pending() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        sessions = await asyncio.gather(*(hub.open() for _ in range(40)))
        sent, may_arrive = held_up(cluster)
        for session in sessions:
            session.submit(ones(1))
            await asyncio.sleep(0)  # each alone could have a frame
        for _ in range(10):
            await asyncio.sleep(0)
        assert len([size for size in sent if size]) == 2
        may_arrive.set()
        await asyncio.gather(*(session.wait() for session in sessions))
        assert sum(sent) == 40


async def test_what_is_not_worth_a_second_frame_waits_for_the_first() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        sessions = await asyncio.gather(*(hub.open() for _ in range(60)))
        sent, may_arrive = held_up(cluster)
        for some, expected in ((sessions[:12], [12]), (sessions[12:20], [12]), (sessions[20:], [12, 32])):
            for session in some:
                session.submit(ones(1))
            for _ in range(10):
                await asyncio.sleep(0)
            assert [size for size in sent if size] == expected
        may_arrive.set()
        await asyncio.gather(*(session.wait() for session in sessions))
        assert sum(sent) == 60


async def test_a_fault_of_who_uses_a_session_costs_no_other() -> None:
    told: list[str | None] = []

    def fault() -> None:
        told.append(faulty.end_reason)
        raise RuntimeError("a fault")

    async with local(SumModel(), config=CONFIG) as (_, hub):
        faulty, *others = [await hub.open() for _ in range(4)]
        faulty.changed = fault
        for _ in range(3):
            for session in (faulty, *others):
                if session.end_reason is None:
                    session.submit(ones(2))
            for session in others:
                await session.wait()
        for session in others:
            session.close()
            assert await collect(session) == [1, 2, 3, 4, 5, 6]
        assert await faulty.closed() == "aborted"
        assert told[-1] == "aborted", "it is told of the end all the same"


async def test_closed_sessions_with_outputs_to_fetch_hold_up_nobody() -> None:
    """Their frames have landed, though the calls that brought them may wait for long."""
    config = dataclasses.replace(
        CONFIG, engine=EngineConfig(device="cpu", max_batch_size=128), frame=FrameConfig(answer_within_s=60)
    )
    async with local(SumModel(), config=config, ack_on_receipt=False) as (_, hub), asyncio.timeout(10):
        other, *sessions = [await hub.open() for _ in range(101)]
        for i in (1, 2):
            for session in sessions:
                session.submit(ones(1))  # two frames, which share a step and so an answer: then two calls wait
            await asyncio.gather(*(session.wait(i) for session in sessions))
        for session in sessions[:8]:
            session.close()
            assert await session.closed() == "closed"
        other.submit(ones(3))
        assert await other.wait() == 3


async def test_frames_are_cut_by_bytes_and_a_session_is_in_one_at_a_time() -> None:
    config = dataclasses.replace(
        CONFIG,
        session=SessionConfig(max_segment_timesteps=10_000, max_window_timesteps=20_000),
        frame=FrameConfig(max_bytes=65536),
    )
    async with local(SumModel(), config=config) as (cluster, hub):
        cluster.delay_s = lambda: 0.001
        sessions = [await hub.open() for _ in range(2)]
        for session in sessions:
            session.submit(ones(10_000))
        await asyncio.gather(*(session.wait() for session in sessions))
        for session in sessions:
            outputs = session.read()
            assert outputs is not None
            assert outputs.values["total"][:, 1].tolist() == list(range(1, 10_001))
        assert max(frame.x.nbytes for frame in cluster.frames) <= 65536


async def test_submit_checks_and_names_what_is_wrong() -> None:
    async with local(SumModel(), config=CONFIG) as (_, hub):
        session = await hub.open("a")
        for x, message in (
            (np.ones((1, 3), np.int64), r"shape \[1, 3\] arrived, the model takes \[T, 2\]"),
            (np.ones((1, 2), np.float32), "float32 arrived, the model takes int64"),
            (ones(0), "empty"),
            (ones(65), "65 timesteps arrived, the limit is 64"),
            (np.int64(3), "shape"),
        ):
            with pytest.raises(InvalidInput, match=message):
                session.submit(x)
        with pytest.raises(StartMismatch, match="starts at 7, 0 was expected"):
            session.submit(ones(1), start=7)
        with pytest.raises(InvalidInput, match="0 timesteps submitted, 1 was waited for"):
            await session.wait(1)
        assert session.submit(ones(4)) == 4
        assert session.submit(ones(4), start=0) == 4  # a resend
        assert session.submit(ones(4), start=2) == 6  # half of one
        assert await session.wait() == 6


async def test_nan_is_refused_where_it_enters() -> None:
    async with local(FloatSumModel(), config=CONFIG) as (_, hub):
        session, other = await hub.open(), await hub.open()
        for value in (np.nan, np.inf):
            with pytest.raises(InvalidInput, match=r"holds NaN or infinity: clean it, or set session\.nan=pass"):
                session.submit(np.array([[1.0], [value]], np.float32))
        for each in (session, other):
            await each.wait(each.submit(np.ones((1, 1), np.float32)))
            outputs = each.read()
            assert outputs is not None
            assert outputs.values["total"].tolist() == [[1.0]]


async def test_window_is_a_clear_error_until_outputs_are_read() -> None:
    async with local(SumModel(), config=CONFIG) as (_, hub):
        session = await hub.open()
        for _ in range(4):
            session.submit(ones(64))
        with pytest.raises(WindowFull, match="257 timesteps submitted and not read, the limit is 256"):
            session.submit(ones(1))
        await session.wait()
        assert session.read() is not None
        session.submit(ones(1))
        assert await session.wait() == 257


async def test_a_failed_step_is_told_once_and_the_session_goes_on() -> None:
    async with local(SumModel(poison=0), config=CONFIG) as (_, hub):
        session, other = await hub.open(), await hub.open()
        session.submit(ones(3))
        await session.wait()
        session.submit(-ones(2))
        with pytest.raises(StepFailed, match="resend from 3"):
            await session.wait()
        session.submit(ones(2))
        other.submit(ones(2))
        assert (await session.wait(), await other.wait()) == (5, 2)
        session.submit(-ones(2))
        while session.rewind < 2:
            await asyncio.sleep(0)
        with pytest.raises(StepFailed):  # or the next segment would silently take the lost one's place
            session.submit(ones(1))
        session.close()
        assert await collect(session) == [1, 2, 3, 4, 5]


async def test_session_ids_are_taken_until_closed() -> None:
    async with local(SumModel(), config=CONFIG) as (_, hub):
        session = await hub.open("a")
        with pytest.raises(SessionExists, match="'a' is open already"):
            await hub.open("a")
        session.close()
        await session.closed()
        with pytest.raises(SessionEnded, match="closed"):
            session.submit(ones(1))
        again = await hub.open("a")
        again.submit(ones(1))
        assert await again.wait() == 1
        with pytest.raises(UnknownSession, match="'b'"):
            hub.get("b")


async def test_limits_and_unknown_models() -> None:
    config = dataclasses.replace(CONFIG, session=SessionConfig(max_sessions=2))
    async with local(SumModel(), config=config) as (_, hub):
        first = await hub.open()
        await hub.open()
        with pytest.raises(TooManySessions, match="2 sessions are open"):
            await hub.open()
        with pytest.raises(UnknownModel, match="'whisper' is not served here: silero_vad"):
            await hub.open(model="whisper")
        first.close()
        await first.closed()
        await hub.open()


async def test_sessions_of_two_models_at_once() -> None:
    config = dataclasses.replace(CONFIG, model=ModelConfig("silero_vad", served_as="other"))
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        cluster.add(SumModel(poison=0), config)
        assert (await hub.models()).keys() == {"silero_vad", "other"}
        with pytest.raises(InvalidInput, match="say which one: other, silero_vad"):
            await hub.open()
        sessions = {name: await hub.open(f"a {name}", name) for name in ("silero_vad", "other")}
        for session in sessions.values():
            session.submit(-ones(2))
            session.close()
        assert await collect(sessions["silero_vad"]) == [-1, -2]
        with pytest.raises(StepFailed):
            await collect(sessions["other"])


async def test_a_wrong_initial_state_frees_its_place() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        with pytest.raises(InvalidInput, match="initial state"):
            await hub.open("a", initial_state=[np.zeros((1, 9), np.int64)])
        session = await hub.open("a", initial_state=[np.array([[41, 0]])])
        session.submit(ones(1))
        session.close()
        assert await collect(session) == [42]
        assert cluster.engines["owner-0"].gauges()["sessions_open"] == 0


async def test_what_cannot_be_sent_costs_no_other() -> None:
    async with local(SumModel(), config=ALONE) as (_, hub):
        other = await hub.open("other")
        with pytest.raises(InvalidInput, match="is no text that UTF-8 has"):
            await hub.open("\ud800")
        with pytest.raises(InvalidInput, match="holds objects, expected numbers"):
            await hub.open("a", initial_state=[np.array([[10**30, 0]])])
        for acked, rewind in ((2**63, 0), (0, 2**63), (-2, 0)):
            with pytest.raises(InvalidInput, match="no such numbers"):
                await hub.resume("other", acked, rewind)
        other.submit(ones(2))
        other.close()
        assert await collect(other) == [1, 2]


async def test_a_dead_owner_ends_its_sessions_and_no_others() -> None:
    async with local(SumModel(), SumModel(), config=ALONE) as (cluster, hub):
        sessions = [await hub.open() for _ in range(4)]
        await cluster.kill("owner-0")
        lost, alive = [], []
        for session in sessions:
            try:
                session.submit(ones(1))
                await session.wait()
                alive.append(session)
            except StateLost:
                lost.append(session)
        assert (len(lost), len(alive)) == (2, 2)
        fresh = [await hub.open() for _ in range(3)]  # all at the other
        for session in fresh:
            session.submit(ones(1))
            assert await session.wait() == 1
        await cluster.kill("owner-1")
        with pytest.raises(Unavailable, match="no replica is ready"):
            await hub.open()


async def test_the_way_to_an_owner_that_nobody_needs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that goes while it has no sessions is not heard of again, and the next has another name."""
    monkeypatch.setattr(hub_module, "WATCH_S", 0.0)
    monkeypatch.setattr(outbox_module, "UNUSED_S", 0.0)
    async with local(SumModel(), config=CONFIG) as (_, hub):
        for _ in range(2):
            session = await hub.open()
            session.submit(ones(1))
            assert await session.wait() == 1
            assert len(hub._outboxes) == 1
            session.close()
            assert await session.closed() == "closed"
            async with asyncio.timeout(10):
                while hub._outboxes:
                    await asyncio.sleep(0)


async def test_idle_sessions_are_told() -> None:
    async with local(SumModel(), config=CONFIG) as (_, hub):
        await hub.open()  # loads compiled code, which may take longer than a session is to be idle here
    config = dataclasses.replace(CONFIG, session=SessionConfig(idle_timeout_s=0.1))
    model = SumModel()
    async with local(model, config=config) as (_, hub):
        session = await hub.open("a")
        with pytest.raises(SessionEnded, match=r"idle"):
            await session.closed()
        with pytest.raises(SessionEnded, match="idle"):
            session.submit(ones(1))
        assert model.ended == [("a", "idle")]


async def test_a_vanished_client_costs_the_others_nothing() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        stays, leaves = await hub.open(), await hub.open()
        for _ in range(3):
            stays.submit(ones(64))
            leaves.submit(ones(64))
        leaves.abort()
        assert await leaves.closed() == "aborted"
        stays.close()
        assert await collect(stays) == list(range(1, 193))
        assert cluster.engines["owner-0"].gauges()["sessions_open"] == 0


async def test_unacknowledged_outputs_stay_for_a_client_behind_an_ingress() -> None:
    async with local(SumModel(), config=CONFIG, ack_on_receipt=False) as (cluster, hub):
        session = await hub.open("a")
        session.submit(ones(6))
        await session.wait()
        for start in (0, 2):
            outputs = session.peek(start)
            assert outputs is not None
            assert outputs.values["total"][:, 0].tolist() == list(range(start + 1, 7))
        session.ack(4)
        assert session.peek(0).start == 4  # type: ignore[union-attr]
        session.close()
        await session.closed()
        assert hub.get("a") is session
        session.ack(6)
        while hub.num_sessions:
            await asyncio.sleep(0.01)
        with pytest.raises(SessionEnded, match="closed"):
            hub.get("a")
    assert cluster.engines["owner-0"].gauges()["retained_bytes"] == 0


async def test_aborting_what_is_in_flight_holds_up_nobody() -> None:
    async with local(SumModel(), config=PATIENT) as (cluster, hub), asyncio.timeout(20):
        other = await hub.open()
        cluster.delay_s = lambda: 0.05
        for _ in range(3):
            session = await hub.open()  # in whose frame the abort of the one before travels
            frames = len(cluster.frames)
            session.submit(ones(3))
            while not any(frame.length.any() for frame in cluster.frames[frames:]):
                await asyncio.sleep(0)
            session.abort()
        assert await other.wait(other.submit(ones(2))) == 2


async def test_stopping_waits_for_its_calls() -> None:
    async with local(SumModel(), config=PATIENT) as (cluster, hub):
        closed, read, unread = [await hub.open() for _ in range(3)]
        for session in (closed, read, unread):
            session.submit(ones(3))
        await asyncio.gather(closed.wait(), read.wait())
        assert closed.read() is not None
        assert read.read() is not None
        closed.close()
        await closed.closed()
        await hub.stop()
        assert len(cluster.frames) > 1
        assert cluster.num_cancelled == 0
        assert await unread.closed() == "aborted"
        with pytest.raises(Unavailable, match="this sender was stopped"):
            await hub.open()


async def test_frames_that_overtake_each_other_keep_each_session_in_order() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        delays = itertools.cycle((0.02, 0.0))
        cluster.delay_s = lambda: next(delays)

        async def one(seed: int) -> None:
            rng = random.Random(seed)
            session = await hub.open()
            for _ in range(20):
                n = session.submit(ones(rng.randint(1, 6)))
                if seed == 0:
                    await session.wait(n)  # so that no two of its segments travel in one frame
                await asyncio.sleep(rng.uniform(0, 0.004))
            session.close()
            assert await collect(session) == list(range(1, session.next + 1))

        await asyncio.gather(*(one(seed) for seed in range(3 * outbox_module.MIN_SHARE)))
        assert len(cluster.frames) >= 20
        assert cluster.num_overtaken > 0
        assert cluster.engines["owner-0"].stats.refusals == {}


@pytest.mark.parametrize(("timesteps", "frames"), [(1, 1), (outbox_module.MIN_TIMESTEPS // 16, 2)])
async def test_a_second_frame_goes_at_once_if_it_has_enough_to_run(timesteps: int, frames: int) -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        sessions = [await hub.open() for _ in range(32)]
        before = len(cluster.frames)
        cluster.delay_s = lambda: 0.2
        for half in (sessions[:16], sessions[16:]):
            for session in half:
                session.submit(ones(timesteps))
            for _ in range(5):
                await asyncio.sleep(0)  # turns of the event loop, far fewer than the first frame takes
        assert sum(len(frame.x) > 0 for frame in cluster.frames[before:]) == frames
        await asyncio.gather(*(session.wait(timesteps) for session in sessions))


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_place_that_is_granted_to_a_sender_that_stops_is_free(
    begins: bool, cancelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        opens, asked, may_open = cluster.open, asyncio.Event(), asyncio.Event()

        async def slow(ask: Ask) -> Grant:
            asked.set()
            await may_open.wait()
            return await opens(ask)

        monkeypatch.setattr(cluster, "open", slow)
        opening = asyncio.create_task(hub.begin("a", None) if begins else hub.open("a"))
        await asked.wait()
        if cancelled:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        stopping = asyncio.create_task(hub.stop())
        await asyncio.sleep(0)
        may_open.set()
        await stopping
        with pytest.raises(asyncio.CancelledError if cancelled else Unavailable):
            await opening
        with pytest.raises(UnknownSession):
            await cluster.describe("a")


async def test_who_resumes_a_session_and_is_cancelled_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        session = await hub.open("a", resumable=True)
        assert await session.wait(session.submit(ones(3))) == 3
        attaches, attached, may_go_on = cluster.attach, asyncio.Event(), asyncio.Event()

        async def slow(name: str, sender: str) -> tuple[Grant, int]:
            found = await attaches(name, sender)
            attached.set()
            await may_go_on.wait()
            return found

        monkeypatch.setattr(cluster, "attach", slow)
        other = Hub(cluster, ack_on_receipt=False)
        resuming = asyncio.create_task(other.resume("a", 3))
        await attached.wait()
        resuming.cancel()
        await asyncio.gather(resuming, return_exceptions=True)
        may_go_on.set()
        while True:
            try:
                again = await other.resume("a", 3)
                break
            except NotOwner:
                await asyncio.sleep(0)
        assert await again.wait(again.submit(ones(2))) == 5
        assert cluster.engines["owner-0"].stats.timesteps == 5, "nothing has run twice"
        await other.stop()


async def test_calls_do_not_belong_to_the_request_that_caused_them() -> None:
    """A Serve call dies with the request in whose context it was made, and would take others' segments along."""
    async with local(SumModel(), config=CONFIG) as (cluster, hub):

        async def request(name: str) -> None:
            REQUEST.set(name)
            session = await hub.open()
            session.submit(ones(3))
            await session.wait()

        await asyncio.gather(*(asyncio.create_task(request(f"request {i}")) for i in range(4)))
        assert set(cluster.requests) == {"none"}


async def test_what_is_submitted_at_once_goes_with_the_opening() -> None:
    async with local(SumModel(), config=CONFIG) as (cluster, hub):
        sessions = []
        for i in range(3):
            sessions.append(await hub.begin(f"s{i}", None))
            sessions[-1].submit(ones(2))
        await asyncio.gather(*(session.wait() for session in sessions))
        opening = [frame for frame in cluster.frames if frame.opens]
        assert sorted(ask.epoch for frame in opening for ask in frame.opens) == [s.epoch for s in sessions]
        assert all(ask.epoch in frame.epoch[frame.length == 2] for frame in opening for ask in frame.opens)
        assert [int(session.read().values["total"][-1, 0]) for session in sessions] == [2, 2, 2]  # type: ignore[union-attr]


async def test_what_the_owner_refuses_a_begun_session_with_ends_it() -> None:
    limits = dataclasses.replace(CONFIG.session, max_sessions=1)
    async with local(SumModel(), config=dataclasses.replace(CONFIG, session=limits)) as (cluster, hub):
        cluster.directory.register(dataclasses.replace(cluster.owners["owner-0"], max_sessions=100))
        for _ in range(spare_rows_of(1)):
            await hub.begin(uuid4().hex, None)
        first, second = [await hub.begin(name, None) for name in "ab"]
        for session in (first, second):
            session.submit(ones(1))
        with pytest.raises(TooManySessions):
            await second.wait()
        assert await first.wait() == 1
        assert hub.num_sessions == spare_rows_of(1) + 1


async def test_a_begun_session_goes_on_elsewhere_when_its_owner_is_gone_by_then() -> None:
    async with local(SumModel(), SumModel(), config=CONFIG) as (cluster, hub):
        session = await hub.begin("a", None)
        session.submit(ones(3))
        await cluster.kill(session.owner)
        assert await session.wait() == 3
        assert session.owner in cluster.alive


@pytest.mark.parametrize("lives", [True, False])
async def test_a_session_that_is_just_moving_is_discarded_by_the_next_call(lives: bool) -> None:
    async with local(SumModel(), SumModel(), config=CONFIG) as (cluster, hub):
        theirs = Mortal(cluster)
        other = Hub(theirs, ack_on_receipt=False)
        session = await other.open("a", resumable=True)
        assert await session.wait(session.submit(ones(3))) == 3
        asked, may_ask = asyncio.Event(), asyncio.Event()

        async def slow(ask: Ask) -> Grant:
            asked.set()
            await may_ask.wait()
            return await cluster.open(ask)

        theirs.open = slow  # type: ignore[attr-defined]
        await hub.migrate("a")
        await asked.wait()
        theirs.dead = not lives
        with pytest.raises(NotOwner, match=f"'a' is just moving from '{session.owner}': try again in a moment"):
            await hub.discard("a", other.sender)
        with pytest.raises(SessionExists):
            await hub.open("a")
        if lives:
            may_ask.set()
            with pytest.raises(NotOwner):
                await session.closed()
        await hub.discard("a", (await hub.describe("a")).sender)
        again = await hub.open("a")
        assert await again.wait(again.submit(ones(1))) == 1
        await other.stop()


@pytest.mark.parametrize("how", ["killed", "drained", "fenced"])
async def test_outputs_that_nobody_comes_for_are_given_up_though_their_owner_is_gone(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "WATCH_S", 0.0)
    monkeypatch.setattr(outbox_module, "UNUSED_S", 0.0)
    monkeypatch.setattr(outbox_module, "KEEP_ENDED_S", 0.0)
    async with local(SumModel(), config=CONFIG, ack_on_receipt=False) as (cluster, hub):
        session = await hub.open("a", resumable=True)
        session.submit(ones(3))
        session.close()
        assert await session.closed() == "closed"
        assert hub.get("a") is session, "its client may come for the outputs"
        if how == "killed":
            await cluster.kill("owner-0")
        elif how == "drained":
            await cluster.drain("owner-0")
        else:
            await cluster._running["owner-0"].fence()
        async with asyncio.timeout(10):
            while hub.num_sessions or hub._outboxes:
                await asyncio.sleep(0)
        assert hub._ended == {"owner-0": [session.epoch]}, "that is told once"
        with pytest.raises(SessionEnded, match="closed"):
            hub.get("a")


async def test_a_segment_that_starts_before_the_first_timestep_is_refused() -> None:
    async with local(SumModel(), config=CONFIG) as (_, hub):
        session = await hub.open()
        session.submit(ones(2))
        with pytest.raises(InvalidInput, match="starts at -1, the first timestep is 0: send from 2"):
            session.submit(ones(5), -1)
        assert await session.wait(session.submit(ones(1), 2)) == 3
        assert session.read().values["total"][:, 0].tolist() == [1, 2, 3]  # type: ignore[union-attr]


async def test_a_session_with_more_outputs_than_its_owner_can_keep_is_told_so_and_goes_on() -> None:
    bounds = dataclasses.replace(CONFIG.engine, max_retained_bytes=64 * 16, max_pending_bytes=4 * 16)
    async with local(SumModel(), config=dataclasses.replace(CONFIG, engine=bounds)) as (_, hub):
        session = await hub.open()
        for at in range(64, 5 * 64, 64):
            session.submit(ones(64))
            with pytest.raises(WindowFull):
                session.submit(ones(1))
            async with asyncio.timeout(10):
                assert await session.wait() == at
            assert session.read() is not None
