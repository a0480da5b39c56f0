"""How many replicas a model is to have: out of lists of numbers, and of what a directory and replicas know."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorUnavailableError

from serve_app.config import load_config, load_models
from serve_app.deployments.autoscaling import ASK_EVERY_S, DirectoryPolicy
from serve_app.directory import REFUSED_WITHIN_S, Directory
from serve_app.engine.build import build_engine
from serve_app.engine.loop import EngineLoop
from serve_app.errors import ConfigError, TooManySessions
from serve_app.lease import LEASE_S, MARGIN_S
from serve_app.policy.autoscaling import AVERAGED_S, IDLE, Demand, Load, LoadMeter, Scaling, wanted_replicas
from serve_app.policy.session_queue import QueueLimits
from tests.unit.test_directory import owner

SCALING = Scaling(min_replicas=1, max_replicas=8, target_sessions=0.8, target_load=0.7)

loads = st.builds(Load, st.integers(0, 120), st.floats(0, 1), st.floats(0, 10))
demands = st.builds(
    Demand,
    st.lists(loads, min_size=1, max_size=8),
    st.integers(1, 100),
    st.integers(0, 100),
    st.booleans(),
    st.booleans(),
)
scalings = st.builds(
    Scaling, st.integers(1, 3), st.integers(3, 20), st.floats(0.1, 1), st.floats(0.1, 1), st.sampled_from([0.0, 1.0])
)


def wanted(sessions: Sequence[int] = (), share: Sequence[float] = (), target: int | None = None, **more: Any) -> int:
    """For replicas of 100 sessions each."""
    number = max(len(sessions), len(share))
    each = zip([*sessions] or [0] * number, [*share] or [0.0] * number, strict=True)
    demand = Demand([Load(count, part) for count, part in each], 100, **more)
    return wanted_replicas(demand, SCALING, number if target is None else target)


@given(demands, scalings, st.integers(1, 25))
def test_sessions_fit_and_once_there_are_as_many_as_wanted_that_is_so(
    demand: Demand, scaling: Scaling, target: int
) -> None:
    found = wanted_replicas(demand, scaling, target)
    assert scaling.min_replicas <= found <= scaling.max_replicas
    assert wanted_replicas(demand, scaling, found) == found
    sessions = sum(load.sessions for load in demand.loads) + demand.waiting
    assert found * demand.max_sessions >= sessions or found == scaling.max_replicas
    more = demand._replace(waiting=demand.waiting + 10)
    assert wanted_replicas(more, scaling, target) >= found
    if found < target:  # a little more than there is does not undo it
        grown = [Load(int(load.sessions * 1.1), min(1.0, load.share * 1.1), load.delay_s) for load in demand.loads]
        assert wanted_replicas(demand._replace(loads=grown), scaling, found) <= max(found, scaling.min_replicas)


def test_replicas_come_with_sessions_and_go_when_there_is_room_to_spare() -> None:
    assert [wanted([count]) for count in (0, 80, 81, 160, 161, 10_000)] == [1, 1, 2, 2, 3, 8]
    assert wanted([64, 64], waiting=33) == 3
    assert [wanted([count, 0]) for count in (0, 64, 65, 128)] == [1, 1, 2, 2], "64 are four fifths of 80"


def test_replicas_come_with_load_and_go_with_it() -> None:
    assert [wanted(share=[part]) for part in (0.1, 0.7, 0.71, 1.0)] == [1, 1, 2, 2]
    assert wanted(share=[1.0, 1.0]) == 3
    assert wanted(share=[1.0, 1.0, 1.0]) == 5, "of a rate above the highest nothing is seen"
    assert [wanted(share=[part, part]) for part in (0.25, 0.29, 0.7)] == [1, 2, 2]
    assert wanted(share=[0.9], target=2) == 2, "it is starting"


def test_one_more_is_wanted_where_sessions_are_refused_or_late() -> None:
    assert wanted([50, 50], is_refusing=True) == 3
    assert wanted([50, 50], is_refusing=True, target=3) == 3, "it is starting"
    late = Demand([Load(10, 0.5, 0.2), IDLE], 100)
    limit = replace(SCALING, max_delay_s=0.1)
    assert wanted_replicas(late, SCALING, 2) == 1
    assert wanted_replicas(late, limit, 2) == 3
    assert wanted_replicas(late._replace(is_level=False), limit, 2) == 1, "sessions move first"


def steps(*rows: tuple[int, int, float]) -> np.ndarray:
    return np.array(rows, float)


def fed(meter: LoadMeter, rows: np.ndarray, idle: float, seconds: float = 10 * AVERAGED_S) -> Load:
    """The load after so long, with these steps and such a share of the time without work in each second."""
    start, idle_s = meter._at, meter._idle_s
    for i in range(1, int(seconds) + 1):
        meter.add(rows, idle_s + idle * i, 0.5, start + i)
    return meter.load(3)


def test_the_load_of_a_replica_is_its_share_of_the_rate_of_full_steps() -> None:
    def meter() -> LoadMeter:
        fresh = LoadMeter(range(1, 11), 256, now=0.0)
        fresh.add(steps((256, 1, 0.001), (256, 10, 0.01)), 0.0, 0.0, 1e-6)
        return fresh

    gpu = fed(meter(), steps(*[(64, 10, 0.01)] * 100), idle=0.0)
    assert gpu.share == pytest.approx(0.25, abs=0.01), "always busy, with steps that could be of four times as many"
    assert gpu.sessions == 3
    assert gpu.delay_s == pytest.approx(0.5, abs=0.01)
    cpu = fed(meter(), steps(*[(16, 5, 0.005 / 16)] * 100), idle=0.5)
    assert cpu.share == pytest.approx(0.5, abs=0.01), "busy half of the time, with steps as long as they have sessions"
    full = fed(meter(), steps(*[(256, 10, 0.01)] * 100), idle=0.0)
    assert full.share == pytest.approx(1.0, abs=0.01)
    slow = fed(meter(), steps(*[(256, 10, 0.02)] * 50), idle=0.0)
    assert slow.share == pytest.approx(1.0, abs=0.02), "something else takes half of the device: steps are as they are"
    busy = meter()
    fed(busy, steps(*[(256, 10, 0.01)] * 100), idle=0.0)
    assert fed(busy, steps(), idle=1.0).share == pytest.approx(0.0, abs=0.01)
    assert fed(LoadMeter([1], 256, 0.0), steps((3, 1, 0.4)), idle=0.6).share == pytest.approx(0.4, abs=0.01)


def test_a_replica_that_is_scaled_has_made_full_steps_before_it_starts() -> None:
    args = {"model": {"name": "rnn", "hidden": 8}, "engine": {"max_batch_size": 6, "slots": 4, "max_step_timesteps": 3}}
    engine = build_engine(load_config({**args, "autoscaling": {"max_replicas": 2}}))
    assert [(step.batch_size, step.timesteps) for step in engine.stats.recent] == [(4, 1), (4, 3)]
    assert engine.num_sessions == 0
    assert not engine.stats.ended_epochs
    assert not build_engine(load_config(args)).stats.recent
    few = {"session.max_sessions": 3, "engine.max_pending_bytes": 256 * 4 * 3 * 2}
    engine = build_engine(load_config({**args, **few, "autoscaling": {"max_replicas": 2}}))
    assert [(step.batch_size, step.timesteps) for step in engine.stats.recent] == [(3, 1), (3, 2)], "as many as fit"


def test_an_engine_knows_for_how_long_it_has_had_nothing_to_do() -> None:
    engine = build_engine(load_config({"model": {"name": "rnn", "hidden": 8}}))
    loop = EngineLoop(engine, lambda _: None)
    while loop.idle_s < 0.05:
        assert loop.idle_s >= 0
    loop.stop()


def test_the_directory_says_how_many_by_what_owners_say_and_what_it_knows() -> None:
    directory = Directory(2)
    assert directory.wanted_replicas("sum", 3) == 3, "nobody is there yet"
    one = replace(owner("x"), scaling=SCALING, queue=QueueLimits(max_wait_s=5))
    directory.register(one)
    assert directory.wanted_replicas("sum", 1) == 1
    for i in range(10):
        directory.open(f"{i}", "s")
    assert directory.wanted_replicas("sum", 1) == 2
    directory.register(replace(one, name="y"))
    directory.tell("y", {}, Load(0, 0.9))
    directory.tell("x", {}, Load(14, 0.9))
    assert directory.wanted_replicas("sum", 2) == 3, "those of x have been there before the directory was"
    directory.tell("x", {}, Load(0, 0.9))
    directory.tell("y", {}, Load(0, 0.9))
    assert directory.wanted_replicas("sum", 2) == 3, "by their load"
    directory.tell("y", {}, IDLE)
    directory.tell("x", {}, IDLE)
    assert directory.wanted_replicas("sum", 5) == 5, "others may still register"
    directory.tick(LEASE_S + MARGIN_S + 0.1)
    assert directory.wanted_replicas("sum", 5) == 2
    directory.register(owner("z", model="other"))
    assert directory.wanted_replicas("other", 1) == 1


def test_who_waits_or_was_refused_of_late_is_a_reason_for_another_replica() -> None:
    scaling = replace(SCALING, target_sessions=1.0)
    for waits in (True, False):
        directory = Directory(2)
        directory.register(replace(owner("x"), scaling=scaling, queue=QueueLimits(max_wait_s=5 * waits)))
        for i in range(10):
            directory.open(f"{i}", "s")
        assert directory.wanted_replicas("sum", 1) == 1
        with pytest.raises(TooManySessions):
            directory.open("one more", "s")
        assert directory.wanted_replicas("sum", 1) == 2
        directory.tick(REFUSED_WITHIN_S + 1)
        directory.register(replace(owner("x"), scaling=scaling))
        assert directory.wanted_replicas("sum", 1) == 1


def test_being_late_is_no_reason_while_replicas_that_came_are_yet_to_get_sessions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.directory.SETTLED_S", 2.0)
    directory = Directory(2)
    directory.register(replace(owner("x"), scaling=replace(SCALING, max_delay_s=0.1)))
    found = []
    for second in (0, 1, 2):
        directory.tick(second)
        directory.heard("x")
        directory.tell("x", {}, Load(1, 0.1, delay_s=1.0))
        found.append(directory.wanted_replicas("sum", 1))
    assert found == [1, 1, 2]


class Actor:
    """A directory's actor, as Ray gives it: answers come later, or never."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.answers: list[Future[int]] = []
        self.ask = SimpleNamespace(remote=self._ask)

    def _ask(self, method: str, model: str, target: int) -> Any:
        assert method == "wanted_replicas"
        self.asked.append((model, target))
        self.answers.append(Future())
        return SimpleNamespace(future=lambda: self.answers[-1])


