import importlib.util
import math
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from examples.own_model import Smoother
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.models import registry
from serve_app.models.fingerprint import fingerprint
from serve_app.models.interface import RecurrentModel
from serve_app.models.options import RnnOptions, SileroOptions
from serve_app.models.rnn import Rnn
from serve_app.models.silero_vad import SileroVad

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
RNNS = {
    **{cell: RnnOptions(cell=cell, input=6, hidden=10) for cell in ("relu", "tanh", "lstm", "gru")},
    "projection": RnnOptions(input=6, hidden=10, projection=4),
    "output": RnnOptions(input=6, hidden=10, projection=4, output=7),
    "top_k": RnnOptions(cell="gru", input=6, hidden=10, layers=1, output=20, top_k=3),
    "bf16": RnnOptions(input=6, hidden=10, dtype="bf16"),
    "fp16": RnnOptions(cell="gru", input=6, hidden=10, dtype="fp16", output=5),
}
SPLITS = [(7,), (1,) * 7, (3, 4), (6, 1)]
pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]


@pytest.fixture(scope="module", params=[16000, 8000])
def silero(request: pytest.FixtureRequest) -> SileroVad:
    return SileroVad(SileroOptions(sample_rate=request.param))


@pytest.fixture(params=[*RNNS, "smoother", "silero_vad"])
def model(request: pytest.FixtureRequest) -> Any:
    if request.param in RNNS:
        return Rnn(RNNS[request.param])
    return Smoother(channels=3) if request.param == "smoother" else SileroVad(SileroOptions(sample_rate=8000))


def noise(model: Any, steps: int, batch: int) -> torch.Tensor:
    """Random input [T, B, ...] of the model's dtype."""
    x = torch.randn(steps, batch, *model.input.shape, generator=torch.Generator().manual_seed(steps))
    return x.to(getattr(torch, model.input.dtype))


def run(model: Any, x: torch.Tensor, split: tuple[int, ...], state: Any = None) -> tuple[dict[str, torch.Tensor], Any]:
    """Outputs by name over all of x [T, B, ...], in forwards of `split` timesteps, and the state after."""
    state = model.initial_state(x.shape[1]) if state is None else state
    parts = []
    for part in torch.split(x, list(split)):
        y, state = model.forward(part, state)
        parts.append(y if isinstance(y, Mapping) else {name: y for name in model.outputs})
    return {name: torch.cat([part[name] for part in parts]) for name in model.outputs}, state


def tensors(state: Any) -> list[torch.Tensor]:
    return [state] if isinstance(state, torch.Tensor) else list(state)


