"""Weights in FP8 (e4m3, 3 bits of mantissa), each row scaled by a power of two: to round them twice changes nothing."""

import torch

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
MAX_SCALE = 2.0**64
"""Of rows so small that it makes no difference."""


def scales(rows: torch.Tensor) -> torch.Tensor:
    """Of rows [..., n] the factors [..., 1] that bring the largest of each near the largest of e4m3."""
    largest = rows.float().abs().amax(-1, keepdim=True)
    return (LARGEST / largest).log2().floor().exp2().clamp(max=MAX_SCALE)


def round_to_fp8(rows: torch.Tensor) -> torch.Tensor:
    """The rows [..., n], in their own dtype, with nothing that e4m3 cannot hold."""
    scale = scales(rows)
    return ((rows.float() * scale).to(DTYPE).float() / scale).to(rows.dtype)
