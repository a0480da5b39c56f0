"""The fastest way to run a step that is right, remembered."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from serve_app.engine.calibration import Calibration, Forward
from tests.fakes import FloatSumModel

CPU = torch.device("cpu")


class Model(FloatSumModel):
    """With a way that is the same, and one that is off by a thousandth."""

    def same(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, state)

    def wrong(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = super().forward(x, state)
        return y * 1.001, state

    def alternatives(self) -> Mapping[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
        return {"same": self.same, "wrong": self.wrong}


def choose(model: FloatSumModel, file: str, seconds: dict[str, float]) -> tuple[str, list[str]]:
    """The name of what is chosen, and of what was timed for that."""
    calibration = Calibration(model, CPU, file)
    timed: list[str] = []

    def name_of(forward: Forward) -> str:
        return next(name for name, known in calibration.forwards.items() if known == forward)

    def time_s(forward: Forward) -> float:
        timed.append(name_of(forward))
        return seconds[timed[-1]]

    return name_of(calibration.choose(4, 8, time_s)), timed


def test_the_fastest_is_taken_but_nothing_wrong(caplog: pytest.LogCaptureFixture) -> None:
    seconds = {"torch": 2.0, "same": 1.0, "wrong": 0.1}
    assert choose(Model(), "", seconds) == ("same", ["torch", "same"])
    assert "wrong is not used for steps of 4 x 8" in caplog.text
    assert choose(Model(), "", seconds | {"same": 3.0})[0] == "torch"


@pytest.mark.parametrize("off", [0.0, 0.001])
def test_what_runs_in_slots_is_checked_there(off: float) -> None:
    class InSlots:
        def __call__(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return FloatSumModel().forward(x, state)

        def in_slots(
            self,
            x: torch.Tensor,
            states: torch.Tensor,
            slots: torch.Tensor,
            outputs: Sequence[torch.Tensor],
            spare: int,
        ) -> None:
            assert x.transpose(0, 1).is_contiguous()
            assert spare == 3
            outputs[0][:], states[slots] = FloatSumModel().forward(x, states[slots])
            states += off

    class Model(FloatSumModel):
        def alternatives(self) -> Mapping[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
            return {"in_slots": InSlots()}

    calibration = Calibration(Model(), CPU, "", spare=3)
    chosen = calibration.choose(4, 8, lambda forward: 1.0 if hasattr(forward, "in_slots") else 2.0)
    assert hasattr(chosen, "in_slots") == (off == 0)


def test_a_way_that_fails_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Model):
        def same(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            raise RuntimeError("no such instruction")

    assert choose(Failing(), "", {"torch": 2.0}) == ("torch", ["torch"])
    assert "same is not used for steps of 4 x 8: it fails" in caplog.text


def test_what_is_remembered_is_checked_again(tmp_path: Path) -> None:
    class Worse(Model):
        def same(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.wrong(x, state)

    Worse.__qualname__ = Model.__qualname__
    file = str(tmp_path / "calibration.json")
    assert choose(Model(), file, {"torch": 2.0, "same": 1.0})[0] == "same"
    assert choose(Worse(), file, {"torch": 2.0}) == ("torch", ["torch"])


def test_a_way_that_is_new_is_measured_whatever_is_remembered(tmp_path: Path) -> None:
    class Older(Model):
        def alternatives(self) -> Mapping[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
            return {"wrong": self.wrong}

    Older.__qualname__ = Model.__qualname__
    file = str(tmp_path / "calibration.json")
    assert choose(Older(), file, {"torch": 2.0})[0] == "torch"
    assert choose(Model(), file, {"torch": 2.0, "same": 1.0})[0] == "same"


def test_one_way_is_not_measured() -> None:
    assert choose(FloatSumModel(), "", {}) == ("torch", [])


def test_choices_are_remembered_on_disk(tmp_path: Path) -> None:
    file = tmp_path / "a" / "calibration.json"
    seconds = {"torch": 2.0, "same": 1.0}
    assert choose(Model(), str(file), seconds) == ("same", ["torch", "same"])
    assert choose(Model(), str(file), seconds) == ("same", [])
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), "gone")))
    assert choose(Model(), str(file), seconds) == ("same", ["torch", "same"])
    assert [path.name for path in file.parent.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize("text", ["{", "3", "null", '{"a": ["b"]}'])
def test_a_file_that_is_none_is_reported_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    caplog.set_level(logging.WARNING)
    file = tmp_path / "calibration.json"
    file.write_text(text)
    assert choose(Model(), str(file), {"torch": 2.0, "same": 1.0})[0] == "same"
    assert "cannot be read" in caplog.text
    assert choose(Model(), str(tmp_path / "calibration.json" / "b"), {"torch": 2.0, "same": 1.0})[0] == "same"
    assert "cannot be written" in caplog.text
