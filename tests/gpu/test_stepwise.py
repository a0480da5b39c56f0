"""Layers timestep by timestep: what the module gives, for any shape. Needs no Ray."""

from collections.abc import Sequence

import pytest
import torch

from serve_app.models.options import RnnOptions
from serve_app.models.rnn import Rnn
from serve_app.models.stepwise import StepwiseLayers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where there is a GPU"),
]
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}


@pytest.fixture(autouse=True)
def full_precision() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("layers", "timesteps", "batch"), [(1, 1, 1), (1, 5, 20), (3, 4, 7)])
@torch.inference_mode()
def test_they_give_what_the_module_gives(cell: str, dtype: str, layers: int, timesteps: int, batch: int) -> None:
    model = Rnn(RnnOptions(cell=cell, dtype=dtype, input=24, hidden=40, layers=layers)).to("cuda")
    x = torch.randn(timesteps, batch, 24, device="cuda").to(model.dtype)
    state = [torch.randn(layers, batch, 40, device="cuda").to(model.dtype) / 2 for _ in range(1 + (cell == "lstm"))]
    before = [leaf.clone() for leaf in state]
    y, after = StepwiseLayers(model.rnn)(x, tuple(state) if cell == "lstm" else state[0])
    model.double()
    exact = [leaf.double() for leaf in state]
    with torch.backends.cudnn.flags(enabled=False):
        y_exact, after_exact = model.rnn(x.double(), tuple(exact) if cell == "lstm" else exact[0])
    for found, expected in zip((y, *_leaves(after)), (y_exact, *_leaves(after_exact)), strict=True):
        assert found.shape == expected.shape
        assert float((found.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True)), "the state before is as it was"


def test_the_engine_may_choose_them_where_they_run() -> None:
    for options in (RnnOptions(cell="gru"), RnnOptions(cell="lstm", dtype="fp16", hidden=40)):
        assert "stepwise" in Rnn(options).to("cuda").alternatives()
        assert "stepwise" not in Rnn(options).alternatives(), "on a CPU"
    for options in (RnnOptions(cell="relu"), RnnOptions(cell="lstm", projection=8)):
        assert "stepwise" not in Rnn(options).to("cuda").alternatives()


def _leaves(state: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    return (state,) if isinstance(state, torch.Tensor) else state
