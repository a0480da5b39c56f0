from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve_app.engine import packed_layers
from serve_app.engine.packed_layers import pack_weights
from serve_app.models.options import SileroOptions
from serve_app.models.silero_vad import SileroVad

KINDS: dict[str, Callable[..., torch.nn.RNNBase]] = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "tanh": torch.nn.RNN,
    "relu": lambda *sizes, **options: torch.nn.RNN(*sizes, nonlinearity="relu", **options),
}
CANNOT = {
    "two directions": {"bidirectional": True},
    "no bias": {"bias": False},
    "the batch first": {"batch_first": True},
    "fp64": {"dtype": torch.float64},
}


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layers, "MIN_GRU", (1, 2))
    monkeypatch.setattr(packed_layers, "MIN_PACKED", (16, 2))


def random_state(kind: str, layers: int, batch: int, hidden: int) -> Any:
    h, c = (torch.randn(layers, hidden, batch).transpose(1, 2) for _ in "hc")  # not in one piece
    return (h, c) if kind == "lstm" else h


def leaves(state: Any) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("hidden", [8, 33])
@pytest.mark.parametrize(("timesteps", "batch"), [(1, 1), (1, 5), (16, 1), (7, 64)])
def test_it_gives_what_the_module_gives(kind: str, layers: int, hidden: int, timesteps: int, batch: int) -> None:
    torch.manual_seed(0)
    rnn = KINDS[kind](12, hidden, layers)
    x = torch.randn(batch, timesteps, 12).transpose(0, 1)  # as frames have it: not in one piece
    state = random_state(kind, layers, batch, hidden)
    before = [leaf.clone() for leaf in (x, *leaves(state))]
    with torch.inference_mode():
        y, after = rnn(x, state)
        assert pack_weights(rnn) == 1
        found, found_after = rnn(x, state)
    for value, expected in zip((found, *leaves(found_after)), (y, *leaves(after)), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for value, expected in zip((x, *leaves(state)), before, strict=True):
        assert torch.equal(value, expected), "what it was given was written to"


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_module_gives_in_bf16(kind: str) -> None:
    torch.manual_seed(0)
    rnn = KINDS[kind](12, 32, 2)
    x, state = torch.randn(7, 5, 12), random_state(kind, 2, 5, 32)
    with torch.inference_mode():
        exact, _ = rnn(x, state)
        rnn.to(torch.bfloat16)
        x, state = x.bfloat16(), tuple(leaf.bfloat16() for leaf in leaves(state))
        state = state if kind == "lstm" else state[0]
        y, _ = rnn(x, state)
        if pack_weights(rnn) == 0:
            pytest.skip("this CPU has no bf16 in oneDNN")
        found, _ = rnn(x, state)
    error, error_of_torch = ((each - exact).norm() / exact.norm() for each in (found, y))
    assert found.dtype == torch.bfloat16
    assert error < 1.5 * error_of_torch


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_cannot_run_goes_the_modules_own_way(kind: str) -> None:
    rnn = KINDS[kind](4, 8)
    x = torch.randn(3, 2, 4)
    with torch.inference_mode():
        y, _ = rnn(x)
        one, _ = rnn(x[:, 0])
        packed_in, _ = rnn(torch.nn.utils.rnn.pack_sequence([x[:, 0]]))
        assert pack_weights(rnn) == 1
        torch.testing.assert_close(rnn(x)[0], y)
        torch.testing.assert_close(rnn(x[:, 0])[0], one)
        torch.testing.assert_close(rnn(torch.nn.utils.rnn.pack_sequence([x[:, 0]]))[0].data, packed_in.data)
    rnn(x, random_state(kind, 1, 2, 8))[0].sum().backward()
    assert rnn.weight_hh_l0.grad is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", CANNOT)
def test_other_layers_stay_as_they_are(kind: str, which: str) -> None:
    options: Any = CANNOT[which]
    rnn = KINDS[kind](4, 8, **options)
    assert pack_weights(rnn) == 0
    assert "forward" not in vars(rnn)


def test_small_grus_in_fp32_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layers, "MIN_GRU", (16, 2))
    assert pack_weights(torch.nn.GRU(4, 15)) == 0
    assert pack_weights(torch.nn.GRU(4, 16)) == 1


def test_layers_with_a_projection_stay_as_they_are() -> None:
    assert pack_weights(torch.nn.LSTM(4, 8, proj_size=4)) == 0


def test_layers_within_a_model_are_packed_once() -> None:
    model = SileroVad(SileroOptions())
    assert pack_weights(model) == 1
    forward = model.lstm.forward
    assert pack_weights(model) == 0
    assert model.lstm.forward is forward


@pytest.mark.parametrize("wrong", ["outputs", "an operator that is not there", "an operator that fails"])
def test_a_torch_whose_operators_are_others_does_without(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lstm = torch.nn.LSTM(4, 8)
    if wrong == "outputs":
        monkeypatch.setattr(packed_layers, "LSTM", 3)
    elif wrong == "an operator that fails":
        monkeypatch.setattr(packed_layers, "LSTM", "lstm")
    else:
        monkeypatch.setattr(packed_layers, "REORDER", ("no_such_operator", "nor_this"))
    assert pack_weights(lstm) == 0
    assert "forward" not in vars(lstm)
