"""What a stateless model takes and gives, and a request to it: the part that every process may know."""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
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


@dataclass(slots=True)
class Checked:
    """What a check has found: the number of rows, and their length where a dimension is of any length (else 1)."""

    rows: int = 0
    length: int = 1
    _seen: dict[str, str] = field(default_factory=dict)

    def same(self, what: str, size: int, name: str) -> None:
        """Note a size of an input; raises InvalidInput unless the inputs before have the same."""
        if what in self._seen and getattr(self, what) != size:
            raise InvalidInput(
                f"input '{name}' has {what}={size}, input '{self._seen[what]}' has {what}={getattr(self, what)}: send "
                "the same of all"
            )
        self._seen[what] = name
        setattr(self, what, size)


def check_rows(request: RowsRequest, spec: BatchedSpec) -> Checked:
    """Raise InvalidInput unless the request is one that the model takes, values aside."""
    for name in request.inputs:
        if name not in spec.inputs:
            raise InvalidInput(
                f"unexpected inference input '{name}' for model '{spec.name}', it takes {', '.join(spec.inputs)}"
            )
    found = Checked()
    for name, tensor in spec.inputs.items():
        if name in request.inputs:
            _check_input(name, request.inputs[name], tensor, spec, found)
        elif name not in spec.optional:
            raise InvalidInput(f"input '{name}' is missing for model '{spec.name}', it takes {', '.join(spec.inputs)}")
    if not 1 <= found.rows <= spec.max_batch_size:
        raise InvalidInput(
            f"a request of {found.rows} rows arrived, model '{spec.name}' takes 1 to {spec.max_batch_size}: send them "
            "in parts, or raise batching.max_batch_size"
        )
    if found.length < 1 or 0 < spec.max_length < found.length:
        limit = spec.max_length or "any number"
        raise InvalidInput(f"rows of length {found.length} arrived, model '{spec.name}' takes 1 to {limit}: cut them")
    if request.priority is not None and not 1 <= request.priority <= spec.num_priorities:
        raise InvalidInput(f"priority is {request.priority}, model '{spec.name}' has 1 to {spec.num_priorities}")
    if not request.timeout_s >= 0:
        raise InvalidInput(f"the timeout is {request.timeout_s} s, expected 0 or more")
    return found


def _check_input(name: str, x: Any, tensor: TensorSpec, spec: BatchedSpec, found: Checked) -> None:
    if not isinstance(x, np.ndarray) or x.dtype != tensor.dtype:
        kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise InvalidInput(
            f"input '{name}' of {kind} arrived, model '{spec.name}' takes arrays of {tensor.dtype}: convert it first"
        )
    due = (ANY, *tensor.shape)
    if x.ndim != len(due) or any(size not in (ANY, have) for size, have in zip(due, x.shape, strict=True)):
        expected, got = ",".join(map(str, due)), ",".join(map(str, x.shape))
        raise InvalidInput(
            f"unexpected shape for input '{name}' for model '{spec.name}'. Expected [{expected}], got [{got}]"
        )
    found.same("rows", len(x), name)
    for size, have in zip(tensor.shape, x.shape[1:], strict=True):
        if size == ANY:
            found.same("length", have, name)
