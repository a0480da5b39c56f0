"""The engine with whole-number and real models: order, equality, isolation, bounds."""

import dataclasses
import math
import random
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import AppConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.engine.engine import Engine, choose_device
from serve_app.engine.mailbox import MAX_WAITING
from serve_app.errors import ConfigError, InvalidInput, NotOwner
from serve_app.frame import ABORT, NO_CLOSE, Frame, Open
from serve_app.models.options import RnnOptions
from serve_app.models.rnn import Rnn
from tests.fakes import FloatSumModel, Sender, SumModel, check_checkpoints


def config(slots: int = 4, batch: int = 4, step: int = 4, **session: object) -> AppConfig:
    return AppConfig(
        engine=EngineConfig(device="cpu", slots=slots, max_batch_size=batch, max_step_timesteps=step),
        session=SessionConfig(**{"max_sessions": 256, **session}),
        frame=FrameConfig(answer_within_s=10),
    )


def ramp(start: int, n: int, epoch: int = 0) -> np.ndarray:
    """n timesteps that differ by session and timestep."""
    t = np.arange(start, start + n)
    return np.stack([t * 7 + epoch, t * t + 3 * epoch], 1)


def totals(n: int, epoch: int = 0) -> np.ndarray:
    return ramp(0, n, epoch).cumsum(0)


def interleave(sender: Sender, x: dict[int, np.ndarray], rng: random.Random) -> None:
    """Opens, segments of any length, resends, acknowledgements and closes of all sessions in x, at random."""
    unopened, sent, closed = list(x), dict[int, int](), set[int]()
    while unopened or len(closed) < len(x):
        fresh = [unopened.pop() for _ in range(min(len(unopened), rng.randint(0, 20)))]
        sent |= dict.fromkeys(fresh, 0)
        entries: list[dict[str, object]] = []
        for epoch in rng.sample(sorted(set(sent) - closed), k=min(len(sent) - len(closed), rng.randint(0, 60))):
            have = sum(len(values) for _, values in sender.outputs.get(epoch, []))
            back = rng.randint(0, sent[epoch]) if rng.random() < 0.2 else 0  # a resend of what was accepted
            start = max(have, sent[epoch] - back)
            end = min(len(x[epoch]), sent[epoch] + rng.randint(0, 12))
            entry: dict[str, object] = {"epoch": epoch, "start": start, "x": x[epoch][start:end], "acked": have}
            if end == len(x[epoch]) and rng.random() < 0.5:
                entry["close"] = end
                closed.add(epoch)
            sent[epoch] = end
            entries.append(entry)
        sender.send(*entries, opens=tuple(Open(epoch, f"s{epoch}") for epoch in fresh))
        for _ in range(rng.randint(0, 3)):
            sender.step()
        sender.engine.check()
    sender.run()
    sender.poll()
    assert all(sender.notices[epoch] == ["opened", "closed"] for epoch in x)


SIZES = {"slots": st.integers(1, 40), "batch": st.integers(1, 16), "step": st.integers(1, 9)}


def test_a_start_prepares_short_steps_of_any_size_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prepared = Engine(SumModel(), config(batch=4, step=8)), list[tuple[int, int]]()
    monkeypatch.setattr(engine._runner, "prepare", lambda k, batch: prepared.append((k, batch)))
    engine.prepare()
    assert prepared == [(8, 4), (8, 1), (1, 4), (1, 3), (1, 2), (1, 1)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.fixed_dictionaries(SIZES), st.booleans(), st.booleans())
