"""What bench.compare and bench.naive make of their measurements."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.closed_loop import Call, Inputs, Load, check_outputs, plain_module, run_load, summarize
from bench.compare import Round
from bench.compare import summarize as summarize_rounds
from bench.naive import HANDLES, NaiveConfig, Point, best_configs, finalists, tuned
from serve_app.config import ModelConfig
from serve_app.models import registry

PLAIN, FAST = NaiveConfig(), NaiveConfig(handle="grpc")


def load(rate: float) -> Load:
    return Load(rate, p50_s=0.01, p99_s=0.02)


def outputs(inputs: Inputs, session: int, num_segments: int) -> list[np.ndarray]:
    module, state, found = plain_module(), None, []
    for index in range(num_segments):
        y, state = module(torch.from_numpy(inputs.segment(session, index))[:, None], state)
        found.append(y[:, 0].numpy())
    return found


def test_only_settings_with_the_states_in_an_actor_can_be_the_best() -> None:
    points = [Point(PLAIN, load(1)), Point(FAST, load(2)), Point(replace(FAST, states="replica"), load(3))]
    assert best_configs(points, plain=False) == [FAST, PLAIN]
    assert best_configs(points, plain=True) == [PLAIN]


def test_of_repeats_the_best_counts() -> None:
    points = [Point(PLAIN, load(3)), Point(FAST, load(2)), Point(PLAIN, load(1))]
    assert best_configs(points, plain=False) == [PLAIN, FAST]


def test_the_best_is_measured_again_with_every_handle() -> None:
    points = [Point(PLAIN, load(1)), Point(replace(FAST, max_batch_size=64), load(2))]
    assert finalists(points) == [PLAIN, *(replace(FAST, max_batch_size=64, handle=handle) for handle in HANDLES)]


def test_the_committed_sweep_can_be_read() -> None:
    assert tuned(plain=True).handle == "plain"
    assert tuned(plain=False).states != "replica"


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [Round(load(100.0 * n), load(10.0 * n), load(5.0 * n), raw=200.0 * n) for n in (1, 2, 30)]
    figures = summarize_rounds(rounds)
    assert figures["vs_naive"] == figures["vs_naive_min"] == figures["vs_naive_max"] == 10
    assert figures["vs_naive_plain"] == 20
    assert figures["lockstep_share_of_raw"] == 0.5
    assert figures["naive_segments_per_s"] == 20


def test_a_load_counts_answers() -> None:
    assert summarize([0.1, 0.2, 0.3, 0.4], seconds=2) == Load(2.0, 0.25, pytest.approx(0.397))
    with pytest.raises(RuntimeError, match="no segment"):
        summarize([], seconds=2)


async def test_each_session_gets_its_own_segments_in_order() -> None:
    inputs = Inputs(2)
    seen: dict[int, list[np.ndarray]] = {0: [], 3: []}

    def call_of(session: int) -> Call:
        async def call(x: np.ndarray) -> np.ndarray:
            await asyncio.sleep(0)
            seen.setdefault(session, []).append(x)
            return x + 1

        return call

    result, kept = await run_load([call_of(i) for i in range(4)], inputs, 0.05, 0.0, keep=(0, 3), max_kept=5)
    assert result.rate > 0
    for session, ys in kept.items():
        assert len(ys) == 5
        for index, y in enumerate(ys):
            np.testing.assert_array_equal(seen[session][index], inputs.segment(session, index))
            np.testing.assert_array_equal(y, inputs.segment(session, index) + 1)


def test_right_outputs_pass_and_wrong_ones_do_not() -> None:
    inputs = Inputs(3)
    kept = {0: outputs(inputs, 0, 9), 5: outputs(inputs, 5, 9)}
    check_outputs(kept, inputs)
    kept[5][8] = kept[5][8] + 1e-3
    with pytest.raises(RuntimeError, match=r"segment 8 of session 5 is off by 0\.001"):
        check_outputs(kept, inputs)
    with pytest.raises(RuntimeError, match="no output"):
        check_outputs({7: []}, inputs)


def test_the_plain_module_has_the_weights_of_the_served_one() -> None:
    served = registry.load(registry.check(ModelConfig("rnn", {"seed": 0})))
    assert isinstance(served, torch.nn.Module)
    expected = plain_module().state_dict()
    for name, tensor in served.state_dict().items():
        assert torch.equal(tensor, expected[name.removeprefix("rnn.")])