def assert_close(a: Any, b: Any) -> None:
    (y, state), (y_b, state_b) = a, b
    tolerance = TOLERANCE[tensors(state)[0].dtype]
    for one, other in zip([*y.values(), *tensors(state)], [*y_b.values(), *tensors(state_b)], strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# every model


def test_outputs_are_as_declared(model: Any) -> None:
    assert isinstance(model, RecurrentModel)
    y, _ = run(model, noise(model, 7, 2), (7,))
    for name, spec in model.outputs.items():
        assert y[name].shape == (7, 2, *spec.shape)
        assert y[name].dtype == getattr(torch, spec.dtype)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_split_anywhere_equals_whole(model: Any, split: tuple[int, ...]) -> None:
    x = noise(model, 7, 3)
    assert_close(run(model, x, split), run(model, x, (7,)))


def test_batched_equals_alone(model: Any) -> None:
    x = noise(model, 7, 5)
    y, state = run(model, x, (7,))
    batch_dim = [a.shape.index(5) for a in tensors(model.initial_state(5))]
    for i in range(5):
        its_own = tuple(s.narrow(dim, i, 1) for s, dim in zip(tensors(state), batch_dim, strict=True))
        assert_close(run(model, x[:, i : i + 1], (7,)), ({name: a[:, i : i + 1] for name, a in y.items()}, its_own))


def test_input_and_state_are_not_modified_or_kept(model: Any) -> None:
    x = noise(model, 2, 3)
    _, state = run(model, x, (2,))
    before = [a.clone() for a in [x, *tensors(state)]]
    _, after = run(model, x, (2,), state)
    assert all(torch.equal(a, b) for a, b in zip(before, [x, *tensors(state)], strict=True))
    kept = [a.clone() for a in tensors(after)]
    x.zero_()
    assert all(torch.equal(a, b) for a, b in zip(kept, tensors(after), strict=True))


# rnn


@pytest.mark.parametrize("cell", ["relu", "tanh", "lstm", "gru"])
def test_rnn_state_shapes(cell: Any) -> None:
    state = Rnn(replace(RNNS[cell], layers=3)).initial_state(4)
    assert [tuple(a.shape) for a in tensors(state)] == [(3, 4, 10)] * (2 if cell == "lstm" else 1)
    h, c = Rnn(RNNS["projection"]).initial_state(5)
    assert (h.shape, c.shape) == ((2, 5, 4), (2, 5, 10))


def test_rnn_top_k_is_the_head_of_all_outputs() -> None:
    options = RNNS["top_k"]
    top, every = Rnn(options), Rnn(replace(options, top_k=0))
    x = noise(top, 4, 2)
    y, _ = run(top, x, (4,))
    values, indices = run(every, x, (4,))[0]["y"].topk(3)
    torch.testing.assert_close(y, {"values": values, "indices": indices.int()})


def test_rnn_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (Rnn(replace(RNNS["output"], seed=seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rnn_weights_come_from_a_file(tmp_path: Path, suffix: str, dtype: Any) -> None:
    path = tmp_path / f"weights{suffix}"
    saved = Rnn(replace(RNNS["output"], seed=1))
    save(saved.state_dict(), path)
    loaded = Rnn(replace(RNNS["output"], seed=2, dtype=dtype, weights=str(path)))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name].to(loaded.dtype))


def save(weights: Any, path: Path) -> None:
    torch.save(weights, path) if path.suffix != ".safetensors" else safetensors.torch.save_file(weights, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_rnn_weights_that_do_not_fit(tmp_path: Path, suffix: str) -> None:
    path, options = tmp_path / f"weights{suffix}", RNNS["output"]
    good = Rnn(options).state_dict()
    for weights, message in (
        (
            Rnn(replace(options, hidden=12)).state_dict(),
            r"rnn.weight_ih_l0 in .*weights\..* shape \[48, 6\], .*\[40, 6\]",
        ),
        ({n: w for n, w in good.items() if n != "head.bias"}, r"weights\..* has no head.bias \(expected shape \[7\]\)"),
        ({**good, "tail.bias": torch.zeros(2)}, r"weights\..* has tail.bias, which"),
    ):
        save(weights, path)
        with pytest.raises(ConfigError, match=message):
            Rnn(replace(options, weights=str(path)))


def test_rnn_weights_files_that_are_none(tmp_path: Path) -> None:
    def load(name: str) -> None:
        Rnn(replace(RNNS["lstm"], weights=str(tmp_path / name)))

    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(ConfigError, match=f"{name} cannot be read"):
            load(name)
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"other\.pt is not a state dict"):
        load("other.pt")
    with pytest.raises(ConfigError, match=r"missing\.pt is not a file"):
        load("missing.pt")
    with pytest.raises(ConfigError, match=r"\.onnx.*\.pt, \.pth and \.safetensors"):
        load("model.onnx")


# silero_vad


@pytest.fixture(scope="module")
def package() -> Any:
    """The package's own model, which keeps its state inside."""
    spec = importlib.util.find_spec("silero_vad")
    assert spec and spec.origin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(Path(spec.origin).parent / "data" / "silero_vad.jit")  # type: ignore[no-untyped-call]


def voice_like(model: SileroVad, steps: int) -> torch.Tensor:
    """[T, 1, samples]: gliding pitch with three formants, in syllables, over a little noise; in part taken for speech.

    The noise is needed: in exact silence between harmonics the package itself is 1e-5 from its result in float64.
    """
    samples = steps * model.input.shape[0]
    t = torch.arange(samples) / model.sample_rate
    phase = (2 * math.pi * (120 + 30 * torch.sin(2 * math.pi * 1.5 * t)) / model.sample_rate).cumsum(0)
    voice = torch.zeros(samples)
    for harmonic in range(1, 28):
        gain = sum(math.exp(-(((130 * harmonic - formant) / 200) ** 2)) for formant in (600, 1200, 2500))
        voice += gain * torch.sin(harmonic * phase)
    syllables = torch.sin(2 * math.pi * 2 * t).clamp(min=0)
    return (0.1 * voice * syllables).view(steps, 1, -1) + 0.003 * noise(model, steps, 1)


@pytest.mark.parametrize("sound", ["noise", "voice"])
def test_silero_equals_the_package(silero: SileroVad, package: Any, sound: str) -> None:
    x = 0.3 * noise(silero, 63, 1) if sound == "noise" else voice_like(silero, 63)
    package.reset_states()
    expected = torch.stack([package(timestep, silero.sample_rate) for timestep in x])[..., 0]
    if sound == "voice":
        assert expected.min() < 0.1 and expected.max() > 0.5
    for split in ((63,), (1,) * 63, (10, 1, 17, 35)):
        y, _ = run(silero, x, split)
        torch.testing.assert_close(y["probability"], expected, rtol=0, atol=1e-5)


def test_silero_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps silero-vad==6\.2\.3"):
        SileroVad(SileroOptions())


# registry


def test_check_reads_options_by_their_types() -> None:
    checked = registry.check(ModelConfig("rnn", {"hidden": "64", "cell": "gru", "weights": "none"}))
    assert checked.options == {**checked.options, "hidden": 64, "cell": "gru", "weights": None, "layers": 2}
    assert registry.check(checked) == checked
    assert registry.check(ModelConfig("silero_vad", {"sample_rate": "8000"})).options == {"sample_rate": 8000}


@pytest.mark.parametrize("name", ["rnn", "silero_vad", "own.module:Class"])
def test_check_imports_no_torch(name: str) -> None:
    code = f"import sys; from serve_app.models import registry as r; r.check(r.ModelConfig({name!r})); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load() -> None:
    assert isinstance(registry.load(ModelConfig("silero_vad", {"sample_rate": "8000"})), SileroVad)
    rnn = registry.load(ModelConfig("rnn", {"input": "3", "cell": "tanh"}))
    assert isinstance(rnn, Rnn) and rnn.input.shape == (3,)
    own = registry.load(ModelConfig("examples.own_model:Smoother", {"channels": "4", "half_life": "1e2"}))
    assert isinstance(own, Smoother) and own.input.shape == (4,)
    assert own.decay.item() == pytest.approx(0.5**0.01)


class NoInitialState:
    input = outputs = forward = None


class NoForward(torch.nn.Module):
    input = outputs = initial_state = None


class Takes(Smoother):
    def __init__(self, size: int, *, names: list[str] | None = None, kind: torch.dtype = torch.float32) -> None:
        super().__init__(size)
        self.names = names


def test_a_class_may_have_arguments_of_any_type() -> None:
    model = registry.load(ModelConfig(f"{__name__}:Takes", {"size": "2", "names": ["a", "b"]}))
    assert isinstance(model, Takes) and model.names == ["a", "b"] and model.input.shape == (2,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("silero-vad", {}, r"silero-vad is not known; did you mean silero_vad\? Known: rnn, silero_vad"),
        ("whisper", {}, r"whisper is not known\. Known: rnn, silero_vad"),
        ("rnn", {"hiden": 8}, r"model\.hiden is not a setting; did you mean model\.hidden\?"),
        ("rnn", {"hidden": "many"}, r"model\.hidden is 'many', expected a whole number"),
        ("silero_vad", {"sample_rate": 44100}, r"model\.sample_rate is 44100, expected one of 16000, 8000"),
        ("examples/own_model.py:Smoother", {}, "write it as package.module:Class"),
        ("examples.own:Smoother", {}, "No module named 'examples.own'"),
        ("examples.own_model:Smother", {}, r"has no Smother; did you mean Smoother\?"),
        ("examples.own_model:torch", {}, "is not a class"),
        (
            "examples.own_model:Smoother",
            {"chanels": 2},
            r"model\.chanels is not a setting; did you mean model\.channels",
        ),
        (f"{__name__}:Takes", {}, r"model\.size is missing"),
        (f"{__name__}:NoInitialState", {}, "has no initial_state"),
        (f"{__name__}:NoForward", {}, "has no forward"),
    ],
)
def test_what_is_wrong_is_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.load(ModelConfig(name, options))


# own model


def test_smoother_follows_the_mean_and_marks_what_is_unusual() -> None:
    model = Smoother(channels=1, half_life=50)
    x = 1000 + 0.1 * noise(model, 400, 1)
    x[300] = 1002
    y, _ = run(model, x, (400,))
    assert (y["mean"][100:] - 1000).abs().max() < 0.1
    assert y["deviation"].flatten().argmax() == 300


def test_a_fingerprint_is_of_class_options_weights_and_dtypes(tmp_path: Path) -> None:
    def of(**options: Any) -> str:
        config = registry.check(ModelConfig("rnn", {"input": 6, "hidden": 10, **options}))
        return fingerprint(registry.load(config), config.options)

    file = tmp_path / "weights.pt"
    torch.save(Rnn(RnnOptions(input=6, hidden=10)).state_dict(), file)
    assert of() == of() == of(weights=str(file))
    others = [{"seed": 1}, {"cell": "gru"}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"layers": 1}, {"top_k": 2}]
    assert len({of(), *(of(**other) for other in others)}) == len(others) + 1
    assert fingerprint(Smoother(), {}) != fingerprint(Smoother(half_life=5.0), {}), "another buffer"
    assert fingerprint(Smoother(), {}) != fingerprint(Smoother(2), {}), "another shape"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_torch_module_of_your_own_gets_its_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save(Smoother(half_life=7).state_dict(), path)
    model = registry.load(ModelConfig("examples.own_model:Smoother", {"weights": str(path)}))
    assert isinstance(model, Smoother) and model.decay.item() == pytest.approx(0.5 ** (1 / 7))
    with pytest.raises(ConfigError, match="SumModel is no torch module: it has no place for them"):
        registry.load(ModelConfig("tests.fakes:SumModel", {"weights": str(path)}))
    save({"decay": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"decay in model\.weights=.* has shape \[2\], expected \[\]"):
        registry.load(ModelConfig("examples.own_model:Smoother", {"weights": str(path)}))


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil-was-here"),)


def test_weights_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"decay": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"weights\.pt cannot be read: UnpicklingError"):
        registry.load(ModelConfig("examples.own_model:Smoother", {"weights": str(tmp_path / "weights.pt")}))
    assert not (tmp_path / "evil-was-here").exists()
