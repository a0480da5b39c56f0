"""Steps on a GPU: captured as CUDA graphs, with uploads and downloads on streams beside the compute."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from serve_app.engine.runner import check_outputs
from serve_app.engine.state_pool import StatePool
from serve_app.models.interface import RecurrentModel
from serve_app.policy.batching import pad_batch

logger = logging.getLogger(__name__)

WORTH_A_STREAM = 256 * 1024
"""Bytes of inputs; of less, changing streams takes longer than the copy."""


class CudaRunner:
    """See StepRunner. A step is padded to the next batch size that has a graph; the padding runs in a slot of its own.

    A graph reads the states by slot, runs the model and writes them back. Its inputs and outputs lie in memory of the
    graph's own; they are copied in and out on the device, so that the next step's upload and this one's download run
    beside the compute. All that touches the states runs on the device's default stream, in order.
    """

    depth = 3

    def __init__(self, model: RecurrentModel, pool: StatePool, device: torch.device, *, capture: bool = True) -> None:
        self._model = model
        self._pool = pool
        self._device = device
        self._dtype = getattr(torch, model.input.dtype)
        self._capture = capture
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._compute = torch.cuda.default_stream(device)
        self._upload, self._download = _stream(device), _stream(device)
        self._counters: Counter[str] = Counter()

    def buffer(self, k: int, batch: int) -> np.ndarray:
        """See StepRunner; in pinned memory, a session's timesteps together, as frames have them."""
        x: np.ndarray = _pinned((batch, k, *self._model.input.shape), self._dtype).numpy().swapaxes(0, 1)
        return x

    def launch(self, x: np.ndarray, slots: np.ndarray) -> "_Launched":
        """See StepRunner."""
        k, batch = x.shape[:2]
        with torch.inference_mode():
            graph = self._graph(k, pad_batch(batch)) if self._capture else None
            padded = _pinned((graph.size if graph else batch,), torch.int64)
            padded.numpy()[:batch], padded.numpy()[batch:] = slots, self._pool.padding_slot
            inputs, index = torch.from_numpy(x), padded
            beside = x.nbytes >= WORTH_A_STREAM
            if beside or graph is None:
                with torch.cuda.stream(self._upload if beside else self._compute):
                    inputs = inputs.to(self._device, non_blocking=True)
                    index = index.to(self._device, non_blocking=True)
            specs = self._model.outputs.values()
            forms = [((batch, k, *spec.shape), getattr(torch, spec.dtype)) for spec in specs]
            outputs = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in forms]
            hosts = [_pinned(shape, dtype) for shape, dtype in forms]
            if beside:
                self._compute.wait_stream(self._upload)
            # All memory is there: from here on only the model itself can fail, before it writes the states.
            values = graph.replay(inputs, index) if graph else self._step(inputs, index)
            for output, value in zip(outputs, values, strict=True):
                output.copy_(value.transpose(0, 1))
            if beside:
                self._download.wait_stream(self._compute)
            with torch.cuda.stream(self._download if beside else self._compute):
                for host, output in zip(hosts, outputs, strict=True):
                    host.copy_(output, non_blocking=True)
                landed: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                landed.record()
        self._counters["graph_steps" if graph else "eager_steps"] += 1
        return _Launched(hosts, landed, (x, padded, inputs, index, *outputs))

    def counters(self) -> Mapping[str, int]:
        """See StepRunner: steps that were replayed, steps that ran without a graph, graphs."""
        return {**self._counters, "graphs": len(self._graphs)}

    def _step(self, x: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
        y, state = self._model.forward(x, self._pool.gather(index))
        values = check_outputs(y, self._model.outputs, x.shape[:2])
        self._pool.scatter(index, state)
        return values

    def _graph(self, k: int, size: int) -> "_Graph | None":
        """The graph for k timesteps of `size` sessions; None when the model's step cannot be captured."""
        graph = self._graphs.get((k, size))
        if graph is None:
            x = torch.zeros((k, size, *self._model.input.shape), dtype=self._dtype, device=self._device)
            index = torch.full((size,), self._pool.padding_slot, device=self._device)
            try:
                graph = self._graphs[k, size] = _Graph(lambda: self._step(x, index), x, index, self._memory)
            except torch.AcceleratorError as error:
                if "captur" not in str(error):
                    raise
                self._give_up(error)
            except Exception as error:
                self._give_up(error)
        return graph

    def _give_up(self, error: Exception) -> None:
        self._capture = False
        logger.warning(
            "a step of %s cannot be captured as a CUDA graph, its steps run one kernel after another: %s: %s",
            type(self._model).__name__,
            type(error).__name__,
            error,
        )


class _Graph:
    """A captured step, with the memory that it reads and writes."""

    def __init__(
        self, step: Callable[[], list[torch.Tensor]], x: torch.Tensor, index: torch.Tensor, memory: Any
    ) -> None:
        self.size = len(index)
        self._x, self._index = x, index
        self._graph = torch.cuda.CUDAGraph()
        aside = _stream(x.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries set themselves up at first use, which cannot be captured
                step()
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self._graph, pool=memory, stream=aside, capture_error_mode="thread_local"):
            self._values: list[torch.Tensor] = step()

    def replay(self, x: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
        """The outputs [k, B, *shape] for x [k, B, *features]; the next replay of any graph overwrites them."""
        batch = x.shape[1]
        self._x[:, :batch].copy_(x, non_blocking=True)
        self._index.copy_(index, non_blocking=True)
        self._graph.replay()
        return [value[:, :batch] for value in self._values]


class _Launched:
    """See Step. Keeps the memory that the device still reads."""

    def __init__(self, hosts: list[torch.Tensor], landed: Any, keep: tuple[object, ...]) -> None:
        self._hosts = hosts
        self._landed = landed
        self._keep = keep

    def done(self) -> bool:
        """See Step."""
        done: bool = self._landed.query()
        return done

    def outputs(self) -> list[np.ndarray]:
        """See Step."""
        self._landed.synchronize()
        self._keep = ()
        return [host.numpy() for host in self._hosts]


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Host memory that the device can reach by itself; torch keeps what is given back."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)
