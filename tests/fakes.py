"""Small real objects to test with."""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from serve_app.config import AppConfig, EngineConfig, SessionConfig
from serve_app.engine.engine import Engine
from serve_app.engine.runner import EagerRunner
from serve_app.engine.state_pool import StatePool
from serve_app.frame import NO_CLOSE, Answer, Frame, Open
from serve_app.models.interface import RecurrentModel
from serve_app.spec import TensorSpec


class SumModel:
    """Answers, at each timestep, the sum of all inputs so far: whole numbers, so results are equal to the bit.

    An input below `poison` raises, as a broken model would.
    """

    input = TensorSpec((2,), "int64")
    outputs = {"total": TensorSpec((2,), "int64")}

    def __init__(self, poison: int = -(2**62)) -> None:
        self.takes_views = False
        self.poison = poison
        self.ended: list[tuple[str, str]] = []
        self.batch_sizes: list[int] = []

    def initial_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 2, dtype=torch.int64)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if (x < self.poison).any():
            raise RuntimeError("poisoned input")
        self.batch_sizes.append(x.shape[1])
        y = state + x.cumsum(0)
        return y, y[-1]

    def session_ended(self, session: str, reason: str) -> None:
        self.ended.append((session, reason))


class FloatSumModel:
    """SumModel in float32, where NaN is possible."""

    input = TensorSpec((1,), "float32")
    outputs = {"total": TensorSpec((1,), "float32")}

    def initial_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = state + x.cumsum(0)
        return y, y[-1]


def check_checkpoints(device: str, *, overlap: bool = False, together: int = 4) -> None:
    """Sessions that send in pieces, more of them than slots: each checkpoint has the sum of all below its timestep."""
    session = SessionConfig(max_sessions=60, checkpoint_timesteps=5, checkpoint_apart_s=0)
    engine = EngineConfig(device=device, calibration_file="", slots=40, max_batch_size=16, max_step_timesteps=4)
    sender, rng = Sender(FloatSumModel(), AppConfig(engine=engine, session=session), overlap=overlap), random.Random(0)
    sender.engine._checkpoints._together = together
    totals = {epoch: [0.0] for epoch in range(1, 61)}
    for number, epoch in enumerate(totals):
        sender.send(opens=(Open(epoch, f"s{epoch}"),), sender=f"sender {number % 2}")
    for _ in range(60):
        entries: list[list[dict[str, object]]] = [[], []]
        for epoch in rng.sample(list(totals), 20):
            x, start = [rng.randint(-9, 9) for _ in range(rng.randint(1, 6))], len(totals[epoch]) - 1
            entries[1 - epoch % 2].append({"epoch": epoch, "start": start, "x": np.array(x)[:, None]})
            totals[epoch] += (totals[epoch][-1] + np.cumsum(x)).tolist()
        for number, those in enumerate(entries):
            sender.send(*those, sender=f"sender {number}")
        for _ in range(rng.randint(0, 5)):
            sender.step()
    sender.run()
    for _ in range(1000):
        sender.now += 100
        for number in range(2):
            sender.send(sender=f"sender {number}")
        if not sender.engine._checkpoints.num_slabs:
            break
    sender.engine.check()
    assert len(sender.checkpoints) > len(totals)
    assert len(sender.checkpoints) == sender.engine.stats.checkpoints
    for epoch, timestep, (total,) in sender.checkpoints:
        assert total.tolist() == [[totals[epoch][timestep]]], f"epoch {epoch} at {timestep}"


class OverlappingRunner(EagerRunner):
    """Steps run late, in order: when outputs are asked for, or a move of states has to come after them.

    So a move that wrongly goes first, or a step beyond three, shows.
    """

    depth = 3
    ragged = False

    def __init__(self, model: RecurrentModel, pool: StatePool) -> None:
        super().__init__(model, pool)
        self.takes_views, self.time_major = False, True  # as on a GPU: views would be of inputs that are gone
        self.model, self.num_launched, self.late = model, 0, deque[LateStep]()
        pool.moving = self.moving  # type: ignore[method-assign]

    def launch(self, x: np.ndarray, k: int, slots: np.ndarray, counts: np.ndarray | None = None) -> "LateStep":
        assert self.num_launched < self.depth, "more steps on their way than may be"
        spec, batch = self.model.input, len(slots)
        with torch.inference_mode():
            sent = torch.from_numpy(x.view(spec.dtype).reshape(k, batch, *spec.shape))
            self.model.forward(sent, self.model.initial_state(batch))  # a bad one raises here
        step = LateStep(self, x, k, slots)
        self.late.append(step)
        self.num_launched += 1
        return step

    def run(self) -> None:
        """The oldest step."""
        step = self.late.popleft()
        step.found = super().launch(step.x, step.k, step.slots).outputs()

    @contextmanager
    def moving(self, *, after_steps: bool) -> Iterator[None]:
        while after_steps and self.late:
            self.run()
        yield


