"""Batches of a stateless model: rows of several lengths are padded to the longest, run together, and cut again."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from serve_app.engine.batch_graphs import DEPTH, BatchGraphs
from serve_app.engine.runner import check_outputs, inference_mode
from serve_app.errors import InferenceFailed, InvalidInput, LockstepError, Unavailable
from serve_app.models.stateless import StatelessModel
from serve_app.rows import ANY
from serve_app.spec import TensorSpec

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """What `forward` takes of one row, and its length."""

    inputs: Mapping[str, np.ndarray]
    length: int


Outputs = dict[str, np.ndarray]
"""Of one row."""


class BatchRunner:
    """Runs a model on a device, from any thread. Weights and floating-point inputs have the dtype."""

    def __init__(self, model: StatelessModel, device: torch.device, dtype: torch.dtype) -> None:
        if isinstance(model, torch.nn.Module):
            model.to(device, dtype).eval().requires_grad_(False)
        self._model = model
        self._device = device
        self._dtype = dtype
        self._prepare = getattr(model, "prepare", None)
        self._prepared: Mapping[str, TensorSpec] = dict(getattr(model, "prepared", model.inputs))
        self._any_length = [
            (name, axis) for name, spec in self._prepared.items() for axis, n in enumerate(spec.shape) if n == ANY
        ]
        self._outputs = dict(model.outputs)
        self._max_length: int = getattr(model, "max_length", 0)
        self._graphs: BatchGraphs | None = None

    def rows(self, inputs: Mapping[str, np.ndarray], count: int) -> list[Row]:
        """The rows of a request's inputs, [count, ...] each. Raises InvalidInput, InferenceFailed."""
        return [self._row({name: x[i, ...] for name, x in inputs.items()}) for i in range(count)]

    @property
    def depth(self) -> int:
        """Batches that an instance of the model may have on their way."""
        return 1 if self._graphs is None else DEPTH

    def padded_length(self, length: int) -> int:
        """What a row of that length costs as much as, by itself."""
        return length if self._graphs is None else self._graphs.padded_length(length)

    def run(self, rows: Sequence[Row]) -> list[Outputs | LockstepError]:
        """Outputs of each row. Where a batch fails its halves are run, so that only the rows at fault fail.

        Raises Unavailable when the device cannot be used any more.
        """
        try:
            with inference_mode():
                return [*self._run(rows)]
        except torch.AcceleratorError as error:
            raise Unavailable(f"the device does not work any more: {error}") from error
        except Exception as error:
            if len(rows) == 1:
                logger.warning("the model failed on a row", exc_info=True)
                return [InferenceFailed(f"the model failed on this request: {error!r:.500}")]
        half = len(rows) // 2
        return self.run(rows[:half]) + self.run(rows[half:])

    def warm_up(self, sizes: Sequence[int], lengths: Sequence[int] = (), instances: int = 1) -> None:
        """Make ready for batches of up to the last of `sizes` rows (rising). Raises what the model fails with.

        Zeros are run in each size, short and as long as can be. On a GPU only in the largest; there are CUDA graphs for
        these sizes and `lengths` (none: a quarter, half, three quarters and all of the model's max_length), of each
        instance.
        """
        on_gpu = self._device.type == "cuda"
        with inference_mode():
            for size in sizes[-1:] if on_gpu else sizes:
                for length in sorted({1, self._max_length or 1}):
                    inputs = {
                        name: np.zeros(_sized(spec.shape, length), spec.dtype) for name, spec in self._prepared.items()
                    }
                    self._run([Row(inputs, length)] * size)
            if on_gpu:
                lengths = lengths or self._graph_lengths()
                self._graphs = BatchGraphs(self._compute, self._prepared, sizes, lengths, instances, self._device)

    def _graph_lengths(self) -> list[int]:
        if any(ANY in spec.shape for spec in self._prepared.values()):
            return sorted({-(-self._max_length * part // 4) for part in range(1, 5)} - {0})
        return [1]

    def _row(self, inputs: Mapping[str, np.ndarray]) -> Row:
        if self._prepare is not None:
            try:
                inputs = self._prepare(inputs)
            except LockstepError:
                raise
            except Exception as error:
                logger.warning("the model's prepare failed", exc_info=True)
                raise InferenceFailed(f"the model cannot prepare this request: {error!r:.500}") from error
        length = max([inputs[name].shape[axis] for name, axis in self._any_length], default=1)
        if 0 < self._max_length < length:
            raise InvalidInput(f"an input of length {length} arrived, the model takes 1 to {self._max_length}: cut it")
        return Row(inputs, length)

    def _run(self, rows: Sequence[Row]) -> list[Outputs]:
        arrays = self._replayed(rows)
        if arrays is None:
            longest = max(row.length for row in rows)
            inputs = {}
            for name, spec in self._prepared.items():
                x = np.empty((len(rows), *_sized(spec.shape, longest)), spec.dtype)
                _fill(x, name, rows)
                inputs[name] = torch.from_numpy(x).to(self._device, non_blocking=True)
            arrays = [y.cpu().numpy() for y in self._compute(inputs)]
        outputs: list[Outputs] = [{} for _ in rows]
        for (name, spec), array in zip(self._outputs.items(), arrays, strict=True):
            longest = max((have for n, have in zip(spec.shape, array.shape[1:], strict=True) if n == ANY), default=0)
            for row, values, output in zip(rows, array, outputs, strict=True):
                if longest in (0, row.length):
                    output[name] = values
                else:
                    output[name] = values[tuple(slice(row.length) if n == ANY else slice(None) for n in spec.shape)]
        return outputs

    def _replayed(self, rows: Sequence[Row]) -> list[np.ndarray] | None:
        """Outputs by the next larger CUDA graph, None where there is none."""
        if self._graphs is None:
            return None
        with self._graphs.taken(len(rows), max(row.length for row in rows)) as graph:
            if graph is None:
                return None
            for name, x in graph.inputs.items():
                _fill(x, name, rows)
                x[len(rows) :] = x[0]  # whatever a model makes of it, it can make of rows like that
            return graph.run(len(rows))

    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Inputs on the device, [B, *shape] each -> the outputs, in the order in which the model declares them."""
        cast = {name: x.to(self._dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        y = self._model.forward(cast)
        values = {next(iter(self._outputs)): y} if isinstance(y, torch.Tensor) else y
        size = len(next(iter(inputs.values())))
        longest = max(
            (
                have
                for name, spec in self._prepared.items()
                for n, have in zip(spec.shape, inputs[name].shape[1:], strict=True)
                if n == ANY
            ),
            default=1,
        )
        whole = {name: TensorSpec(_sized(spec.shape, longest), spec.dtype) for name, spec in self._outputs.items()}
        return check_outputs(
            {name: values[name].to(getattr(torch, spec.dtype)) for name, spec in whole.items()}, whole, (size,)
        )


def _sized(shape: Sequence[int], length: int) -> tuple[int, ...]:
    """A shape with a length for dimensions of any length."""
    return tuple(length if n == ANY else n for n in shape)


def _fill(x: np.ndarray, name: str, rows: Sequence[Row]) -> None:
    """Write one input of all rows into x [B, *shape], zeros behind the shorter ones."""
    values = [row.inputs[name] for row in rows]
    if all(value.shape == x.shape[1:] for value in values):
        x[: len(rows)] = values
        return
    x[: len(rows)] = 0
    for i, value in enumerate(values):
        x[i, ...][tuple(map(slice, value.shape))] = value