def test_any_interleaving_equals_alone(seed: int, sizes: dict[str, int], overlap: bool, takes_views: bool) -> None:
    rng = random.Random(seed)
    model = SumModel()
    model.takes_views = takes_views
    sender = Sender(model, config(**sizes), overlap=overlap)
    x = {epoch: ramp(0, rng.randint(0, 40), epoch) for epoch in range(1, 121)}
    interleave(sender, x, rng)
    for epoch, inputs in x.items():
        assert sender.line(epoch).tolist() == inputs.cumsum(0).tolist()
    assert sorted(model.ended) == sorted((f"s{epoch}", "closed") for epoch in x)
    sender.send(*({"epoch": epoch, "start": len(inputs), "acked": len(inputs)} for epoch, inputs in x.items()))
    sender.engine.check()
    assert all(value == 0 for value in sender.engine.gauges().values())


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.fixed_dictionaries(SIZES), st.sampled_from(["lstm", "gru", "tanh", "relu"]))
def test_real_cells_equal_alone(seed: int, sizes: dict[str, int], cell: Literal["lstm", "gru", "tanh", "relu"]) -> None:
    rng = random.Random(seed)
    model = Rnn(RnnOptions(cell=cell, input=3, hidden=8, layers=2, seed=seed % 1000))
    sender = Sender(model, config(**sizes))
    x = {
        epoch: np.random.default_rng(epoch).standard_normal((rng.randint(1, 40), 3), np.float32)
        for epoch in range(1, 101)
    }
    interleave(sender, x, rng)
    for epoch, inputs in x.items():
        with torch.inference_mode():
            alone, _ = model.forward(torch.from_numpy(inputs)[:, None], model.initial_state(1))
        np.testing.assert_allclose(sender.line(epoch), alone[:, 0].numpy(), rtol=1e-5, atol=1e-5)


def test_segments_of_different_lengths_share_steps_without_padding() -> None:
    model = SumModel()
    sender = Sender(model, config(step=8))
    sender.open(1, 2, 3)
    sender.send(*({"epoch": epoch, "x": ramp(0, n, epoch)} for epoch, n in ((1, 2), (2, 5), (3, 8))))
    assert sender.run() == 1
    assert model.batch_sizes == [3, 2, 1], "2 timesteps of all three, 3 of two, 3 of one"
    assert sender.engine.stats.timesteps == 15


def test_a_session_joins_between_the_steps_of_another() -> None:
    model = SumModel()
    sender = Sender(model, config(step=2))
    sender.open(1, 2)
    sender.send({"epoch": 1, "x": ramp(0, 6, 1)})
    sender.step()
    sender.send({"epoch": 2, "x": ramp(0, 2, 2)})
    sender.run()
    assert model.batch_sizes == [1, 2, 1]


def test_steps_overlap_up_to_the_depth() -> None:
    sender = Sender(SumModel(), config(step=2), overlap=True)
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 10, 1)})
    for launched, complete in ((2, 0), (4, 0), (6, 2), (8, 4), (10, 6), (10, 8), (10, 10)):
        assert sender.step()
        assert sender.engine._scheduler.left.sum() == 10 - launched
        assert sender.engine._sessions.progress.sum() == complete
        assert sender.engine.ready == (complete < 10)
        sender.engine.check()
    sender.poll()
    assert not sender.engine.ready
    assert sender.line(1).tolist() == totals(10, 1).tolist()


def test_a_failed_step_waits_for_those_before_it() -> None:
    sender = Sender(SumModel(poison=-5), config(step=2), overlap=True)
    sender.open(1, 2)
    x = ramp(0, 6, 1)
    x[5] = -6
    sender.send({"epoch": 1, "x": x})
    sender.run()
    assert sender.line(1).tolist() == totals(4, 1).tolist()
    sender.poll()
    assert sender.errors[1][0]["code"] == "step_failed"
    assert "at timestep 4" in str(sender.errors[1][0]["message"])
    sender.send({"epoch": 1, "start": 4, "x": ramp(4, 2, 1), "rewind": 1})
    sender.run()
    sender.poll()
    assert sender.line(1).tolist() == totals(6, 1).tolist()
    sender.engine.check()


def test_what_is_on_its_way_at_an_abort_reaches_nobody() -> None:
    sender = Sender(SumModel(), config(slots=1, max_sessions=1), overlap=True)
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 4, 1)})
    sender.step()
    sender.send({"epoch": 1, "close": ABORT})
    sender.open(2)
    sender.send({"epoch": 2, "x": ramp(0, 3, 2)})
    sender.run()
    sender.poll()
    assert sender.outputs.keys() == {2}
    assert sender.line(2).tolist() == totals(3, 2).tolist()
    sender.engine.check()


