"""Batches of a stateless model on a GPU: CUDA graphs for a few sizes, between which batches are padded."""

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch

from serve_app.engine.cuda_runner import capture
from serve_app.rows import ANY
from serve_app.spec import TensorSpec

logger = logging.getLogger(__name__)

DEPTH = 2
"""Batches of an instance that are on their way."""
Compute = Callable[[Mapping[str, torch.Tensor]], Sequence[torch.Tensor]]
"""Inputs on the device, [B, *shape] each -> outputs there."""


class BatchGraphs:
    """Graphs of `compute` for batches of so many rows of such lengths, of each instance on a stream of its own.

    An instance has DEPTH of each, which run one after the other: while one runs, the inputs of the next can be filled
    in, and the outputs of the last be taken. Where there is no memory for a graph, and for what cannot be captured,
    there is none.
    """

    def __init__(
        self,
        compute: Compute,
        inputs: Mapping[str, TensorSpec],
        sizes: Sequence[int],
        lengths: Sequence[int],
        instances: int,
        device: torch.device,
    ) -> None:
        """sizes, lengths: rising. Graphs are captured here. Raises torch.AcceleratorError."""
        self._sizes = sizes
        self._lengths = lengths
        self._free: SimpleQueue[dict[tuple[int, int], BatchGraph]] = SimpleQueue()
        self._taken: dict[BatchGraph, dict[tuple[int, int], BatchGraph]] = {}
        own = [(torch.cuda.graph_pool_handle(), _stream(device)) for _ in range(instances)]
        for memory, stream in own * DEPTH:
            graphs: dict[tuple[int, int], BatchGraph] = {}
            # The largest first: the others then fit into its memory.
            for size, length in ((s, n) for s in reversed(sizes) for n in reversed(lengths)):
                try:
                    graphs[size, length] = BatchGraph(compute, inputs, size, length, stream, memory)
                except torch.OutOfMemoryError as error:
                    logger.warning(
                        "there is no memory for a CUDA graph of %d rows of length %d: %s", size, length, error
                    )
                except Exception as error:
                    if isinstance(error, torch.AcceleratorError) and "captur" not in str(error):
                        raise
                    logger.warning(
                        "the model cannot be captured as a CUDA graph, its kernels are launched one by one: %s: %s",
                        type(error).__name__,
                        error,
                    )
                    break
            self._free.put(graphs)

    def padded_length(self, length: int) -> int:
        """The length that a row is padded to by itself."""
        return _next(self._lengths, length) or length

    def take(self, size: int, length: int) -> "BatchGraph | None":
        """The graph for a batch, which nobody else has until it is given back; None where there is none, or no more."""
        try:
            graphs = self._free.get_nowait()
        except Empty:
            return None
        graph = graphs.get((_next(self._sizes, size), _next(self._lengths, length)))
        if graph is None:
            self._free.put(graphs)
        else:
            self._taken[graph] = graphs
        return graph

    def give_back(self, graph: "BatchGraph") -> None:
        """Its outputs have been taken."""
        self._free.put(self._taken.pop(graph))


class BatchGraph:
    """`inputs`: arrays [size, *shape] in pinned memory, to be filled before `launch`. `nbytes`: with the outputs."""

    def __init__(
        self,
        compute: Compute,
        inputs: Mapping[str, TensorSpec],
        size: int,
        length: int,
        stream: torch.cuda.Stream,
        memory: Any,
    ) -> None:
        self._stream = stream
        # Who waits for it sleeps: a thread that looks again and again slows the event loop on the same processor core.
        self._done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        pinned = {
            name: torch.zeros(
                [size, *(length if n == ANY else n for n in spec.shape)],
                dtype=getattr(torch, spec.dtype),
                pin_memory=True,
            )
            for name, spec in inputs.items()
        }
        self.inputs: dict[str, np.ndarray] = {name: x.numpy() for name, x in pinned.items()}
        on_device = {name: x.to(stream.device) for name, x in pinned.items()}
        self._on_device = on_device  # the graph has their addresses only
        outputs: list[torch.Tensor] = []

        def step() -> None:
            for name, x in on_device.items():
                x.copy_(pinned[name], non_blocking=True)
            ys = compute(on_device)
            if not outputs:  # in the run before the capture
                outputs.extend(torch.empty(y.shape, dtype=y.dtype, pin_memory=True) for y in ys)
            for output, y in zip(outputs, ys, strict=True):
                output.copy_(y, non_blocking=True)

        self._graph = capture(step, stream.device, memory)
        self._outputs = [output.numpy() for output in outputs]
        self.nbytes = sum(x.nbytes for x in (*self.inputs.values(), *self._outputs))

    def launch(self) -> None:
        """Run with what is in `inputs`. Raises torch.AcceleratorError."""
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            self._done.record()

    def wait(self) -> None:
        """Until it has run. Raises torch.AcceleratorError."""
        self._done.synchronize()

    def outputs(self, rows: int) -> list[np.ndarray]:
        """What it has given, [rows, *shape] of the first rows."""
        return [output[:rows].copy() for output in self._outputs]


def _next(rising: Sequence[int], value: int) -> int:
    """The least that is not less; 0 where there is none."""
    i = bisect_left(rising, value)
    return rising[i] if i < len(rising) else 0


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
