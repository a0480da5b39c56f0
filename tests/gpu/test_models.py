"""Models in files, and pipelines, on a GPU: the same outputs as on the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config import ModelConfig
from serve_app.models import registry
from serve_app.spec import TensorSpec
from tests.files import INPUT, save_exported, save_script
from tests.gpu.test_engine import relative, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where there is a GPU"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        yield


def check(config: ModelConfig, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = {epoch: rng.normal(0, 0.1, (rng.integers(10, 40), *shape)).astype(np.float32) for epoch in range(1, 13)}
    engine = {"slots": 6, "max_batch_size": 4, "max_step_timesteps": 8}
    found, expected = (run(registry.load(config), x, device, **engine) for device in ("cuda", "cpu"))
    assert relative(found, expected) < 1e-4


def test_torchscript(tmp_path: Path) -> None:
    save_script(tmp_path / "layer.pt")
    options: dict[str, Any] = {
        "path": str(tmp_path / "layer.pt"),
        "inputs": [{"name": "x", "shape": ["B", "T", INPUT]}],
        "state": [{"name": "state.0", "next": "h", "shape": [1, "B", 6]}],
        "constants": {"scale": 2},
        "outputs": {"y": "y"},
    }
    check(registry.check(ModelConfig("file", options)), (INPUT,))


def test_torch_export(tmp_path: Path) -> None:
    save_exported(tmp_path / "cell.pt2")
    options: dict[str, Any] = {
        "path": str(tmp_path / "cell.pt2"),
        "state": [{"name": "h", "next": "1"}],
        "outputs": {"y": "0"},
    }
    check(registry.check(ModelConfig("file", options)), (INPUT,))


def test_a_pipeline() -> None:
    rnn = {"name": "rnn", "input": 1, "hidden": 32, "layers": 2}
    parts = [
        {"name": "speech", "model": "silero_vad"},
        {"name": "energy", "model": "tests.gpu.test_models:Energy"},
        {"name": "top", "model": rnn, "input": "energy"},
    ]
    options = {"parts": [parts[0], {**parts[1], "input": "input"}, parts[2]], "outputs": ["top"]}
    check(registry.check(ModelConfig("pipeline", options)), (512,))


class Energy(torch.nn.Module):
    """Of 128 samples; four timesteps of it are one of Silero."""

    sample_rate = 16000

    def __init__(self) -> None:
        super().__init__()
        self.input, self.outputs = TensorSpec((128,)), {"energy": TensorSpec((1,))}

    def initial_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = []
        for energy in x.square().sum(-1, keepdim=True):
            state = 0.9 * state + energy
            y.append(state)
        return torch.stack(y), state