def test_resend_runs_once_and_is_answered_again() -> None:
    model = SumModel()
    sender = Sender(model, config())
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 3, 1)})
    sender.run()
    sender.send({"epoch": 1, "x": ramp(0, 3, 1)})
    sender.poll()
    assert [start for start, _ in sender.outputs[1]] == [0, 0]
    assert sender.outputs[1][0][1].tolist() == sender.outputs[1][1][1].tolist() == totals(3, 1).tolist()
    assert sum(model.batch_sizes) == 1


def test_resend_with_more_behind_it_runs_only_what_is_new() -> None:
    sender = Sender(SumModel(), config())
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 3, 1), "acked": 0})
    sender.run()
    sender.send({"epoch": 1, "start": 1, "x": ramp(1, 4, 1), "acked": 3})
    sender.run()
    assert sender.line(1).tolist() == totals(5, 1).tolist()


def test_resend_of_a_running_segment_joins_it() -> None:
    sender = Sender(SumModel(), config(step=2))
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 6, 1)})
    sender.send({"epoch": 1, "x": ramp(0, 6, 1)})
    sender.run()
    sender.poll()
    assert sender.engine.stats.timesteps == 6
    assert sender.line(1).tolist() == totals(6, 1).tolist()


def test_outputs_stay_until_acknowledged() -> None:
    sender = Sender(SumModel(), config())
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 4, 1)})
    sender.run()
    assert sender.engine.gauges()["retained_bytes"] == 4 * 16
    sender.send({"epoch": 1, "start": 4, "acked": 4})
    sender.run()
    assert sender.engine.gauges()["retained_bytes"] == 0


def test_memory_of_a_slow_reader_is_its_own() -> None:
    """Outputs of sessions that share a step with one that never acknowledges go back."""
    sender = Sender(SumModel(), config(slots=64, batch=64))
    sender.open(*range(64))
    sender.send(*({"epoch": epoch, "x": ramp(0, 4, epoch)} for epoch in range(64)))
    sender.run()
    sender.send(*({"epoch": epoch, "start": 4, "acked": 4} for epoch in range(1, 64)))
    sender.run()
    assert sender.engine._outputs.nbytes == 4 * 16  # not the step's whole block


def test_window_stops_the_session_that_does_not_read() -> None:
    sender = Sender(SumModel(), config(max_window_timesteps=8, max_segment_timesteps=8))
    sender.open(1, 2)
    sender.send({"epoch": 1, "x": ramp(0, 8, 1)})
    sender.run()
    sender.send({"epoch": 1, "start": 8, "x": ramp(8, 1, 1)}, {"epoch": 2, "x": ramp(0, 8, 2)})
    sender.run()
    sender.poll()
    assert sender.errors[1][0]["code"] == "window_full"
    assert sender.line(2).tolist() == totals(8, 2).tolist()
    sender.send({"epoch": 1, "start": 8, "x": ramp(8, 1, 1), "acked": 8})
    sender.run()
    assert sender.line(1).tolist() == totals(9, 1).tolist()


@pytest.mark.parametrize("bound", ["max_pending_bytes", "max_retained_bytes"])
def test_a_full_replica_refuses_with_a_retry(bound: str) -> None:
    full = config()
    full = dataclasses.replace(full, engine=dataclasses.replace(full.engine, **{bound: 64}))
    sender = Sender(SumModel(), full)
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 5, 1)})
    sender.poll()
    assert sender.errors[1][0]["code"] == "overloaded"
    assert sender.errors[1][0]["retry"] is True
    sender.send({"epoch": 1, "x": ramp(0, 4, 1)})
    sender.run()
    assert sender.line(1).tolist() == totals(4, 1).tolist()


