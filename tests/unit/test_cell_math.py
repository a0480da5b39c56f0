"""Against torch in fp64, from all bits that an input can have."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from serve_app.engine import cell_math

HIDDEN = 17  # whole vectors, and a rest
WIDE = st.floats(width=32, allow_nan=True, allow_infinity=True)
USUAL = st.floats(-20, 20, width=32)


def values(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (rows, columns), elements=USUAL | WIDE)


def gru(of_x: torch.Tensor, of_h: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """torch.nn.GRU's formula, after its products."""
    x, products = of_x.chunk(3, -1), of_h.chunk(3, -1)
    reset, update = torch.sigmoid(x[0] + products[0]), torch.sigmoid(x[1] + products[1])
    new = torch.tanh(x[2] + reset * products[2])
    return new + update * (h - new)


def as_numpy(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [(each if each.dtype == torch.float32 else each.view(torch.uint16)).numpy() for each in tensors]


def tanh(step: Callable[..., None], x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    step(*as_numpy(y))
    return y


def expect(found: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    rtol = 0.0 if found.dtype == torch.float32 else 2.0**-8  # bf16's last bit
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


@given(x=values(2, 2 * HIDDEN))
@pytest.mark.parametrize(
    ("step", "dtype"), [(cell_math.tanh_fp32, torch.float32), (cell_math.tanh_bf16, torch.bfloat16)]
)
def test_tanh_is_that_of_torch(step: Callable[..., None], dtype: torch.dtype, x: np.ndarray) -> None:
    given = torch.from_numpy(x).to(dtype)
    expect(tanh(step, given), given.double().tanh(), 5e-7)


@given(of_x=values(2, 3 * HIDDEN), of_h=arrays(np.float32, (2, 3 * HIDDEN), elements=USUAL), h=values(2, HIDDEN))
@pytest.mark.parametrize(("step", "dtype"), [(cell_math.gru_fp32, torch.float32), (cell_math.gru_bf16, torch.bfloat16)])
def test_a_gru_is_that_of_torch(
    step: Callable[..., None], dtype: torch.dtype, of_x: np.ndarray, of_h: np.ndarray, h: np.ndarray
) -> None:
    given = [torch.from_numpy(each).to(dtype) for each in (of_x, of_h, np.clip(h, -1, 1))]
    y = torch.empty_like(given[-1])
    step(*as_numpy(*given, y))
    expect(y, gru(*(each.double() for each in given)), 2e-6)


def test_bf16_is_rounded_to_the_nearest_and_of_two_to_the_even_one() -> None:
    x = torch.linspace(-4, 4, 4000).bfloat16()[None]
    exact = tanh(cell_math.tanh_fp32, x.float())
    assert torch.equal(tanh(cell_math.tanh_bf16, x), exact.bfloat16())
