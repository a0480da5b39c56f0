"""The engine's thread: every call is answered, whatever happens."""

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config import AppConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.engine import Engine
from serve_app.engine.loop import Delivery, EngineLoop
from serve_app.errors import InvalidInput, LockstepError, NotOwner, Unavailable
from serve_app.frame import NO_CLOSE, Answer, Frame, Open
from serve_app.lease import Lease, now
from tests.fakes import SumModel

CONFIG = AppConfig(
    engine=EngineConfig(device="cpu", slots=8, max_batch_size=8),
    session=SessionConfig(max_sessions=64, idle_timeout_s=3600),
    frame=FrameConfig(answer_within_s=0.3),
)


class DyingModel(SumModel):
    """As a model on a GPU that has failed for good."""

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def frame(epoch: int, n: int, opens: bool = True, owner: str = "local", start: int = 0) -> Frame:
    column = np.array([epoch], np.int64)
    opening = (Open(epoch, f"s{epoch}"),) if opens else ()
    zero = column * 0
    return Frame.of(owner, f"sender {epoch}", epoch=column, start=zero + start, length=zero + n, acked=zero,
                    rewind=zero, close=zero + NO_CLOSE, x=np.ones((n, 2), np.int64), opens=opening)  # fmt: skip


class Collector:
    """Keeps what is delivered; `wait` for it."""

    def __init__(self) -> None:
        self.deliveries: list[dict[Any, Answer | LockstepError]] = []
        self._news = threading.Condition()

    def __call__(self, delivery: Delivery) -> None:
        with self._news:
            self.deliveries.append(dict(delivery))
            self._news.notify_all()

    @property
    def replies(self) -> dict[Any, Answer | LockstepError]:
        return {ticket: reply for delivery in self.deliveries for ticket, reply in delivery.items()}

    def wait(self, *tickets: object) -> list[Answer | LockstepError]:
        with self._news:
            assert self._news.wait_for(lambda: all(ticket in self.replies for ticket in tickets), 10)
        return [self.replies[ticket] for ticket in tickets]


@pytest.fixture
def collector() -> Collector:
    return Collector()


@pytest.fixture
def loop(collector: Collector) -> Iterator[EngineLoop]:
    loop = EngineLoop(Engine(SumModel(), CONFIG), collector)
    yield loop
    loop.stop()


def test_a_call_with_nothing_to_tell_is_answered_within_its_bound(loop: EngineLoop, collector: Collector) -> None:
    loop.call(frame(1, 1), "first")
    (first,) = collector.wait("first")
    assert isinstance(first, Answer)
    began = time.monotonic()
    loop.call(frame(1, 0, opens=False, start=1), "second")
    (second,) = collector.wait("second")
    assert isinstance(second, Answer)
    assert time.monotonic() - began >= 0.3
    assert len(second.epoch) == 0


def test_answers_of_one_step_come_in_one_delivery(collector: Collector) -> None:
    began, ready = threading.Event(), threading.Event()

    class Waiting(SumModel):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            began.set()
            assert ready.wait(10)
            return super().forward(x, state)

    loop = EngineLoop(Engine(Waiting(), CONFIG), collector)
    loop.call(frame(0, 2), 0)
    assert began.wait(10)
    for epoch in range(1, 6):  # arrive while the first step runs, and so run and are answered together
        loop.call(frame(epoch, 1), epoch)
    ready.set()
    collector.wait(*range(6))
    loop.stop()
    assert [sorted(delivery) for delivery in collector.deliveries if 3 in delivery] == [[1, 2, 3, 4, 5]]


def test_frames_that_are_refused_are_answered_and_the_rest_goes_on(loop: EngineLoop, collector: Collector) -> None:
    loop.call(frame(1, 1, owner="another"), "stale")
    torn = frame(2, 1)
    loop.call(replace(torn, x=torn.x[:, :1]), "torn")
    loop.call(frame(3, 1), "good")
    stale, malformed, good = collector.wait("stale", "torn", "good")
    assert isinstance(stale, NotOwner)
    assert isinstance(malformed, InvalidInput)
    assert isinstance(good, Answer)
    loop.check_health()


def test_a_dead_device_ends_the_loop_and_every_call(collector: Collector) -> None:
    loop = EngineLoop(Engine(DyingModel(), CONFIG), collector)
    loop.call(frame(1, 0), "waits")
    loop.call(frame(2, 1), "kills")
    collector.wait("waits", "kills")
    loop.stop()
    assert isinstance(collector.replies["kills"], Unavailable | Answer)
    with pytest.raises(Unavailable, match="illegal memory access"):
        loop.check_health()
    loop.call(frame(3, 1), "late")
    assert "illegal memory access" in str(collector.replies["late"])