def test_start_too_high_names_what_is_expected() -> None:
    sender = Sender(SumModel(), config())
    sender.open(1)
    sender.send({"epoch": 1, "start": 5, "x": ramp(5, 1, 1)})
    assert sender.errors[1][0]["code"] == "start_mismatch"
    assert sender.errors[1][0]["details"] == {"expected": 0, "rewind": 0}
    assert "starts at 5, 0 was expected" in str(sender.errors[1][0]["message"])


def test_close_takes_effect_when_everything_before_it_ran() -> None:
    sender = Sender(SumModel(), config(step=2))
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 4, 1), "close": 6})
    sender.run()
    assert "closed" not in sender.notices[1]
    sender.send({"epoch": 1, "start": 4, "x": ramp(4, 3, 1)})  # one too many
    sender.send({"epoch": 1, "start": 4, "x": ramp(4, 2, 1)})
    sender.run()
    sender.poll()
    assert sender.line(1).tolist() == totals(6, 1).tolist()
    assert sender.notices[1] == ["opened", "refused", "closed"]
    assert sender.errors[1][0]["code"] == "session_ended"


def test_tombstones_answer_late_calls() -> None:
    sender = Sender(SumModel(), config())
    sender.open(1)
    sender.send({"epoch": 1, "close": 0})
    sender.send({"epoch": 1, "x": ramp(0, 1, 1)}, {"epoch": 9, "x": ramp(0, 1, 9)})
    assert sender.notices[1] == ["opened", "closed", "closed"]
    assert sender.errors[9][0]["code"] == "not_owner"


def test_idle_sessions_end_and_say_so() -> None:
    model = SumModel()
    sender = Sender(model, config(idle_timeout_s=50))
    sender.open(1, 2)
    sender.send({"epoch": 1, "x": ramp(0, 1, 1)})
    sender.run()
    sender.now += 45
    sender.send({"epoch": 2, "x": ramp(0, 1, 2)})
    sender.run()
    sender.now += 10
    sender.engine.expire(sender.now)
    sender.poll()
    assert sender.notices[1][-1] == "idle"
    assert "idle" not in sender.notices[2]
    assert model.ended == [("s1", "idle")]
    sender.engine.check()


def test_abort_drops_what_is_pending_and_frees_everything() -> None:
    model = SumModel()
    sender = Sender(model, config())
    sender.open(1, 2)
    sender.send({"epoch": 1, "x": ramp(0, 9, 1)}, {"epoch": 2, "x": ramp(0, 9, 2)})
    sender.step()
    sender.send({"epoch": 1, "start": 9, "close": ABORT})
    sender.run()
    sender.poll()
    assert sender.line(2).tolist() == totals(9, 2).tolist()
    assert model.ended == [("s1", "aborted")]
    sender.engine.check()


def test_one_failed_step_fails_its_batch_and_nothing_else() -> None:
    sender = Sender(SumModel(poison=0), config(slots=4, batch=2, step=2))
    sender.open(1, 2, 3)
    sender.send(*({"epoch": epoch, "x": ramp(0, 2, epoch)} for epoch in (1, 2, 3)))
    sender.run()
    bad = ramp(2, 2, 1)
    bad[1] = -1
    sender.send(
        {"epoch": 1, "start": 2, "x": bad},
        {"epoch": 2, "start": 2, "x": ramp(2, 2, 2)},
        {"epoch": 3, "start": 2, "x": ramp(2, 2, 3)},
    )
    sender.run()
    sender.poll()
    assert sender.line(3).tolist() == totals(4, 3).tolist()
    for epoch in (1, 2):
        assert [e["code"] for e in sender.errors[epoch]] == ["step_failed"]
        assert sender.errors[epoch][0]["details"] == {"expected": 2, "rewind": 1}
    sender.send({"epoch": 1, "start": 2, "x": ramp(2, 2, 1)})  # sent before the failure was known
    assert sender.errors[1][-1]["code"] == "rewound"
    sender.send(*({"epoch": epoch, "start": 2, "rewind": 1, "x": ramp(2, 2, epoch)} for epoch in (1, 2)))
    sender.run()
    for epoch in (1, 2):
        assert sender.line(epoch).tolist() == totals(4, epoch).tolist()
    sender.engine.check()


