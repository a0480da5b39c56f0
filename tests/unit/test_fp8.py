import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve_app.errors import ConfigError
from serve_app.models import fp8
from serve_app.models.options import RnnOptions
from serve_app.models.rnn import Rnn

ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(-1e4, 1e4, width=32))


@given(ROWS)
def test_rounding_is_to_four_bits_and_changes_nothing_the_second_time(values: np.ndarray) -> None:
    rows = torch.from_numpy(values)
    rounded = fp8.round_to_fp8(rows)
    assert torch.equal(fp8.round_to_fp8(rounded), rounded)
    smallest = (rows.abs().amax(-1, keepdim=True) * 2.0**-15).clamp(min=2.0**-74)  # below, steps are even
    assert ((rounded - rows).abs() <= torch.maximum(rows.abs() / 16, smallest)).all()
    scaled = rounded * fp8.scales(rows)
    assert torch.equal(scaled.to(fp8.DTYPE).float(), scaled)
    assert scaled.abs().max() <= fp8.LARGEST


def test_recurrent_weights_are_rounded_and_the_rest_is_not() -> None:
    options = {"input": 6, "hidden": 16, "layers": 2, "output": 5}
    plain, rounded = Rnn(RnnOptions(**options)), Rnn(RnnOptions(**options, quantization="fp8"))  # type: ignore[arg-type]
    for (name, before), after in zip(plain.named_parameters(), rounded.parameters(), strict=True):
        if name in ("rnn.weight_hh_l0", "rnn.weight_ih_l1", "rnn.weight_hh_l1"):
            assert torch.equal(after, fp8.round_to_fp8(before))
            assert not torch.equal(after, before)
        else:
            assert torch.equal(after, before)


def test_outputs_are_near_those_of_the_weights_as_they_were() -> None:
    options = {"input": 6, "hidden": 64, "layers": 3}
    plain, rounded = Rnn(RnnOptions(**options)), Rnn(RnnOptions(**options, quantization="fp8"))  # type: ignore[arg-type]
    x = torch.randn(50, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y, _ = plain(x, plain.initial_state(4))
        other, _ = rounded(x, rounded.initial_state(4))
    assert 1e-4 < (other - y).norm() / y.norm() < rounded.tolerance


def test_other_quantizations_are_refused() -> None:
    from serve_app.config import load_config

    with pytest.raises(ConfigError, match=r"model\.quantization"):
        load_config({"model": {"name": "rnn", "quantization": "int4"}})


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30])
def test_rows_of_next_to_nothing_stay_finite(value: float) -> None:
    rounded = fp8.round_to_fp8(torch.full((2, 3), value))
    assert (rounded.abs() <= 2 * value).all()