def test_stop_answers_what_is_open(collector: Collector) -> None:
    loop = EngineLoop(Engine(SumModel(), CONFIG), collector)
    loop.call(frame(1, 1), "first")
    collector.wait("first")
    loop.call(frame(1, 0, opens=False, start=1), "open")
    loop.stop()
    (reply,) = collector.wait("open")
    assert isinstance(reply, Unavailable | Answer)
    loop.call(frame(1, 1), "late")
    assert "stopping" in str(collector.replies["late"])


def test_calls_from_many_threads(loop: EngineLoop, collector: Collector) -> None:
    threads = [threading.Thread(target=loop.call, args=(frame(epoch, 3), epoch)) for epoch in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    replies = collector.wait(*range(32))
    assert all(isinstance(reply, Answer) for reply in replies)


async def test_what_an_engine_says_last_is_heard_before_that_it_has_ended() -> None:
    """The last answer gives a session back; a call that comes meanwhile and is refused at once would have it lost."""
    engine, heard = AsyncEngine(Engine(SumModel(), CONFIG)), []

    async def ask(what: Frame) -> None:
        try:
            answer = await engine.frame(what)
            heard.append([notice.kind for notice in answer.notices])
        except Unavailable:
            heard.append(["unavailable"])

    await ask(frame(1, 0))
    waits = asyncio.create_task(ask(frame(1, 0, opens=False)))
    await asyncio.sleep(0.05)
    comes = asyncio.create_task(ask(frame(1, 1, opens=False)))
    engine._loop.stop()  # before this event loop can see to either
    await asyncio.gather(waits, comes)
    assert heard == [["opened"], ["moving"], ["unavailable"]]


async def test_a_caller_that_leaves_costs_nothing() -> None:
    engine = AsyncEngine(Engine(SumModel(), CONFIG))
    left = asyncio.create_task(engine.frame(frame(1, 0)))
    await asyncio.sleep(0)
    left.cancel()
    answer = await engine.frame(frame(2, 4))
    while len(answer.epoch) == 0:
        answer = await engine.frame(frame(2, 0, opens=False, start=0))
    assert answer.outputs["total"][:, 0].tolist() == [1, 2, 3, 4]
    await engine.stop()
    with pytest.raises(Unavailable):
        await engine.frame(frame(3, 1))


def test_without_a_lease_nothing_is_answered_and_with_it_all(collector: Collector) -> None:
    lease = Lease()
    engine = Engine(SumModel(), CONFIG)
    loop = EngineLoop(engine, collector, lease=lease)
    loop.call(frame(1, 2), "first")
    time.sleep(0.2)
    assert not collector.replies and engine.stats.steps == 0
    lease.renew(now())
    (first,) = collector.wait("first")
    assert isinstance(first, Answer) and first.length.tolist() == [2]
    loop.stop()


def test_an_owner_that_was_away_for_too_long_drops_its_sessions_and_says_that_they_are_elsewhere(
    loop: EngineLoop, collector: Collector
) -> None:
    loop.call(frame(1, 2), "first")
    collector.wait("first")
    loop.call(frame(1, 0, opens=False, start=2), "waits")
    loop.fence()
    (waits,) = collector.wait("waits")
    assert isinstance(waits, Answer) and [notice.kind for notice in waits.notices] == ["moving"]
    loop.call(frame(1, 1, opens=False, start=2), "late")
    loop.call(frame(2, 1), "new")
    late, new = collector.wait("late", "new")
    assert isinstance(late, Answer) and [notice.kind for notice in late.notices] == ["moving"]
    assert isinstance(new, Answer) and new.length.tolist() == [1]
    engine = loop._engine
    engine.check()
    assert list(engine.stats.ended_epochs) == [], "they have not ended"


@pytest.mark.parametrize("timeout_s", [math.inf, 1e12])
def test_a_loop_whose_sessions_never_expire_can_rest(collector: Collector, timeout_s: float) -> None:
    config = replace(CONFIG, session=replace(CONFIG.session, idle_timeout_s=timeout_s))
    loop = EngineLoop(Engine(SumModel(), config), collector)
    while loop.idle_s < 0.05:
        loop.check_health()
        time.sleep(0.01)
    loop.call(frame(1, 1), "first")
    (first,) = collector.wait("first")
    assert isinstance(first, Answer)
    loop.stop()
