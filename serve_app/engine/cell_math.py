"""What recurrent cells do after their products, in one pass over the numbers and in fp32.

torch makes a dozen calls of a GRU's, and its tanh takes several times as long. tanh(a) is 2 / (1 + exp(-2a)) - 1 here,
and exp that of Cephes (expf: argument reduced by ln 2 in two parts, polynomial of degree 7) without branches, so that
it is compiled to vector instructions. Results are off by 5e-7 at most.
"""

import numba
import numpy as np

from serve_app.compiled import compiled

_ONE, _TWO = np.float32(1), np.float32(2)
_SMALLEST, _LARGEST = np.float32(-87), np.float32(88)  # of which exp is a normal number
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
_SHIFT = np.float32(12582912)  # 1.5 * 2^23: what is added to it is rounded to a whole number, in its lowest bits
_P7, _P6, _P5 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P4, _P3, _P2 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_QUIET_NAN = np.uint32(0x7FC00000)
_ROUND, _MASK = np.uint32(0x7FFF), np.uint32(1)
_16, _23 = np.uint32(16), np.int32(23)


@numba.njit(inline="always")
def _exp(x: np.float32) -> np.float32:
    x = _SMALLEST if x < _SMALLEST else (_LARGEST if x > _LARGEST else x)  # NaN stays
    shifted = x * _LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((((_P7 * r + _P6) * r + _P5) * r + _P4) * r + _P3) * r + _P2) * r) * r + r + _ONE
    bits = np.float32(p).view(np.int32) + (np.float32(shifted).view(np.int32) << _23)  # times 2^n
    return np.int32(bits).view(np.float32) if x == x else x


@numba.njit(inline="always")
def _sigmoid(x: np.float32) -> np.float32:
    return _ONE / (_ONE + _exp(-x))


@numba.njit(inline="always")
def _tanh(x: np.float32) -> np.float32:
    return _TWO * _sigmoid(_TWO * x) - _ONE


@numba.njit(inline="always")
def _next(
    x: tuple[np.float32, np.float32, np.float32], h: tuple[np.float32, np.float32, np.float32], state: np.float32
) -> np.float32:
    """Of the products with the input and with the state, for reset, update and new."""
    reset, update = _sigmoid(x[0] + h[0]), _sigmoid(x[1] + h[1])
    new = _tanh(x[2] + reset * h[2])
    return new + update * (state - new)


@numba.njit(inline="always")
def _wide(value: np.uint16) -> np.float32:
    return np.uint32(np.uint32(value) << _16).view(np.float32)


@numba.njit(inline="always")
def _narrow(value: np.float32) -> np.uint16:
    """Rounded to the nearest, of two to the even one."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + _ROUND + ((bits >> _16) & _MASK))
    return np.uint16((rounded if value == value else _QUIET_NAN) >> _16)


@compiled
def gru_fp32(of_x: np.ndarray, of_h: np.ndarray, h: np.ndarray, y: np.ndarray) -> None:
    """A GRU's step as torch.nn.GRU has it: h -> y [B, hidden].

    of_x, of_h: products with the input and with the state, for reset, update and new, with biases: [B, 3 * hidden].
    """
    hidden = h.shape[1]
    for b in range(len(h)):
        x_b, h_b, before, after = of_x[b], of_h[b], h[b], y[b]
        for j in range(hidden):
            x = x_b[j], x_b[hidden + j], x_b[2 * hidden + j]
            after[j] = _next(x, (h_b[j], h_b[hidden + j], h_b[2 * hidden + j]), before[j])


@compiled
def gru_bf16(of_x: np.ndarray, of_h: np.ndarray, h: np.ndarray, y: np.ndarray) -> None:
    """The same of bf16, as uint16."""
    hidden = h.shape[1]
    for b in range(len(h)):
        x_b, h_b, before, after = of_x[b], of_h[b], h[b], y[b]
        for j in range(hidden):
            x = _wide(x_b[j]), _wide(x_b[hidden + j]), _wide(x_b[2 * hidden + j])
            products = _wide(h_b[j]), _wide(h_b[hidden + j]), _wide(h_b[2 * hidden + j])
            after[j] = _narrow(_next(x, products, _wide(before[j])))


@compiled
def tanh_fp32(y: np.ndarray) -> None:
    """tanh(y) -> y [B, hidden]"""
    for b in range(len(y)):
        y_b = y[b]
        for j in range(len(y_b)):
            y_b[j] = _tanh(y_b[j])


@compiled
def tanh_bf16(y: np.ndarray) -> None:
    """The same of bf16, as uint16."""
    for b in range(len(y)):
        y_b = y[b]
        for j in range(len(y_b)):
            y_b[j] = _narrow(_tanh(_wide(y_b[j])))
