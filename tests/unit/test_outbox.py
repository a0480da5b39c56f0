"""An outbox and the answers of its owner, which are written here."""

import asyncio
from contextlib import suppress

import numpy as np
import pytest

from serve_app.errors import LockstepError, StateLost
from serve_app.frame import Answer, Frame, Notice, Open
from serve_app.ingress.outbox import Outbox
from serve_app.session import Session
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec

pytestmark = pytest.mark.asyncio

SPEC = ModelSpec("sum", TensorSpec((1,)), {"total": TensorSpec((1,))})
ONE = np.ones((1, 1), np.float32)


class Owner:
    """The way to it: calls that wait for what the test says."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.answers: list[asyncio.Future[Answer]] = []

    async def call(self, frame: Frame) -> Answer:
        self.frames.append(frame)
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    async def close(self) -> None:
        pass


def only(*notices: Notice) -> Answer:
    """An answer that brings no outputs."""
    none = np.zeros(0, np.int64)
    outputs = {"total": np.zeros((0, 1), np.float32)}
    return Answer(none, none, none, none, none, outputs, notices, np.zeros((3, 0), np.int64))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_session_that_is_given_back_as_it_opens_sends_nothing_more_there() -> None:
    """More was submitted while the opening was on its way: that goes with it to another owner."""
    owner, lost = Owner(), list[Session]()
    outbox = Outbox("o", "s", SPEC, 10**6, owner, lambda _: None, lambda session, _: lost.append(session))
    sessions, opening = [], []
    for epoch in range(1, 13):
        session = Session(f"s{epoch}", SPEC, SessionLimits(), outbox, epoch=epoch, ack_on_receipt=False)
        session.begin_at(0)
        opening.append(asyncio.create_task(outbox.open(session, Open(epoch, session.name))))
        session.submit(ONE)
        sessions.append(session)
    await turns()
    for session in sessions:
        session.submit(ONE)
    await turns()
    said = [Notice(session.epoch, kind) for kind in ("opened", "moving") for session in sessions]
    owner.answers[0].set_result(only(*said))
    for found in await asyncio.gather(*opening, return_exceptions=True):
        assert isinstance(found, StateLost)
    await turns()
    assert [len(frame.x) for frame in owner.frames] == [12], "none was sent under an epoch that is over"
    assert lost == [], "whoever opens them hears of it"
    other = Owner()
    elsewhere = Outbox("other", "s", SPEC, 10**6, other, lambda _: None, lambda session, _: lost.append(session))
    for session in sessions:
        session.is_unopened = True
        assert session.can_move
        session.epoch += 100
        opening.append(asyncio.create_task(elsewhere.open(session, Open(session.epoch, session.name))))
    await turns()
    other.answers[0].set_result(only(*(Notice(session.epoch, "opened") for session in sessions)))
    for session in sessions:
        session.moved(elsewhere, 0)
    await turns()
    assert sum(len(frame.x) for frame in other.frames) == 24, "all inputs go there"
    for each in (outbox, elsewhere):
        for answer in (*owner.answers, *other.answers):
            if not answer.done():
                answer.set_exception(StateLost("the test is over"))
        with suppress(LockstepError):
            await each.stop()