def test_serve_is_told_what_the_directory_says_and_keeps_what_there_is_without(monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, Actor] = {}

    def get_actor(name: str, namespace: str) -> Actor:
        assert namespace == "space"
        if name not in there:
            raise ValueError("no such actor")
        return there[name]

    monkeypatch.setattr(ray, "get_actor", get_actor)
    policy, now = DirectoryPolicy("vad", "space"), 100.0

    def ask(target: int, passed_s: float = 2 * ASK_EVERY_S) -> int:
        nonlocal now
        now += passed_s
        context: Any = SimpleNamespace(target_num_replicas=target, current_time=now, app_name="app")
        return policy(context)[0]

    assert ask(3) == 3
    there["directory:app"] = actor = Actor()
    assert ask(3, 0.1) == 3
    assert not actor.asked, "it asks from time to time"
    assert [ask(3), ask(3), ask(3)] == [3, 3, 3]
    assert actor.asked == [("vad", 3)], "one question at a time"
    actor.answers[0].set_result(5)
    assert [ask(3, 0.1), ask(4, 0.1)] == [5, 5]
    actor.answers[1].set_exception(ActorUnavailableError("it starts again", b"0" * 16))
    there["directory:app:standby"] = actor = Actor()
    assert ask(5, 0.1) == 5
    assert ask(2) == 2, "what it said before counts no more"
    actor.answers[0].set_result(1)
    assert ask(2) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"autoscaling": {"min_replicas": 2}}, ["autoscaling.max_replicas is missing"]),
        ({"autoscaling": {"max_replicas": 2, "min_replicas": 3}}, ["max_replicas is 2, less", "min_replicas=3"]),
        ({"autoscaling": {"max_replicas": 2, "min_replicas": 0}}, ["autoscaling.min_replicas is 0, the least is 1"]),
        ({"autoscaling": {"max_replicas": 2, "target_load": 1.5}}, ["autoscaling.target_load is 1.5", "at most 1"]),
        ({"autoscaling": {"max_replicas": 2}, "replicas": 2}, ["replicas is 2 beside", "autoscaling.min_replicas=2"]),
        ({"autoscaling.max_replicas": "2", "model": "bert"}, ["model=bert has no state", "autoscaling_config"]),
        ({"autoscaling.max_replica": "2"}, ["autoscaling.max_replica is not", "did you mean"]),
        ({"session.moves_per_s": -1}, ["session.moves_per_s is -1, the least is 0"]),
    ],
    ids=str,
)
def test_an_error_says_what_is_wrong_about_autoscaling(args: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "rnn", **args})
    assert [word for word in words if word not in caught.value.message] == [], caught.value.message


def test_each_model_is_scaled_by_itself() -> None:
    models = load_models({"autoscaling": {"max_replicas": 4}, "models": {"rnn": {"autoscaling.min_replicas": 2}}})
    found = models["rnn"].autoscaling
    assert found is not None
    assert (found.min_replicas, found.max_replicas) == (2, 4)
