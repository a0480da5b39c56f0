from typing import Any

import pytest
import torch

from serve_app.engine import packed_lstm
from serve_app.engine.packed_lstm import pack_weights
from serve_app.models.options import SileroOptions
from serve_app.models.silero_vad import SileroVad

CANNOT = {
    "two directions": {"bidirectional": True},
    "a projection": {"proj_size": 4},
    "no bias": {"bias": False},
    "the batch first": {"batch_first": True},
    "fp64": {"dtype": torch.float64},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def states(layers: int, batch: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(layers, batch, hidden), torch.randn(layers, batch, hidden)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("hidden", [8, 33])
@pytest.mark.parametrize(("timesteps", "batch"), [(1, 1), (1, 5), (16, 1), (7, 64)])
def test_it_gives_what_the_layer_gives(layers: int, hidden: int, timesteps: int, batch: int) -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(12, hidden, layers)
    x = torch.randn(batch, timesteps, 12).transpose(0, 1)  # as frames have it: not in one piece
    h, c = (leaf.transpose(1, 2).contiguous().transpose(1, 2) for leaf in states(layers, batch, hidden))
    with torch.inference_mode():
        y, (h_n, c_n) = lstm(x, (h, c))
        assert pack_weights(lstm) == 1
        before = h.clone(), c.clone()
        found, state = lstm(x, (h, c))
    for value, expected in zip((found, *state), (y, h_n, c_n), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(h, before[0])
    assert torch.equal(c, before[1]), "the state was written to"


def test_what_it_cannot_run_goes_the_layers_own_way() -> None:
    lstm = torch.nn.LSTM(4, 8)
    x = torch.randn(3, 2, 4)
    with torch.inference_mode():
        y, _ = lstm(x)
        one, _ = lstm(x[:, 0])
        packed_in, _ = lstm(torch.nn.utils.rnn.pack_sequence([x[:, 0]]))
        assert pack_weights(lstm) == 1
        torch.testing.assert_close(lstm(x)[0], y)
        torch.testing.assert_close(lstm(x[:, 0])[0], one)
        torch.testing.assert_close(lstm(torch.nn.utils.rnn.pack_sequence([x[:, 0]]))[0].data, packed_in.data)
    lstm(x, states(1, 2, 8))[0].sum().backward()  # type: ignore[no-untyped-call]
    assert lstm.weight_hh_l0.grad is not None


@pytest.mark.parametrize("which", CANNOT)
def test_other_layers_stay_as_they_are(which: str) -> None:
    options: Any = CANNOT[which]
    lstm = torch.nn.LSTM(4, 8, **options)
    assert pack_weights(lstm) == 0
    assert "forward" not in vars(lstm)


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
        monkeypatch.setattr(packed_lstm, "LSTM", 3)
    elif wrong == "an operator that fails":
        monkeypatch.setattr(packed_lstm, "LSTM", "lstm")
    else:
        monkeypatch.setattr(packed_lstm, "REORDER", "no_such_operator")
    assert pack_weights(lstm) == 0
    assert "forward" not in vars(lstm)
