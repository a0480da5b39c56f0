"""Models in files: ONNX, TorchScript, torch.export; with sessions, and without."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config import AppConfig, BatchingConfig, EngineConfig, ModelConfig, load_config
from serve_app.engine.batcher import build_batcher
from serve_app.engine.build import build_engine
from serve_app.engine.engine import choose_device
from serve_app.errors import ConfigError
from serve_app.models import registry
from serve_app.models.fingerprint import fingerprint
from serve_app.models.silero_vad import SileroVad
from serve_app.rows import RowsRequest
from tests.fakes import Sender
from tests.files import DOUBLE, Cell, Layer, expected, save_exported, save_onnx, save_script
from tests.speech import takes

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

STATE = {"name": "h", "next": "h_next"}
OPTIONS: dict[str, dict[str, Any]] = {
    "cell.onnx": {"state": [STATE], "constants": {"scale": 2}},
    "layer.pt": {
        "inputs": [{"name": "x", "shape": ["B", "T", 4]}],
        "state": [{"name": "state.0", "next": "h", "shape": [1, "B", 6]}],
        "constants": {"scale": "2"},
    },
    "cell.pt2": {"state": [{"name": "h", "next": "1"}], "outputs": {"y": "0"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save_onnx(path / "cell.onnx")
    save_script(path / "layer.pt")
    save_exported(path / "cell.pt2")
    return path


def load(path: Path, **options: Any) -> Any:
    return registry.load(registry.check(ModelConfig("file", {"path": str(path), **options})))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def run(model: Any, x: torch.Tensor, *split: int) -> dict[str, torch.Tensor]:
    """Outputs over all of x [T, B, ...], in forwards of `split` timesteps."""
    state, parts = model.initial_state(x.shape[1]), []
    for part in torch.split(x, [*split]):
        y, state = model.forward(part, state)
        parts.append(y if isinstance(y, dict) else {name: y for name in model.outputs})
    return {name: torch.cat([part[name] for part in parts]) for name in model.outputs}


# What they compute.


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("split", [(7,), (1,) * 7, (3, 4)])
def test_every_format_equals_the_module(folder: Path, name: str, split: tuple[int, ...]) -> None:
    model = load(folder / name, **OPTIONS[name])
    assert model.input.shape == (4,) and {n: spec.shape for n, spec in model.outputs.items()} == {"y": (6,)}
    for batch in (1, 5):
        x = noise(7, batch, 4)
        torch.testing.assert_close(run(model, x, *split)["y"], expected(x))


@pytest.mark.parametrize("name", OPTIONS)
def test_sessions_at_different_timesteps_share_batches(folder: Path, name: str) -> None:
    options = {f"model.{key}": value for key, value in {"path": str(folder / name), **OPTIONS[name]}.items()}
    config = load_config({"model": "file", **options, "engine": {"device": "cpu", "slots": 2, "max_batch_size": 2}})
    sender = Sender(registry.load(config.model), config)
    x = noise(12, 5, 4)
    sender.open(1, 2, 3, 4, 5)
    for part in range(0, 12, 3):
        sender.send(*({"epoch": e, "start": part, "x": x[part : part + 3, e - 1]} for e in range(1, 6)))
        sender.step()
    sender.run()
    sender.poll()
    for epoch in range(1, 6):
        np.testing.assert_allclose(sender.line(epoch), expected(x)[:, epoch - 1], rtol=1e-5, atol=1e-6)
    assert build_engine(config).spec.state_bytes == 24


def silero(rate: int) -> Any:
    samples = {16000: 512, 8000: 256}[rate]
    return load(
        Path("silero_vad:data/silero_vad.onnx"),
        inputs=[{"name": "input", "shape": ["B", samples + samples // 8], "context": samples // 8}],
        outputs={"probability": "output"},
        state=[{"name": "state", "next": "stateN"}],
        constants={"sr": rate},
        sample_rate=rate,
    )


@pytest.mark.parametrize("rate", [16000, 8000])
def test_sileros_onnx_file_equals_the_port(rate: int) -> None:
    """Real speech, sessions in one batch; the samples before a timestep are part of the state."""
    model, port = silero(rate), registry.load(ModelConfig("silero_vad", {"sample_rate": rate}))
    assert (model.input, model.sample_rate) == (port.input, rate)
    x = torch.from_numpy(takes(6, 512 * 60)).view(6, -1, *model.input.shape).transpose(0, 1)
    ported = run(port, x, len(x))["probability"]
    assert ported.min() < 0.1 and ported.max() > 0.9
    for split in ((len(x),), (20, 1, len(x) - 21)):
        torch.testing.assert_close(run(model, x, *split)["probability"][..., 0], ported, rtol=0, atol=1e-5)


def test_sileros_onnx_file_in_an_engine_equals_the_port() -> None:
    """Sessions that stand at different timesteps, more of them than slots, in batches of several."""
    config = AppConfig(engine=EngineConfig(device="cpu", slots=6, max_batch_size=4, max_step_timesteps=5))
    x = takes(9, 512 * 60).reshape(9, 60, 512)
    lines = []
    for model in (silero(16000), SileroVad(registry.SileroOptions())):
        sender, rng = Sender(model, config), np.random.default_rng(0)
        sent = dict.fromkeys(range(1, 10), 0)
        sender.open(*sent)
        while min(sent.values()) < 60:
            lengths = {epoch: min(60 - sent[epoch], int(rng.integers(0, 8))) for epoch in sent}
            sender.send(
                *({"epoch": e, "start": sent[e], "x": x[e - 1, sent[e] : sent[e] + n]} for e, n in lengths.items() if n)
            )
            sent = {epoch: sent[epoch] + lengths[epoch] for epoch in sent}
            sender.step()
        sender.run()
        sender.poll()
        lines.append(np.stack([sender.line(epoch).reshape(60) for epoch in sent]))
    np.testing.assert_allclose(*lines, rtol=0, atol=1e-5)


def test_a_context_may_be_longer_than_a_timestep(tmp_path: Path) -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(-1)

    save_script(tmp_path / "mean.pt", Mean())
    model = load(tmp_path / "mean.pt", inputs=[{"name": "x", "shape": ["T", "B", 5], "context": 3}])
    x = noise(8, 3, 2)
    heard = torch.cat([torch.zeros(3, 3), x.transpose(0, 1).flatten(1)], 1)
    due = heard.unfold(1, 5, 2).mean(-1).T
    for split in ((8,), (1,) * 8, (1, 5, 2)):
        torch.testing.assert_close(run(model, x, *split)["0"], due)


async def test_a_stateless_model_in_a_file(tmp_path: Path) -> None:
    class Sums(torch.nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"sums": (ids * mask).cumsum(1), "total": (ids * mask).sum(1)}

    save_script(tmp_path / "sums.pt", Sums())
    ids = {"shape": ["B", "L"], "dtype": "int64"}
    inputs = [{"name": "ids", **ids}, {"name": "mask", **ids}]
    options = {"path": str(tmp_path / "sums.pt"), "inputs": inputs, "max_length": 8}
    config = AppConfig(ModelConfig("file", options), EngineConfig(device="cpu"), batching=BatchingConfig())
    batcher = build_batcher(config)
    request = RowsRequest({"ids": np.array([[1, 2, 3]]), "mask": np.array([[1, 1, 0]])})
    found = (await batcher.infer(request)).values
    assert found["sums"].tolist() == [[1, 3, 3]] and found["total"].tolist() == [3]
    await batcher.stop()


# What does not fit is refused when it is configured.

X = {"name": "x", "shape": ["B", 4]}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cell.onnx",
            {"inputs": [X], "constants": {}},
            r"cell\.onnx has the input scale: say in model\.inputs, state or constants",
        ),
        ("cell.onnx", {"inputs": [{"name": "y"}]}, r"model\.inputs names y, .*cell\.onnx has the inputs x, h, scale"),
        ("cell.onnx", {"state": [{"name": "c", "next": "h_next"}]}, r"model\.state names c, .* inputs x, h, scale"),
        ("cell.onnx", {"constants": {"sr": 1}}, r"model\.constants names sr, .* inputs x, h, scale"),
        ("cell.onnx", {"state": [{"name": "h", "next": "c"}]}, r"model\.state\[h\]\.next is c, .* outputs y, h_next"),
        ("cell.onnx", {"outputs": {"p": "prob"}}, r"model\.outputs\.p is prob, .* has the outputs y, h_next"),
        ("cell.onnx", {"inputs": [{**X, "shape": ["B", 5]}]}, r"x\]\.shape is \[B, 5\], .*onnx has \[any, 4\]"),
        ("cell.onnx", {"inputs": [{**X, "shape": ["T", "B", 4]}]}, r"shape is \[T, B, 4\], .* has \[any, 4\]"),
        ("cell.onnx", {"inputs": [{**X, "shape": ["B", "T"]}]}, r"shape is \[B, T\], .*has \[any, 4\] \(a size"),
        ("cell.onnx", {"inputs": [{**X, "dtype": "int64"}]}, r"\[x\]\.dtype is int64, .*cell\.onnx has float32"),
        ("cell.onnx", {"constants": {"scale": "loud"}}, r"model\.constants\.scale is 'loud', .* cannot take it"),
        ("cell.onnx", {"constants": {"scale": [[1, 2], [3, 4]]}}, r"does not run with x float32 \[1, 4\], h float32"),
        ("cell.onnx", {"state": []}, r"has the inputs x, h: a model with sessions takes one"),
        ("cell.onnx", {"inputs": [{**X, "context": 4}]}, r"context is 4, the input is \[B, 4\].*shorter than that"),
        ("layer.pt", {"inputs": []}, r"model\.inputs\[x\]\.shape is missing, .*layer\.pt says nothing of it"),
        ("layer.pt", {"inputs": [{"name": "x", "shape": ["B", 4]}]}, r"layer\.pt does not run with x float32 \[1, 4\]"),
        (
            "layer.pt",
            {"inputs": [{"name": "x", "shape": ["T", "B", 4]}]},
            r"pt does not run with x .*\(it runs with B=1",
        ),
        (
            "layer.pt",
            {"inputs": [{"name": "x", "shape": ["B", "T", 4], "dtype": "int32"}]},
            r"does not run with x int32 \[1, 1, 4\], state\.0 float32 \[1, 1, 6\]: RuntimeError",
        ),
        ("cell.pt2", {"outputs": {"y": "2"}}, r"model\.outputs\.y is 2, .*cell\.pt2 has the outputs 0, 1"),
    ],
)
def test_what_a_file_does_not_have(folder: Path, name: str, options: dict[str, Any], message: str) -> None:
    options = {**OPTIONS[name], **options}
    if options["state"] == []:
        options["inputs"] = [{"name": "x"}, {"name": "h"}]
    with pytest.raises(ConfigError, match=message):
        load(folder / name, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": [X, X]}, "x is given twice in model.inputs, model.state and model.constants"),
        ({"inputs": [{**X, "shape": ["N", 4]}]}, r"model\.inputs\[x\]\.shape has N, expected whole numbers .* T, B, L"),
        ({"inputs": [{**X, "shape": ["T", 4]}]}, r"shape is \[T, 4\], it must have one B"),
        ({"inputs": [{**X, "shape": ["B", "T", "T"]}]}, "has T 2 times"),
        ({"inputs": [{**X, "shape": ["B", 0]}]}, "shape has 0"),
        ({"inputs": [{**X, "dtype": "float"}]}, r"\.dtype is float, expected one of float16, float32"),
        ({"inputs": [{**X, "context": -1}]}, "context is -1"),
        ({"state": [{"name": "h"}]}, r"model\.state\[0\]\.next is missing"),
        ({"state": [{"name": "h", "next": "n", "shape": ["T", "B"]}]}, "a state has the same size at every timestep"),
        ({"max_length": -1}, r"model\.max_length is -1"),
        ({"max_lenght": 1}, r"did you mean model\.max_length\?"),
    ],
)
def test_options_are_checked_without_the_file(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.check(ModelConfig("file", {"path": "nowhere.onnx", **options}))


def test_a_file_of_fixed_batch_or_of_another_state(tmp_path: Path) -> None:
    options = OPTIONS["cell.onnx"]
    save_onnx(tmp_path / "one.onnx", batch=1)
    with pytest.raises(ConfigError, match=r"x\]\.shape is missing, .*one\.onnx has \[1, 4\]"):
        load(tmp_path / "one.onnx", **options)
    with pytest.raises(ConfigError, match=r"is \[B, 4\], .*has \[1, 4\] \(a size that the file fixes cannot be B"):
        load(tmp_path / "one.onnx", **options, inputs=[X])
    save_onnx(tmp_path / "less.onnx", next_size=5)
    with pytest.raises(ConfigError, match=r"the output h_next of .*less\.onnx|h in .* goes on as h_next"):
        load(tmp_path / "less.onnx", **options)
    save_onnx(tmp_path / "double.onnx", dtype=DOUBLE)
    assert load(tmp_path / "double.onnx", **options).input.dtype == "float64"
    save_exported(tmp_path / "two.pt2", dynamic=False)
    with pytest.raises(ConfigError, match=r"two\.pt2 has \[2, 4\]: say it"):
        load(tmp_path / "two.pt2", **OPTIONS["cell.pt2"])


# Files that are broken, of another framework, or hostile.


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.95])
def test_truncated_files(folder: Path, tmp_path: Path, name: str, share: float) -> None:
    whole = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ConfigError, match=rf"model\.path=.*{name} is not .*, or is damaged: \w+: "):
        load(tmp_path / name, **OPTIONS[name])


OTHERS = [
    (name, other) for name in OPTIONS for other in (*OPTIONS, "module.pt", "weights.pt", "noise") if name != other
]


@pytest.mark.parametrize(("name", "other"), [pair for pair in OTHERS if pair[0] != pair[1]])
def test_files_of_another_framework(folder: Path, tmp_path: Path, name: str, other: str) -> None:
    torch.save(Cell(), folder / "module.pt")
    torch.save(Cell().state_dict(), folder / "weights.pt")
    (folder / "noise").write_bytes(bytes(range(256)) * 100)
    (tmp_path / name).write_bytes((folder / other).read_bytes())
    with pytest.raises(ConfigError, match=rf"model\.path=.*{name} is not .*, or is damaged"):
        load(tmp_path / name, **OPTIONS[name])


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for path, message in (
        ("nowhere.onnx", r"nowhere\.onnx is not a file \(looked in"),
        ("model.h5", r"ends in '\.h5': \.onnx, \.pt, \.pt2 can be read"),
        ("silero_vad:data/nothing.onnx", "there is no package silero_vad with this file"),
        ("no_such_package:model.onnx", "there is no package no_such_package with"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(Path(path))


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil-was-here"),)


def rewritten(source: Path, target: Path, changes: dict[str, bytes]) -> None:
    """A copy of an archive of torch, with other entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        top = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            if name.removeprefix(f"{top}/") not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            new.writestr(f"{top}/{name}", content)