class LateStep:
    """See OverlappingRunner."""

    captured = False

    def __init__(self, runner: OverlappingRunner, x: np.ndarray, k: int, slots: np.ndarray) -> None:
        self.runner, self.x, self.k, self.slots = runner, x, k, slots.copy()
        self.found: list[np.ndarray] | None = None

    def outputs(self) -> list[np.ndarray]:
        while self.found is None:
            self.runner.run()
        self.runner.num_launched -= 1
        return self.found


class Sender:
    """Talks to an engine directly, one frame at a time, and keeps all that comes back. Time is a counter.

    overlap: the engine's steps are on their way for a while, as on a GPU.
    """

    def __init__(self, model: RecurrentModel, config: AppConfig | None = None, *, overlap: bool = False) -> None:
        self.engine = Engine(model, config or AppConfig())
        if overlap:
            self.engine._runner = OverlappingRunner(model, self.engine._pool)
        self.now = 0.0
        self.outputs: dict[int, list[tuple[int, np.ndarray]]] = {}
        self.notices: dict[int, list[str]] = {}
        self.errors: dict[int, list[dict[str, object]]] = {}
        self.next: dict[int, int] = {}
        self.checkpoints: list[tuple[int, int, list[np.ndarray]]] = []  # epoch, timestep, tensors

    def send(
        self, *entries: dict[str, object], opens: tuple[Open, ...] = (), owner: str = "local", sender: str = "test"
    ) -> None:
        """entries: epoch and any of x [T, ...], start, acked, rewind, close."""
        spec = self.engine.spec.input
        xs = [np.asarray(e.get("x", np.empty((0, *spec.shape))), spec.dtype) for e in entries]
        columns = {
            name: np.array([e.get(name, default) for e in entries], np.int64)
            for name, default in (("epoch", 0), ("start", 0), ("acked", 0), ("rewind", 0), ("close", NO_CLOSE))
        }
        x = np.concatenate(xs) if xs else np.empty((0, *spec.shape), spec.dtype)
        length = np.array([len(x) for x in xs], np.int64)
        self.engine.receive(Frame.of(owner, sender, length=length, x=x, opens=opens, **columns), object(), self.now)
        self.collect()

    def open(self, *epochs: int) -> None:
        self.send(opens=tuple(Open(epoch, f"s{epoch}") for epoch in epochs))

    def step(self) -> bool:
        self.now += 1
        ran = self.engine.step(self.now)
        self.collect()
        return ran

    def run(self) -> int:
        """Step until nothing is ready; the number of steps."""
        steps = 0
        while self.step():
            steps += 1
        return steps

    def collect(self) -> None:
        for _, answer in self.engine.answers(self.now):
            self._take(answer)

    def poll(self) -> None:
        """Ask for whatever has not come yet."""
        self.now += 100
        self.send()

    def _take(self, answer: Answer) -> None:
        at = 0
        (values,) = answer.outputs.values()
        for epoch, due, start, length in zip(
            answer.epoch.tolist(), answer.next.tolist(), answer.start.tolist(), answer.length.tolist(), strict=True
        ):
            self.outputs.setdefault(epoch, []).append((start, values[at : at + length]))
            self.next[epoch] = due
            at += length
        if (kept := answer.checkpoints) is not None:
            for i, (epoch, timestep) in enumerate(zip(kept.epoch.tolist(), kept.at.tolist(), strict=True)):
                assert timestep <= sum(len(values) for _, values in self.outputs[epoch]), "a state before its outputs"
                self.checkpoints.append((epoch, timestep, [leaf[i].copy() for leaf in kept.state]))
        for notice in answer.notices:
            self.notices.setdefault(notice.epoch, []).append(notice.reason or notice.kind)
            if notice.error:
                self.errors.setdefault(notice.epoch, []).append(dict(notice.error))

    def line(self, epoch: int) -> np.ndarray:
        """All outputs of a session in the order of arrival; fails unless they are without gap or repetition."""
        at, parts = 0, []
        for start, values in self.outputs.get(epoch, []):
            assert start == at, f"outputs from {start} arrived, {at} was due"
            at += len(values)
            parts.append(values)
        return np.concatenate(parts) if parts else np.empty((0,))
