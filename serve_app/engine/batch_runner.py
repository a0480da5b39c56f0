"""Batches of a stateless model: rows of several lengths are padded or packed, run together, and cut again."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from serve_app.engine.batch_graphs import DEPTH, BatchGraph, BatchGraphs
from serve_app.engine.packing import Packing, pack
from serve_app.engine.runner import check_outputs, inference_mode
from serve_app.errors import ConfigError, InferenceFailed, InvalidInput, LockstepError, Unavailable
from serve_app.models.stateless import Packed, StatelessModel
from serve_app.rows import ANY
from serve_app.spec import TensorSpec

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """What `forward` takes of one row, and its length."""

    inputs: Mapping[str, np.ndarray]
    length: int


Outputs = dict[str, np.ndarray]
"""Of one row."""
ROW, POSITION = "packed row", "packed position"
"""Inputs beside the model's own where rows are packed."""
LIGHT = 2 << 20
"""Bytes of a batch that are copied as quickly as another thread would have it begun."""


class BatchRunner:
    """Runs a model on a device, from any thread. Weights and floating-point inputs have the dtype.

    pack_rows: so many rows of a batch at most are packed, one behind the other, if the model takes that; 0: none are.
    """

    def __init__(self, model: StatelessModel, device: torch.device, dtype: torch.dtype, *, pack_rows: int = 0) -> None:
        if isinstance(model, torch.nn.Module):
            model.to(device, dtype).eval().requires_grad_(False)
        self._model = model
        self._device = device
        self._dtype = dtype
        self._prepare = getattr(model, "prepare", None)
        if self._prepare is None and (optional := tuple(getattr(model, "optional", ()))):
            raise ConfigError(
                f"the model's input {optional[0]!r} is optional, but it has no `prepare` to fill it in: add that, or "
                "leave out `optional`"
            )
        self._prepared: Mapping[str, TensorSpec] = dict(getattr(model, "prepared", model.inputs))
        self._pack_rows = pack_rows if getattr(model, "packs", False) else 0
        self._any_length = [
            (name, axis) for name, spec in self._prepared.items() for axis, n in enumerate(spec.shape) if n == ANY
        ]
        self._outputs = dict(model.outputs)
        self._max_length: int = getattr(model, "max_length", 0)
        if self._pack_rows:
            _check_packs(self._max_length, self._prepared, self._outputs)
            self._prepared |= dict.fromkeys((ROW, POSITION), TensorSpec((ANY,), "int64"))
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
        if self._pack_rows:
            return 1  # the others of its batch may have any length
        return length if self._graphs is None else self._graphs.padded_length(length)

    def start(self, rows: Sequence[Row]) -> "Started":
        """Begin with a batch. On a GPU that is quick, and beside the caller's own work; else all is done in `wait`."""
        return self._replay(rows, LIGHT) or Later(self, rows)

    def run(self, rows: Sequence[Row]) -> list[Outputs | LockstepError]:
        """Outputs of each row. Where a batch fails its halves are run, so that only the rows at fault fail.

        Raises Unavailable when the device cannot be used any more.
        """
        if replay := self._replay(rows):
            replay.wait()
            return replay.results()
        try:
            with inference_mode():
                return [*self._run(rows)]
        except torch.AcceleratorError as error:
            raise _unavailable(error) from error
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
        if self._pack_rows:
            lengths = [self._max_length]
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
        length = 1
        for name, axis in self._any_length:
            length = max(length, inputs[name].shape[axis])
        if 0 < self._max_length < length:
            raise InvalidInput(f"an input of length {length} arrived, the model takes 1 to {self._max_length}: cut it")
        return Row(inputs, length)

    def _layout(self, rows: Sequence[Row]) -> tuple[Packing | None, int, int]:
        """How the rows are packed, and the size and length of their batch."""
        if not self._pack_rows:
            return None, len(rows), max(row.length for row in rows)
        packing = pack([row.length for row in rows], self._max_length)
        return packing, packing.bins, self._max_length

    def _replay(self, rows: Sequence[Row], max_bytes: float = math.inf) -> "Replay | None":
        """The next larger CUDA graph, launched; None where there is none of so many bytes at most."""
        if self._graphs is None:
            return None
        packing, size, length = self._layout(rows)
        graph = self._graphs.take(size, length)
        if graph is None:
            return None
        try:
            if graph.nbytes <= max_bytes:
                _fill(graph.inputs, rows, packing)
                graph.launch()
                return Replay(self._graphs, graph, self._outputs, rows, packing)
        except Exception:  # of a row, or the device: without the graph it is found out which
            logger.debug("a batch does not start", exc_info=True)
        self._graphs.give_back(graph)
        return None

    def _run(self, rows: Sequence[Row]) -> list[Outputs]:
        packing, size, length = self._layout(rows)
        inputs = {name: np.empty((size, *_sized(x.shape, length)), x.dtype) for name, x in self._prepared.items()}
        _fill(inputs, rows, packing)
        on_device = {name: torch.from_numpy(x).to(self._device, non_blocking=True) for name, x in inputs.items()}
        arrays = [y.cpu().numpy() for y in self._compute(on_device)]
        return _cut_all(arrays, self._outputs, rows, packing)

    def _compute(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Inputs on the device, [B, *shape] each -> the outputs, in the order in which the model declares them."""
        forward: Any = self._model.forward
        size, length = next(iter(inputs.values())).shape[0], 1
        for name, axis in self._any_length:
            length = max(length, inputs[name].shape[1 + axis])
        cast = {
            name: x.to(self._dtype) if x.is_floating_point() else x
            for name, x in inputs.items()
            if name not in (ROW, POSITION)
        }
        whole = size  # rows of outputs without a dimension of any length
        if self._pack_rows:
            whole = self._pack_rows
            y = forward(cast, Packed(inputs[ROW], inputs[POSITION], whole))
        else:
            y = forward(cast)
        values = {next(iter(self._outputs)): y} if isinstance(y, torch.Tensor) else y
        checked = []
        for name, spec in self._outputs.items():
            due = TensorSpec(_sized(spec.shape, length), spec.dtype)
            value = values[name].to(getattr(torch, spec.dtype))
            checked += check_outputs({name: value}, {name: due}, (size if ANY in spec.shape else whole,))
        return checked


class Started(Protocol):
    """A batch that has begun."""

    def wait(self) -> None:
        """Until it has run, on any thread. Raises what `results` is not to be asked for then."""
        ...

    def results(self) -> list[Outputs | LockstepError]:
        """Of each row, after `wait`."""
        ...


class Later:
    """See Started: all is done in `wait`."""

    def __init__(self, runner: BatchRunner, rows: Sequence[Row]) -> None:
        self._runner, self._rows = runner, rows
        self._found: list[Outputs | LockstepError] = []

    def wait(self) -> None:
        """See Started."""
        self._found = self._runner.run(self._rows)

    def results(self) -> list[Outputs | LockstepError]:
        """See Started."""
        return self._found


class Replay:
    """See Started: a CUDA graph runs."""

    def __init__(
        self,
        graphs: BatchGraphs,
        graph: BatchGraph,
        outputs: Mapping[str, TensorSpec],
        rows: Sequence[Row],
        packing: Packing | None,
    ) -> None:
        self._graphs, self._graph = graphs, graph
        self._outputs, self._rows, self._packing = outputs, rows, packing

    def wait(self) -> None:
        """See Started. Raises Unavailable."""
        try:
            self._graph.wait()
        except torch.AcceleratorError as error:
            raise _unavailable(error) from error

    def results(self) -> list[Outputs | LockstepError]:
        """See Started."""
        arrays = self._graph.outputs(len(self._rows))
        self._graphs.give_back(self._graph)
        return [*_cut_all(arrays, self._outputs, self._rows, self._packing)]


def _check_packs(max_length: int, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]) -> None:
    """Raise ConfigError unless rows of that model can lie one behind the other."""
    wrong = [name for name, spec in inputs.items() if spec.shape[:1] != (ANY,) or ANY in spec.shape[1:]]
    wrong += [name for name, spec in outputs.items() if ANY in spec.shape[1:]]
    if wrong or max_length < 1:
        what = f"the shape of {wrong[0]!r} is no length and what each token has" if wrong else "it has no max_length"
        raise ConfigError(f"the model packs its rows, but {what}: leave out `packs`, or set batching.pack to false")


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"the device does not work any more: {error}")


def _sized(shape: Sequence[int], length: int) -> tuple[int, ...]:
    """A shape with a length for dimensions of any length."""
    return tuple(length if n == ANY else n for n in shape)


def _fill(inputs: Mapping[str, np.ndarray], rows: Sequence[Row], packing: Packing | None) -> None:
    """Write the rows into inputs [B, *shape], zeros behind the shorter ones; or where they are packed."""
    if packing is not None:
        for name, x in inputs.items():
            x.fill(-1 if name == ROW else 0)
            own = {ROW: packing.row, POSITION: packing.position}.get(name)
            x.reshape(-1, *x.shape[2:])[packing.places] = (
                np.concatenate([row.inputs[name] for row in rows]) if own is None else own
            )
        return
    for name, x in inputs.items():
        values = [row.inputs[name] for row in rows]
        if all(value.shape == x.shape[1:] for value in values):
            x[: len(rows)] = values
        else:
            x[: len(rows)] = 0
            for i, value in enumerate(values):
                x[i, ...][tuple(map(slice, value.shape))] = value
        x[len(rows) :] = x[0]  # whatever a model makes of it, it can make of rows like that


def _cut_all(
    arrays: Sequence[np.ndarray], specs: Mapping[str, TensorSpec], rows: Sequence[Row], packing: Packing | None
) -> list[Outputs]:
    """The outputs of each row."""
    outputs: list[Outputs] = [{} for _ in rows]
    for (name, spec), array in zip(specs.items(), arrays, strict=True):
        for values, output in zip(_cut(array, spec, rows, packing), outputs, strict=True):
            output[name] = values
    return outputs


def _cut(array: np.ndarray, spec: TensorSpec, rows: Sequence[Row], packing: Packing | None) -> Iterable[np.ndarray]:
    """What each row has of an output."""
    if ANY not in spec.shape:
        return array[: len(rows)]
    if packing is not None:
        flat = array.reshape(-1, *array.shape[2:])
        return [flat[start : start + row.length] for start, row in zip(packing.starts, rows, strict=True)]
    cuts = [tuple(slice(row.length) if n == ANY else slice(None) for n in spec.shape) for row in rows]
    return [values[cut] for values, cut in zip(array, cuts, strict=False)]
