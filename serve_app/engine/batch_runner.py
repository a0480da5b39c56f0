"""Batches of a stateless model: rows of several lengths are padded to the longest, run together, and cut again."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

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
        self._outputs = dict(model.outputs)
        self._max_length: int = getattr(model, "max_length", 0)

    def rows(self, inputs: Mapping[str, np.ndarray], count: int) -> list[Row]:
        """The rows of a request's inputs, [count, ...] each. Raises InvalidInput, InferenceFailed."""
        return [self._row({name: x[i, ...] for name, x in inputs.items()}) for i in range(count)]

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

    def warm_up(self, sizes: Sequence[int]) -> None:
        """Run zeros once in each batch size, short and as long as can be. Raises what the model fails with."""
        for size in sizes:
            for length in sorted({1, self._max_length or 1}):
                inputs = {
                    name: np.zeros([length if n == ANY else n for n in spec.shape], spec.dtype)
                    for name, spec in self._prepared.items()
                }
                with inference_mode():
                    self._run([Row(inputs, length)] * size)

    def _row(self, inputs: Mapping[str, np.ndarray]) -> Row:
        if self._prepare is not None:
            try:
                inputs = self._prepare(inputs)
            except LockstepError:
                raise
            except Exception as error:
                logger.warning("the model's prepare failed", exc_info=True)
                raise InferenceFailed(f"the model cannot prepare this request: {error!r:.500}") from error
        lengths = [
            have
            for name, spec in self._prepared.items()
            for size, have in zip(spec.shape, inputs[name].shape, strict=True)
            if size == ANY
        ]
        length = max(lengths, default=1)
        if 0 < self._max_length < length:
            raise InvalidInput(f"an input of length {length} arrived, the model takes 1 to {self._max_length}: cut it")
        return Row(inputs, length)

    def _run(self, rows: Sequence[Row]) -> list[Outputs]:
        longest = max(row.length for row in rows)
        inputs = {name: self._padded(name, spec, rows, longest) for name, spec in self._prepared.items()}
        y = self._model.forward(inputs)
        values = {next(iter(self._outputs)): y} if isinstance(y, torch.Tensor) else y
        whole = {
            name: TensorSpec(tuple(longest if n == ANY else n for n in spec.shape), spec.dtype)
            for name, spec in self._outputs.items()
        }
        cast = {name: values[name].to(getattr(torch, spec.dtype)) for name, spec in whole.items()}
        arrays = [value.cpu().numpy() for value in check_outputs(cast, whole, (len(rows),))]
        return [
            {
                name: array[i][tuple(slice(row.length) if n == ANY else slice(None) for n in spec.shape)]
                for (name, spec), array in zip(self._outputs.items(), arrays, strict=True)
            }
            for i, row in enumerate(rows)
        ]

    def _padded(self, name: str, spec: TensorSpec, rows: Sequence[Row], longest: int) -> torch.Tensor:
        """One input of all rows, [B, *shape], on the device."""
        shape = [longest if n == ANY else n for n in spec.shape]
        x = np.zeros((len(rows), *shape), spec.dtype)
        for i, row in enumerate(rows):
            value = row.inputs[name]
            x[i, ...][tuple(map(slice, value.shape))] = value
        tensor = torch.from_numpy(x).to(self._device, non_blocking=True)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor
