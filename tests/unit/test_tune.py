"""The tuner: what it proposes, and what it writes. Rates are made up, but for one run of everything."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from bench import tune
from bench.tune import Load, Settings, Tuner, Workload
from serve_app.config import load_models

STATELESS = {"model": "tests.stateless:MaskedSum", "batching": {"dtype": "fp32"}, "engine.device": "cpu"}
RECURRENT = {"model": {"name": "rnn", "hidden": 64}, "engine": {"device": "cpu", "slots": 300}}


class MadeUp(Tuner):
    """Larger batches are faster and slower to answer; measurements are off by up to 2 %."""

    def __init__(self, args: dict[str, Any], delay_ms: float) -> None:
        super().__init__(args, Workload(64, [1], 0.0), delay_ms)
        self.random = random.Random(0)

    def true(self, settings: Settings) -> Load:
        batch, *others = settings
        rate = 100.0 * (batch + 1) ** 0.7 / (1 + sum((i - 1) ** 2 for i in others) / 10)
        return Load(rate, 10.0 * (batch + 1) + 3 * sum(others))

    def measure(self, settings: Settings) -> Load:
        load = self.true(settings)
        return Load(load.rate * self.random.uniform(0.98, 1.02), load.p99_ms)


@pytest.mark.parametrize("args", [STATELESS, RECURRENT])
@pytest.mark.parametrize("delay_ms", [20, 50, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_within_the_delay_is_found_without_trying_all(
    args: dict[str, Any], delay_ms: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = MadeUp(args, delay_ms)
    everything = tuner.all_settings()
    monkeypatch.setattr(tune.time, "monotonic", lambda: len(tuner.measured))
    chosen, _ = tuner.search(40, seed=seed)
    best = max(tuner.true(settings).score(delay_ms) for settings in everything)
    assert tuner.true(chosen).score(delay_ms) >= 0.95 * best
    assert len(tuner.measured) <= 40 < 0.5 * len(everything)


def test_settings_that_change_nothing_are_left_out() -> None:
    found = [MadeUp(STATELESS, 50).changes(s) for s in MadeUp(STATELESS, 50).all_settings()]
    assert all(c["batching.max_queue_delay_s"] > 0 for c in found if c["batching.preferred_batch_sizes"])
    assert all(c["batching.max_batch_size"] >= 8 for c in found if c["batching.preferred_batch_sizes"])
    assert MadeUp(RECURRENT, 50).args((0, 1, 2))["engine"] == {
        "device": "cpu", "slots": 300, "max_batch_size": 4, "max_step_timesteps": 2, "delay_target_s": 0.01,
    }  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """The command, with short measurements, for the arguments of an application."""
    for name, value in {"WARM_UP_S": 0.01, "FINALISTS": 2, "TURNS": 1, "use_replica_env": lambda: None}.items():
        monkeypatch.setattr(tune, name, value)

    def run(args: dict[str, Any], *options: str) -> Result:
        given = tmp_path / "given.yaml"
        given.write_text(yaml.safe_dump({"applications": [{"name": "some", "args": args}]}))
        return CliRunner().invoke(tune.main, [str(given), "--seconds", "0.02", "--minutes", "0.01", *options])

    return run


@pytest.mark.parametrize("args", [STATELESS, RECURRENT])
def test_it_measures_and_writes_a_file_that_can_be_served(
    args: dict[str, Any], quick: Callable[..., Result], tmp_path: Path
) -> None:
    out = tmp_path / "tuned.yaml"
    done = quick(args, "--delay-ms", "5000", "--outstanding", "8", "--lengths", "1,4", "--out", str(out))
    assert done.exit_code == 0, done.output
    (tuned,) = yaml.safe_load(out.read_text())["applications"]
    assert tuned["name"] == "some"
    assert len(load_models(tuned["args"])) == 1


def test_a_delay_that_nothing_keeps_is_an_error(quick: Callable[..., Result]) -> None:
    done = quick(STATELESS, "--delay-ms", "0.001", "--outstanding", "2")
    assert done.exit_code == 1
    assert "no settings keep within 0.001 ms" in done.output
