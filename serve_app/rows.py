"""What a stateless model takes and gives, and a request to it: the part that every process may know."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from serve_app.errors import InvalidInput
from serve_app.segment import Timing
from serve_app.spec import TensorSpec

ANY = -1
"""A dimension of any length: the same in all inputs of a row, and in all of its outputs that have one."""


@dataclass(frozen=True, slots=True)
class BatchedSpec:
    """A served stateless model, as its clients see it. Shapes are of one row; a request brings [rows, *shape].

    `optional`: inputs that may be left out. `max_length`: of dimensions of any length (0: no limit). Elements of dtype
    object are bytes.
    """

    name: str
    inputs: Mapping[str, TensorSpec] = field(hash=False)
    outputs: Mapping[str, TensorSpec] = field(hash=False)
    optional: tuple[str, ...] = ()
    max_length: int = 0
    max_batch_size: int = 1
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_s: float = 0.0
    num_priorities: int = 1
    default_priority: int = 1


@dataclass(frozen=True, slots=True)
class RowsRequest:
    """Rows for a stateless model: inputs by name, each [rows, *shape].

    `priority`: from 1, the highest (None: the default). `timeout_s`: how long it may wait for its batch (0: as the
    configuration says).
    """

    inputs: Mapping[str, np.ndarray]
    priority: int | None = None
    timeout_s: float = 0.0


class RowsResult(NamedTuple):
    """The outputs of a request, each [rows, *shape], and where its time went.

    queued_us: when it began to wait, on the machine's monotonic clock.
    """

    values: dict[str, np.ndarray]
    timing: Timing
    queued_us: int = 0


Look = tuple[str, str | np.dtype[Any], tuple[int, ...]]
"""An input's name, dtype and shape; what is no array has a type instead of a dtype."""


def check_rows(request: RowsRequest, spec: BatchedSpec) -> int:
    """How many rows it has. Raises InvalidInput unless the request is one that the model takes, values aside."""
    if request.priority is not None and not 1 <= request.priority <= spec.num_priorities:
        raise InvalidInput(f"priority is {request.priority}, model '{spec.name}' has 1 to {spec.num_priorities}")
    if not request.timeout_s >= 0:
        raise InvalidInput(f"the timeout is {request.timeout_s} s, expected 0 or more")
    inputs: Mapping[str, Any] = request.inputs
    looks = [
        (name, x.dtype, x.shape) if isinstance(x, np.ndarray) else (name, type(x).__name__, ())
        for name, x in inputs.items()
    ]
    return _check_looks(spec, tuple(looks))


@lru_cache(maxsize=1024)
def _check_looks(spec: BatchedSpec, looks: tuple[Look, ...]) -> int:
    """See `check_rows`. What many requests look like is looked at once."""
    inputs = {name: (kind, shape) for name, kind, shape in looks}
    for name in inputs:
        if name not in spec.inputs:
            raise InvalidInput(
                f"unexpected inference input '{name}' for model '{spec.name}', it takes {', '.join(spec.inputs)}"
            )
    seen: dict[str, tuple[str, int]] = {}  # of which input, how much

    def same(what: str, size: int, name: str) -> None:
        other, first = seen.setdefault(what, (name, size))
        if size != first:
            raise InvalidInput(
                f"input '{name}' has {what}={size}, input '{other}' has {what}={first}: send the same of all"
            )

    for name, tensor in spec.inputs.items():
        if name in inputs:
            kind, shape = inputs[name]
            _check_input(name, kind, shape, tensor, spec)
            same("rows", shape[0], name)
            for size, have in zip(tensor.shape, shape[1:], strict=True):
                if size == ANY:
                    same("length", have, name)
        elif name not in spec.optional:
            raise InvalidInput(f"input '{name}' is missing for model '{spec.name}', it takes {', '.join(spec.inputs)}")
    rows, length = (seen.get(what, ("", least))[1] for what, least in (("rows", 0), ("length", 1)))
    if not 1 <= rows <= spec.max_batch_size:
        raise InvalidInput(
            f"a request of {rows} rows arrived, model '{spec.name}' takes 1 to {spec.max_batch_size}: send them in "
            "parts, or raise batching.max_batch_size"
        )
    if length < 1 or 0 < spec.max_length < length:
        limit = spec.max_length or "any number"
        raise InvalidInput(f"rows of length {length} arrived, model '{spec.name}' takes 1 to {limit}: cut them")
    return rows


def _check_input(
    name: str, kind: str | np.dtype[Any], shape: tuple[int, ...], tensor: TensorSpec, spec: BatchedSpec
) -> None:
    if isinstance(kind, str) or kind != tensor.dtype:
        raise InvalidInput(
            f"input '{name}' of {kind} arrived, model '{spec.name}' takes arrays of {tensor.dtype}: convert it first"
        )
    due = (ANY, *tensor.shape)
    if len(shape) != len(due) or any(size not in (ANY, have) for size, have in zip(due, shape, strict=True)):
        expected, got = ",".join(map(str, due)), ",".join(map(str, shape))
        raise InvalidInput(
            f"unexpected shape for input '{name}' for model '{spec.name}'. Expected [{expected}], got [{got}]"
        )
