"""What a model takes and gives, in plain values: the part of a model that every process may know."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from serve_app.errors import InvalidInput

ONLY_VERSION = "1"
"""What clients are told of a model that is configured without versions."""


def split_name(name: str) -> tuple[str, str]:
    """Model and version of what a model is served as: ("vad", "2") of "vad@2", ("vad", "1") of "vad"."""
    model, _, version = name.partition("@")
    return model, version or ONLY_VERSION


def newest_first(model: str, names: Iterable[str]) -> list[str]:
    """Those of these names that are versions of a model, which itself is none of them."""
    found = {int(version): name for name in names for of, at, version in [name.partition("@")] if at and of == model}
    return [found[version] for version in sorted(found, reverse=True)]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One timestep of an input or output: its shape, without time and batch, and its numpy dtype's name."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of one timestep."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A served model, as its clients see it.

    `name`: with its version, where it has several (see `split_name`). `sample_rate` (Hz) is set where a timestep is a
    run of audio samples; clients then take any number of samples and cut them into timesteps themselves. `input_name`
    is what protocols call the input that name their tensors.
    `fingerprint`: states are of this model, with these weights, and of no other.
    """

    name: str
    input: TensorSpec
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    state_bytes: int = 0
    sample_rate: int | None = None
    input_name: str = "x"
    fingerprint: str = ""

    @property
    def output_bytes(self) -> int:
        """Bytes of all outputs of one timestep."""
        return sum(spec.nbytes for spec in self.outputs.values())


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What a sender must keep to, so that nothing is refused later.

    `max_segment`: timesteps of one segment; `max_window`: timesteps submitted and not read yet.
    """

    max_segment: int = 1024
    max_window: int = 4096
    refuse_nan: bool = True


def check_segment(x: np.ndarray, spec: TensorSpec, limits: SessionLimits) -> None:
    """Raise InvalidInput unless x is a segment [T, *spec.shape] of spec.dtype within the limits."""
    if x.dtype != spec.dtype:
        raise InvalidInput(f"a segment of {x.dtype} arrived, the model takes {spec.dtype}: convert it first")
    if x.ndim == 0 or x.shape[1:] != spec.shape:
        expected = ", ".join(["T", *map(str, spec.shape)])
        raise InvalidInput(f"a segment of shape {list(x.shape)} arrived, the model takes [{expected}]")
    if len(x) == 0:
        raise InvalidInput("an empty segment arrived: send 1 timestep or more")
    if len(x) > limits.max_segment:
        raise InvalidInput(
            f"a segment of {len(x)} timesteps arrived, the limit is {limits.max_segment}: send it in parts, "
            "or raise session.max_segment_timesteps"
        )
    if limits.refuse_nan and not finite(x):
        raise InvalidInput("the segment holds NaN or infinity: clean it, or set session.nan=pass")


def finite(x: np.ndarray) -> bool:
    """Whether all values are finite; integers always are."""
    return x.dtype.kind != "f" or np.count_nonzero(np.isfinite(x)) == x.size  # all() takes three times as long