def test_a_model_that_returns_a_wrong_state_changes_nothing() -> None:
    class Shrinking(SumModel):
        shrink = False

        def forward(self, x, state):  # type: ignore[no-untyped-def]
            y, state = super().forward(x, state)
            return y, state[:, :1] if self.shrink else state

    model = Shrinking()
    sender = Sender(model, config())
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 1, 1)})
    sender.run()
    model.shrink = True
    sender.send({"epoch": 1, "start": 1, "x": ramp(1, 1, 1)})
    sender.run()
    model.shrink = False
    sender.send({"epoch": 1, "start": 1, "rewind": 1, "x": ramp(1, 1, 1)})
    sender.run()
    assert sender.errors[1][0]["code"] == "step_failed"
    assert sender.line(1).tolist() == totals(2, 1).tolist()


def test_initial_state_is_where_a_session_starts() -> None:
    sender = Sender(SumModel(), config())
    sender.send(opens=(Open(1, "a", (np.array([[100, 200]]),)), Open(2, "b")))
    sender.send({"epoch": 1, "x": ramp(0, 2, 1)}, {"epoch": 2, "x": ramp(0, 2, 1)})
    sender.run()
    assert (sender.line(1) - sender.line(2)).tolist() == [[100, 200], [100, 200]]
    sender.engine.check()


def test_a_wrong_initial_state_is_refused() -> None:
    sender = Sender(SumModel(), config())
    sender.send(opens=(Open(1, "a", (np.zeros((1, 3), np.int64),)),))
    assert sender.errors[1][0]["code"] == "invalid_input"
    assert "[[1, 3]]" in str(sender.errors[1][0]["message"])


def test_a_slot_holds_nothing_of_its_last_session() -> None:
    sender = Sender(SumModel(), config(slots=1, batch=1))
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 3, 1), "close": 3})
    sender.run()
    sender.open(2)
    sender.send({"epoch": 2, "x": ramp(0, 3, 2)})
    sender.run()
    assert sender.line(2).tolist() == totals(3, 2).tolist()
    assert sender.engine._slots.generation.tolist() == [2]


def test_nan_stays_in_its_session() -> None:
    sender = Sender(FloatSumModel(), config())
    sender.open(1, 2)
    sender.send({"epoch": 1, "x": [[np.nan]]}, {"epoch": 2, "x": [[1.0]]})
    sender.run()
    sender.send({"epoch": 2, "start": 1, "x": [[2.0]]})
    sender.run()
    assert np.isnan(sender.line(1)).all()
    assert sender.line(2).tolist() == [[1.0], [3.0]]


@pytest.mark.parametrize("array", [np.zeros((1, 2), np.longdouble), np.zeros((1, 2), complex), np.full((1, 2), "a")])
def test_an_initial_state_of_a_strange_dtype_is_refused(array: np.ndarray) -> None:
    sender = Sender(SumModel(), config())
    sender.send(opens=(Open(1, "a", (array,)), Open(2, "b", (np.full((1, 2), 5, ">i8"),)), Open(-3, "c")))
    assert {epoch: errors[0]["code"] for epoch, errors in sender.errors.items()} == {
        1: "invalid_input",
        -3: "invalid_input",
    }
    sender.send({"epoch": 2, "x": [[1, 1]]})
    sender.run()
    assert sender.line(2).tolist() == [[6, 6]]


def test_another_gpu_than_the_first_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.device=cuda:1: a replica uses the first GPU"):
        choose_device("cuda:1")


def test_what_is_on_its_way_takes_room() -> None:
    limited = dataclasses.replace(
        config(step=2), engine=dataclasses.replace(config(step=2).engine, max_retained_bytes=6 * 16)
    )
    sender = Sender(SumModel(), limited, overlap=True)
    sender.open(1, 2)
    sender.send({"epoch": 1, "x": ramp(0, 6, 1)})
    sender.step()
    sender.send({"epoch": 2, "x": ramp(0, 1, 2)})
    sender.run()
    sender.poll()
    assert sender.errors[2][0]["code"] == "overloaded"
    sender.send({"epoch": 1, "start": 6, "acked": 6})
    sender.send({"epoch": 2, "x": ramp(0, 1, 2)})
    sender.run()
    sender.poll()
    assert len(sender.line(2)) == 1


