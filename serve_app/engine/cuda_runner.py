"""Steps on a GPU: captured as CUDA graphs, with uploads and downloads on streams beside the compute."""

import logging
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from serve_app.engine.calibration import Calibration, Forward
from serve_app.engine.runner import check_outputs, inference_mode
from serve_app.engine.state_pool import StatePool
from serve_app.models.interface import RecurrentModel
from serve_app.policy.batching import pad_batch
from serve_app.spec import TensorSpec

logger = logging.getLogger(__name__)

WORTH_A_STREAM = 64 * 1024
"""Bytes of inputs or outputs; of less, changing streams takes longer than the copy."""
TIMED = 9
"""Steps, to tell which is the fastest."""
ALIGNMENT = 256
"""Bytes, of each tensor that is packed with others."""


class CudaRunner:
    """See StepRunner. A step is padded to the next batch size that has a graph; the padding runs in a slot of its own.

    A graph reads the states by slot, runs the model and writes them back. Its inputs and outputs lie in memory of its
    own, packed, so that one copy brings them; there is a graph for each step that may be on its way, so that the next
    one's upload and this one's download run beside the compute. Where they are small, the graph does them itself. Steps
    run on the device's default stream, in order; states that move (StatePool.moving) wait for them and they for those.
    """

    depth = 3
    time_major = takes_views = ragged = False

    def __init__(self, model: RecurrentModel, pool: StatePool, device: torch.device, calibration: Calibration) -> None:
        self._model = model
        self._pool = pool
        self._device = device
        self._calibration = calibration
        self._captures = True
        self._programs: dict[tuple[int, int], list[_Program]] = {}
        self._too_large: set[tuple[int, int]] = set()  # to be captured
        self._memory = torch.cuda.graph_pool_handle()
        self._compute = torch.cuda.default_stream(device)
        self._upload, self._download = _stream(device), _stream(device)
        self._turn = 0
        self._next: _Program | None = None  # whose memory `buffer` has given out

    def prepare(self, k: int, batch: int) -> None:
        """See StepRunner: kernels compiled and measured, graphs captured."""
        with inference_mode():
            self._captured(k, self._size(batch))

    def buffer(self, k: int, batch: int) -> np.ndarray:
        """See StepRunner; in pinned memory."""
        self._turn = (self._turn + 1) % self.depth  # whose last step has been asked for its outputs
        with inference_mode():
            programs = self._captured(k, self._size(batch))
        self._next = programs[self._turn] if programs else None
        nbytes = batch * k * self._model.input.nbytes
        return np.empty(nbytes, np.uint8) if self._next is None else self._next.x[:nbytes]

    def launch(self, x: np.ndarray, k: int, slots: np.ndarray, counts: np.ndarray | None = None) -> "_Launched":
        """See StepRunner."""
        batch = len(slots)
        with inference_mode():
            program = self._next
            if program is None:
                program = self._make(k, batch, self._model.forward, beside=False)
                program.x[:] = x
            program.index[:batch], program.index[batch:] = slots, self._pool.padding_slot
            outputs = program.host_outputs
            if outputs is None:  # then it goes with the answers
                outputs = torch.empty(program.outputs.nbytes, dtype=torch.uint8, pin_memory=True)
            if program.uploads:
                self._copy(self._upload, program.inputs, program.host_inputs, program.uploaded)
                self._compute.wait_event(program.uploaded)
            # All memory is there: from here on only the model itself can fail, before it writes the states.
            try:
                program.run()
            except Exception:
                self._upload.synchronize()  # the next step with this memory may be any, so nothing may be on its way
                raise
            if program.host_outputs is None:
                program.computed.record(self._compute)
                self._download.wait_event(program.computed)
                self._copy(self._download, outputs, program.outputs, program.landed)
            else:
                program.landed.record(self._compute)
        return _Launched(program, outputs, batch)

    def _copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor, done: Any) -> None:
        """Copy on that stream. (torch.cuda.stream() would ask for the current device several times, each as slow.)"""
        torch.cuda.set_stream(stream)
        try:
            target.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(self._compute)
        done.record(stream)

    def _size(self, batch: int) -> int:
        return pad_batch(batch) if self._captures else batch

    def _captured(self, k: int, size: int) -> "list[_Program] | None":
        """The graphs for a step of that size, None where there can be none."""
        programs = self._programs.get((k, size))
        if programs is None and self._captures and (k, size) not in self._too_large:
            try:
                forward = self._calibration.choose(k, size, lambda forward: self._capture(k, size, forward).time_s())
                programs = self._programs[k, size] = [self._capture(k, size, forward) for _ in range(self.depth)]
                self._upload.wait_stream(self._compute)  # which writes to their inputs next
            except torch.OutOfMemoryError as error:
                self._too_large.add((k, size))
                logger.warning("there is no memory for a CUDA graph of %d timesteps x %d: %s", k, size, error)
            except Exception as error:
                if isinstance(error, torch.AcceleratorError) and "captur" not in str(error):
                    raise
                self._captures = False
                logger.warning(
                    "a step of %s cannot be captured as a CUDA graph, its kernels are launched one by one: %s: %s",
                    type(self._model).__name__,
                    type(error).__name__,
                    error,
                )
        return programs

    def _capture(self, k: int, size: int, forward: Forward) -> "_Program":
        program = self._make(k, size, forward, beside=True)
        program.capture(self._memory)
        return program

    def _make(self, k: int, size: int, forward: Forward, *, beside: bool) -> "_Program":
        return _Program(self._model, forward, self._calibration.spare, self._pool, k, size, self._device, beside)


