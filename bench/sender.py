"""A sender as the engine sees one, in columns: what it has received is acknowledged with its next frame."""

import time
from dataclasses import replace

import numpy as np

from serve_app.engine.engine import Engine
from serve_app.frame import ABORT, NO_CLOSE, Answer, Frame, Open

BURST = 256
"""Sessions of a frame, where there are many."""


class Sender:
    """Opens `num_sessions` sessions at an engine, named 0, 1, 2, …; `start` [num_sessions] is where each goes on."""

    def __init__(self, engine: Engine, num_sessions: int, first_epoch: int = 1) -> None:
        self._engine = engine
        self._name = f"bench-{first_epoch}"
        self._first_epoch = first_epoch
        self.start = np.zeros(num_sessions, np.int64)
        for first in range(0, num_sessions, BURST):
            sessions = range(first, min(first + BURST, num_sessions))
            opens = tuple(Open(first_epoch + session, f"session-{session}") for session in sessions)
            (answer,) = self.exchange(self._frame(np.empty(0, np.int64), opens=opens))
            refused = [notice.error for notice in answer.notices if notice.kind != "opened"]
            if refused or len(answer.notices) != len(sessions):
                raise RuntimeError(f"{len(answer.notices)} notices for {len(sessions)} sessions, refused: {refused}")

    def frame(self, sessions: np.ndarray, x: np.ndarray, acks: np.ndarray | None = None) -> Frame:
        """x [n, k, *features]: k timesteps of each of `sessions` [n]; acks: others whose outputs have arrived."""
        n, k = x.shape[:2]
        frame = self._frame(sessions, k, x.reshape(n * k, *x.shape[2:]))
        if acks is not None:
            frame = frame_of_both(frame, self._frame(acks))
        self.start[sessions] += k
        return frame

    def ack(self, sessions: np.ndarray) -> None:
        """Send nothing but acknowledgements."""
        self.exchange(self._frame(sessions))

    def abort(self) -> None:
        """End all sessions."""
        self.exchange(self._frame(np.arange(len(self.start)), close=ABORT))

    def exchange(self, frame: Frame) -> list[Answer]:
        """Hand a frame in, run what is ready; all answers."""
        engine = self._engine
        engine.receive(frame, None, time.monotonic())
        while engine.ready:
            engine.step(time.monotonic())
        answers = engine.answers(time.monotonic())
        return [answer for _, answer in answers or engine.answers(time.monotonic() + engine.answer_within_s)]

    def _frame(
        self,
        sessions: np.ndarray,
        k: int = 0,
        x: np.ndarray | None = None,
        close: int = NO_CLOSE,
        opens: tuple[Open, ...] = (),
    ) -> Frame:
        n, spec = len(sessions), self._engine.spec.input
        start = self.start[sessions]
        return Frame.of(
            self._engine.owner,
            self._name,
            epoch=sessions + self._first_epoch,
            start=start,
            length=np.full(n, k, np.int64),
            acked=start,
            rewind=np.zeros(n, np.int64),
            close=np.full(n, close, np.int64),
            x=np.empty((0, *spec.shape), spec.dtype) if x is None else x,
            opens=opens,
        )


def frame_of_both(one: Frame, other: Frame) -> Frame:
    """The entries of one frame, then those of another that brings no timesteps."""
    return replace(one, columns=np.concatenate([one.columns, other.columns], 1))