def test_too_many_sessions_are_refused() -> None:
    sender = Sender(SumModel(), config(max_sessions=4))
    sender.open(1, 2, 3, 4, 5)
    assert sender.errors[5][0]["code"] == "too_many_sessions"
    sender.send({"epoch": 1, "close": 0})
    sender.open(5)
    assert sender.notices[5][-1] == "opened"


def test_frames_for_another_owner_or_out_of_shape_change_nothing() -> None:
    sender = Sender(SumModel(), config())
    sender.open(1)
    with pytest.raises(NotOwner, match="'other'"):
        sender.send({"epoch": 1, "x": ramp(0, 1)}, owner="other")
    with pytest.raises(InvalidInput, match="twice"):
        sender.send({"epoch": 1, "x": ramp(0, 1)}, {"epoch": 1, "start": 1, "x": ramp(1, 1)})
    columns = np.array([[1], [1], [0], [0], [NO_CLOSE], [0]])
    overflow = np.array([[2**63 - 1, 2**63 - 1, 2], [1, 2, 3], *[[0, 0, 0]] * 4])  # of lengths that seem to sum to 0
    for torn, message in (
        (Frame("local", "test", columns, np.ones((1, 3), np.int64)), r"expected int64 \(1, 2\)"),
        (Frame("local", "test", overflow, np.ones((0, 2), np.int64)), "an entry of"),
        (Frame("local", "test", columns[1:], np.ones((1, 2), np.int64)), r"expected int64 \(6, n\)"),
        (Frame("local", "test", columns.astype(np.int32), np.ones((1, 2), np.int64)), r"expected int64 \(6, n\)"),
    ):
        with pytest.raises(InvalidInput, match=message):
            sender.engine.receive(torn, object(), 0.0)
    assert sender.run() == 0


def test_epochs_that_nobody_has_are_refused() -> None:
    sender = Sender(SumModel(), config())
    sender.open(1, 2)
    sender.send({"epoch": 2, "close": ABORT})
    far = 1 + len(sender.engine._sessions._row_near)  # like 1 in its low bits
    sender.send(*({"epoch": epoch, "x": ramp(0, 1)} for epoch in (3, far, 1)))
    sender.run()
    sender.poll()
    assert {epoch: errors[0]["code"] for epoch, errors in sender.errors.items()} == {3: "not_owner", far: "not_owner"}
    assert len(sender.line(1)) == 1
    with pytest.raises(InvalidInput, match="negative epoch"):
        sender.send({"epoch": -1, "x": ramp(0, 1)})
    sender.send(opens=(Open(2**63, "too large"), Open(-1, "too small")))
    assert [sender.notices[epoch] for epoch in (2**63, -1)] == [["refused"]] * 2
    sender.open(far)
    sender.send({"epoch": 1, "start": 1, "x": ramp(1, 1)}, {"epoch": far, "x": ramp(0, 2, 7)})
    sender.run()
    sender.poll()
    assert (len(sender.line(1)), len(sender.line(far))) == (2, 2)


def test_answers_are_cut_by_bytes() -> None:
    small = dataclasses.replace(config(slots=8, batch=8), frame=FrameConfig(max_bytes=65536, answer_within_s=10))
    wide = SumModel()
    wide.input = wide.outputs["total"] = dataclasses.replace(SumModel.input, shape=(2,))
    sender = Sender(wide, small)
    sender.open(1, 2)
    answers = []
    collect = sender.engine.answers
    sender.engine.answers = lambda now: answers.extend(found := collect(now)) or found  # type: ignore[method-assign]
    sender.send({"epoch": 1, "x": ramp(0, 4096, 1)}, {"epoch": 2, "x": ramp(0, 4096, 2)})
    while sender.engine.step(sender.now):
        pass
    for _ in range(4):
        sender.poll()
    sizes = [sum(value.nbytes for value in answer.outputs.values()) for _, answer in answers]
    assert sum(sizes) == 2 * 4096 * 16
    assert max(sizes) <= 65536 + 16 * 16  # a piece of one step may go over
    assert sender.line(2).tolist() == totals(4096, 2).tolist()