class _Program:
    """A step of k timesteps of `size` sessions: from packed inputs to packed outputs, on the device.

    `index` [size] and `x`, bytes of [size, k, *features], are its inputs in pinned memory.
    """

    def __init__(
        self,
        model: RecurrentModel,
        forward: Forward,
        spare: int,
        pool: StatePool,
        k: int,
        size: int,
        device: torch.device,
        beside: bool,
    ) -> None:
        """beside: large inputs and outputs are copied beside the steps before and after, on streams of their own."""
        self._model = model
        self._spare = spare
        self._forward = forward
        self._pool = pool
        spec = model.input
        start = _aligned(size * 8)
        self.host_inputs = torch.zeros(start + size * k * spec.nbytes, dtype=torch.uint8, pin_memory=True)
        packed = self.host_inputs.numpy()
        self.index: np.ndarray = packed[: size * 8].view(np.int64)
        self.x: np.ndarray = packed[start:]
        self.index[:] = pool.padding_slot
        self.inputs = self.host_inputs.to(device)
        self._index = self.inputs[: size * 8].view(torch.int64)
        self._x = self.inputs[start:].view(getattr(torch, spec.dtype)).view(size, k, *spec.shape)
        #: Of each output: its first byte, its shape, its dtype.
        self.forms: list[tuple[int, tuple[int, ...], TensorSpec]] = []
        end = 0
        for output in model.outputs.values():
            self.forms.append((end, (size, k, *output.shape), output))
            end = _aligned(end + size * k * output.nbytes)
        self.outputs = torch.empty(end, dtype=torch.uint8, device=device)
        #: The same as [k, size, *shape].
        self._outputs = [
            self.outputs[first : first + size * k * output.nbytes]
            .view(getattr(torch, output.dtype))
            .view(shape)
            .transpose(0, 1)
            for first, shape, output in self.forms
        ]
        #: Whether the inputs are brought by others, beside the step before; else the step itself does.
        self.uploads = beside and self.inputs.nbytes >= WORTH_A_STREAM
        #: Where the step brings its outputs; None: others do, beside the next.
        self.host_outputs: torch.Tensor | None = None
        if not beside or self.outputs.nbytes < WORTH_A_STREAM:
            self.host_outputs = torch.empty(end, dtype=torch.uint8, pin_memory=True)
        self.uploaded, self.computed, self.landed = _event(), _event(), _event()
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def run(self) -> None:
        """Launch the step, on the current stream."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def capture(self, memory: Any) -> None:
        """Make a graph of it, with `memory` for what lies between inputs and outputs."""
        self._graph = capture(self._step, self.inputs.device, memory)

    def time_s(self) -> float:
        """Seconds of a step, the median of a few."""
        times: list[float] = []
        for _ in range(TIMED):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            self.run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1e3)
        return median(times)

    def _step(self) -> None:
        if not self.uploads:
            self.inputs.copy_(self.host_inputs, non_blocking=True)
        x = self._x.transpose(0, 1)
        in_slots = getattr(self._forward, "in_slots", None)
        if in_slots is not None:
            in_slots(x, self._pool.states(), self._index, self._outputs, self._spare)
        else:
            y, state = self._forward(x.contiguous(), self._pool.gather(self._index))
            for output, value in zip(self._outputs, check_outputs(y, self._model.outputs, x.shape[:2]), strict=True):
                output.copy_(value)
            self._pool.scatter(self._index, state)
        if self.host_outputs is not None:
            self.host_outputs.copy_(self.outputs, non_blocking=True)


class _Launched:
    """See Step."""

    def __init__(self, program: _Program, outputs: torch.Tensor, batch: int) -> None:
        self.captured = program.captured
        self._program = program
        self._outputs = outputs
        self._batch = batch

    def outputs(self) -> list[np.ndarray]:
        """See Step."""
        self._program.landed.synchronize()
        packed, outputs = self._outputs.numpy(), []
        if self._outputs is self._program.host_outputs:  # where the next step will bring its own
            packed = packed.copy()
        for start, (_, *shape), spec in self._program.forms:
            end = start + self._batch * shape[0] * spec.nbytes
            outputs.append(packed[start:end].view(spec.dtype).reshape(self._batch, *shape))
        return outputs


def capture(step: Callable[[], None], device: torch.device, memory: Any) -> torch.cuda.CUDAGraph:
    """A graph of what `step` launches, with `memory` for what it allocates; it runs twice before."""
    aside, graph, before = _stream(device), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    aside.wait_stream(before)
    with torch.cuda.stream(aside):
        for _ in range(2):  # libraries set themselves up at first use, which cannot be captured
            step()
    before.wait_stream(aside)
    try:
        with torch.cuda.graph(graph, pool=memory, stream=aside, capture_error_mode="thread_local"):
            step()
    except Exception:
        # A capture that fails leaves its stream the current one, and the random numbers as if it went on.
        torch.cuda.set_stream(before)
        generator = torch.cuda.default_generators[device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