def test_nothing_in_an_archive_is_unpickled_or_evaluated(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save({"args": Evil()}, pickled)
    with zipfile.ZipFile(folder / "cell.pt2") as archive:
        config = json.loads(archive.read("cell/data/weights/model_weights_config.json"))
        graph = archive.read("cell/models/model.json").decode()
    for weight in config["config"].values():
        weight["use_pickle"] = True
    evil = '__import__(\\"pathlib\\").Path(\\"evil-was-here\\").touch()'
    attacks = {
        "sample inputs": ({"data/sample_inputs/model.pt": pickled.getvalue()}, "is not torch.export"),
        "weights": ({"data/weights/model_weights_config.json": json.dumps(config).encode()}, "pickled tensors"),
        "constants": ({"data/constants/opaque_obj_0": pickled.getvalue()}, "opaque_obj_0 in it, a compiled library or"),
        "library": ({"data/aotinductor/model/evil.so": b"\x7fELF"}, r"evil\.so in it, a compiled library"),
        "function": (
            {"models/model.json": graph.replace("torch.ops.aten.tanh.default", "torch.os.abort").encode()},
            "is not an allowed operator",
        ),
        "size": ({"models/model.json": graph.replace("Symbol(", f"{evil} or Symbol(").encode()}, "for a size, which"),
    }
    for name, (changes, message) in attacks.items():
        target = tmp_path / f"{name}.pt2"
        rewritten(folder / "cell.pt2", target, changes)
        with pytest.raises(ConfigError, match=message):
            load(target, **OPTIONS["cell.pt2"])
        assert not (tmp_path / "evil-was-here").exists(), name
    torch.save(Evil(), tmp_path / "module.pt")
    with pytest.raises(ConfigError, match=r"module\.pt is not TorchScript"):
        load(tmp_path / "module.pt")
    assert not (tmp_path / "evil-was-here").exists()


# What the rest of the engine needs to know.


def test_onnx_runs_on_the_cpu_only(folder: Path) -> None:
    model = load(folder / "cell.onnx", **OPTIONS["cell.onnx"])
    assert choose_device("auto", model).type == "cpu"
    with pytest.raises(ConfigError, match=r"engine\.device=cuda: this model runs on the CPU only"):
        choose_device("cuda", model)


def test_the_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    def of(path: Path, **options: Any) -> str:
        config = registry.check(ModelConfig("file", {"path": str(path), **OPTIONS["layer.pt"], **options}))
        return fingerprint(registry.load(config), config.options)

    here = folder / "layer.pt"
    (tmp_path / "same.pt").write_bytes(here.read_bytes())
    other = Layer()
    other.w.data += 1
    save_script(tmp_path / "other.pt", other)
    assert of(here) == of(tmp_path / "same.pt")
    assert len({of(here), of(tmp_path / "other.pt"), of(here, constants={"scale": 3})}) == 3


def test_the_fingerprint_is_of_the_file_and_its_external_data_alone(folder: Path, tmp_path: Path) -> None:
    def of(path: Path) -> Any:
        return load(path, **OPTIONS[f"cell{path.suffix}"]).identity

    onnx, exported = tmp_path / "model[v1].onnx", tmp_path / "m.pt2"
    onnx.write_bytes((folder / "cell.onnx").read_bytes())
    exported.write_bytes((folder / "cell.pt2").read_bytes())
    before = of(folder / "cell.onnx")
    assert of(onnx) == before
    (tmp_path / "model[v1].onnx2").write_bytes(b"another model")
    (tmp_path / "model[v1].onnx.d").mkdir()
    assert of(onnx) == before
    for name in ("model[v1].onnx.data", "model[v1].onnx_data"):
        (tmp_path / name).write_bytes(b"weights")
        assert of(onnx) != before
        (tmp_path / name).unlink()
    save_onnx(onnx, batch="rows")
    assert of(onnx) != before
    (tmp_path / "m.pt2.data").write_bytes(b"of something else")
    assert of(exported) == of(folder / "cell.pt2")