def test_ten_thousand_sessions_over_512_slots() -> None:
    sender = Sender(SumModel(), config(slots=512, batch=256, max_sessions=10_000))
    everyone = range(1, 10_001)
    sender.open(*everyone)
    rng = random.Random(0)
    at = dict.fromkeys(everyone, 0)
    for _ in range(30):
        some = rng.sample(everyone, 1000)
        sender.send(*({"epoch": e, "start": at[e], "x": ramp(at[e], 2, e), "acked": at[e]} for e in some))
        for epoch in some:
            at[epoch] += 2
        sender.run()
        sender.poll()
    for epoch in everyone:
        if at[epoch]:
            assert sender.line(epoch).tolist() == totals(at[epoch], epoch).tolist()
    assert sender.engine.stats.evictions > 1000
    sender.engine.check()


def test_a_dead_owner_cannot_be_built_over_too_few_dimensions() -> None:
    class Stateless(SumModel):
        def initial_state(self, batch: int) -> torch.Tensor:
            return torch.zeros(3)

    with pytest.raises(InvalidInput, match="exactly one dimension must be the batch"):
        Engine(Stateless(), config())


def test_calls_of_a_sender_do_not_pile_up() -> None:
    """Each frame brings a call; one step may answer several, and what is left over only waits."""
    sender = Sender(SumModel(), config(slots=8, batch=8))
    sender.open(1)
    tickets = [object() for _ in range(5)]
    for ticket in tickets:
        frame = Frame("local", "test", np.zeros((6, 0), np.int64), np.zeros((0, 2), np.int64))
        sender.engine.receive(frame, ticket, sender.now)
    answered = [ticket for ticket, _ in sender.engine.answers(sender.now)]
    assert answered == tickets[: len(tickets) - MAX_WAITING]


def test_outputs_in_a_row_that_changed_hands_go_to_who_has_it_now() -> None:
    """A session ends with outputs to send; another sender's gets its row, and outputs, before the first is answered."""
    engine = Engine(SumModel(), config())

    def send(sender: str, epoch: int, x: np.ndarray, close: int = NO_CLOSE, opens: tuple[Open, ...] = ()) -> None:
        columns = np.array([[len(x)], [epoch], [0], [0], [close], [0]])
        engine.receive(Frame("local", sender, columns, x, opens), sender, 0.0)
        while engine.ready:
            engine.step(0.0)

    send("first", 1, ramp(0, 3, 1), opens=(Open(1, "one"),))
    send("first", 1, ramp(0, 0), close=ABORT)
    send("second", 2, ramp(0, 3, 2), opens=(Open(2, "two"),))
    assert engine._sessions.epoch[0] == 2
    answers = engine.answers(0.0)
    assert [(sender, answer.epoch.tolist()) for sender, answer in answers if len(answer.epoch)] == [("second", [2])]
    (found,) = (answer.outputs["total"] for sender, answer in answers if sender == "second")
    assert found.tolist() == totals(3, 2).tolist()


@pytest.mark.parametrize("together", [1, 25])
@pytest.mark.parametrize("overlap", [False, True])
def test_checkpoints_have_the_states_of_their_timesteps(overlap: bool, together: int) -> None:
    check_checkpoints("cpu", overlap=overlap, together=together)


def test_a_session_is_not_over_before_its_outputs_are_acknowledged() -> None:
    """Who comes back for them asks the directory for it."""
    sender = Sender(SumModel(), config())
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 3), "close": 3})
    sender.run()
    assert sender.engine.stats.take_ended() == []
    sender.send({"epoch": 1, "start": 3, "acked": 3})
    assert sender.engine.stats.take_ended() == [1]


def test_whoever_closes_what_has_closed_is_told_how_it_ended() -> None:
    """It may have been closed for who sent to it before; the refusal could overtake that it has."""
    sender = Sender(SumModel(), config())
    sender.open(1)
    for _ in range(2):
        sender.send({"epoch": 1, "x": ramp(0, 3), "close": 3})
        sender.run()
        sender.poll()
    assert sender.notices[1][-1] == "closed" and 1 not in sender.errors


def test_who_has_fewer_outputs_than_are_gone_cannot_take_a_session_over() -> None:
    """It came from another owner at timestep 2; what was before is where it was sent from, if anywhere."""
    sender = Sender(SumModel(), config())
    sender.send(opens=(Open(1, "a", start=2),))
    sender.send(opens=(Open(2, "a", adopts=1, acked=1),), sender="other")
    assert sender.errors[2][0]["code"] == "not_owner"
    sender.send(opens=(Open(3, "a", adopts=1, acked=2),), sender="other")
    assert sender.notices[3] == ["opened"]


def test_a_session_that_its_own_sender_takes_over_does_not_end() -> None:
    """It has asked before, and not heard what came of it."""
    sender = Sender(SumModel(), config())
    sender.open(1)
    for before in (1, 2):
        sender.send(opens=(Open(2, "s1", adopts=before),), sender="other")
    sender.poll()
    assert sender.notices[1][-1] == "taken over" and set(sender.notices[2]) == {"opened"}
    sender.send({"epoch": 2, "x": ramp(0, 3)}, sender="other")
    sender.run()
    assert len(sender.outputs[2]) > 0


def test_no_states_are_kept_for_a_sender_that_is_gone() -> None:
    sender = Sender(SumModel(), config(idle_timeout_s=50, checkpoint_timesteps=1, checkpoint_apart_s=0))
    sender.engine._checkpoints._together = 25  # so that it is read when the answer has gone
    sender.open(1)
    sender.send({"epoch": 1, "x": ramp(0, 1, 1)})
    sender.run()
    assert sender.engine._checkpoints.num_slabs == 1
    for _ in range(3):
        sender.now += 60
        sender.engine.expire(sender.now)
    assert not sender.engine._mailboxes
    assert sender.engine._checkpoints.num_slabs == 0


def test_sessions_may_be_idle_for_ever() -> None:
    sender = Sender(SumModel(), config(idle_timeout_s=math.inf))
    sender.open(1)
    sender.send(sender="gone")
    for _ in range(3):
        sender.now += 1e9
        sender.engine.expire(sender.now)
        assert sender.engine.wake_at() <= sender.now + 3600
    assert sender.engine.num_sessions == 1
    assert list(sender.engine._mailboxes) == ["test"], "who is gone is forgotten all the same"


def test_a_session_alone_never_waits_for_room_when_it_keeps_to_the_limits() -> None:
    full = config()
    full = dataclasses.replace(full, engine=dataclasses.replace(full.engine, max_retained_bytes=6 * 16 + 5))
    sender = Sender(SumModel(), full)
    window = sender.engine.limits.max_window
    assert window == 6
    sender.open(1)
    for start in range(0, 5 * window, window):
        sender.send({"epoch": 1, "start": start, "acked": start})  # in a frame of its own, since it makes the room
        sender.send({"epoch": 1, "start": start, "x": ramp(start, window, 1), "acked": start})
        sender.run()
    assert sender.line(1).tolist() == totals(5 * window, 1).tolist()
    assert Engine(SumModel(), config()).limits.max_window == config().session.max_window_timesteps


def test_a_frame_never_holds_more_than_may_be_pending() -> None:
    full = config()
    full = dataclasses.replace(full, engine=dataclasses.replace(full.engine, max_pending_bytes=64))
    sender = Sender(SumModel(), full)
    assert sender.engine.max_frame_bytes == 64
    assert Engine(SumModel(), config()).max_frame_bytes == config().frame.max_bytes
