"""Steps of a model: inputs in host memory and states in slots, to outputs in host memory and states in slots."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch

from serve_app.engine.state_pool import StatePool
from serve_app.models.interface import RecurrentModel
from serve_app.policy.batching import even_parts
from serve_app.spec import TensorSpec


class Step(Protocol):
    """A step that was launched; `captured`: as a graph, not one kernel after another."""

    captured: bool

    def outputs(self) -> list[np.ndarray]:
        """Each output as [B, k, *shape], in memory of its own, once the step has run; ragged, as [sum(counts), *shape].

        In either case those of a session lie together.
        """
        ...


class StepRunner(Protocol):
    """Launches steps; they run in the order in which they were launched."""

    depth: int
    """Steps that may be on their way: launched, and their outputs not asked for."""
    time_major: bool
    """How inputs are ordered: by timestep [k, B], else by session [B, k]."""
    takes_views: bool
    """Whether `launch` also takes inputs that lie elsewhere."""
    ragged: bool
    """Whether `launch` takes different numbers of timesteps."""

    def prepare(self, k: int, batch: int) -> None:
        """Set up what a step of that size needs at its first use."""
        ...

    def buffer(self, k: int, batch: int) -> np.ndarray:
        """Host memory for the inputs of the next step, as bytes [k * batch * bytes of a timestep]."""
        ...

    def launch(self, x: np.ndarray, k: int, slots: np.ndarray, counts: np.ndarray | None = None) -> Step:
        """Run k timesteps from the states in `slots` [B], and write the new states there.

        x is `buffer` filled, or a view of as much that may not be written. With `counts` [B], in place of k, these are
        the timesteps of each, and x [sum(counts)] are those of one session after the other.

        Whatever is raised here has changed nothing.
        """
        ...


class EagerRunner:
    """On the CPU: a step has run when `launch` returns."""

    depth = 1
    ragged = True

    def __init__(self, model: RecurrentModel, pool: StatePool) -> None:
        self.takes_views = getattr(model, "takes_views", False)
        self.time_major = not self.takes_views
        self._model = model
        self._outputs = dict(model.outputs)
        self._pool = pool

    def prepare(self, k: int, batch: int) -> None:
        """See StepRunner: nothing."""

    def buffer(self, k: int, batch: int) -> np.ndarray:
        """See StepRunner."""
        return np.empty(k * batch * self._model.input.nbytes, np.uint8)

    def launch(self, x: np.ndarray, k: int, slots: np.ndarray, counts: np.ndarray | None = None) -> Step:
        """See StepRunner."""
        if counts is not None:
            return self._launch_ragged(x, counts, slots)
        spec, batch = self._model.input, len(slots)
        x = x.view(spec.dtype)
        if self.time_major:
            x = x.reshape(k, batch, *spec.shape)
        else:
            x = x.reshape(batch, k, *spec.shape).swapaxes(0, 1)
        with inference_mode():
            index = self._pool.index(slots)
            y, state = self._model.forward(torch.from_numpy(x), self._pool.gather(index))
            values = check_outputs(y, self._outputs, (k, batch))
            outputs = [value.numpy().swapaxes(0, 1).copy() for value in values]
            self._pool.scatter(index, state)
        return _Finished(outputs)

    def _launch_ragged(self, x: np.ndarray, counts: np.ndarray, slots: np.ndarray) -> Step:
        """The model runs a few times, each time the same number of timesteps of some sessions."""
        spec, first = self._model.input, counts.cumsum() - counts
        timesteps = x.view(spec.dtype).reshape(-1, *spec.shape)
        outputs = [np.empty((len(timesteps), *each.shape), each.dtype) for each in self._outputs.values()]
        with inference_mode(), self._pool.as_before(self._pool.index(slots)):
            for members, at, k in even_parts(counts):
                index = self._pool.index(slots[members])
                where = first[members] + at + np.arange(k)[:, None]
                y, state = self._model.forward(torch.from_numpy(timesteps[where]), self._pool.gather(index))
                for output, value in zip(outputs, check_outputs(y, self._outputs, where.shape), strict=True):
                    output[where] = value.numpy()
                self._pool.scatter(index, state)
        return _Finished(outputs)


class _Finished:
    captured = False

    def __init__(self, outputs: list[np.ndarray]) -> None:
        self._outputs = outputs

    def outputs(self) -> list[np.ndarray]:
        return self._outputs


def inference_mode() -> AbstractContextManager[object]:
    """torch.inference_mode(), where it is not on already: to enter it takes as long as to gather the states."""
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()


def limit_threads() -> None:
    """Let operators use no more threads on this one either than is set for the process: oneDNN's go by the thread."""
    torch.set_num_threads(torch.get_num_threads())


def check_outputs(y: Any, specs: Mapping[str, TensorSpec], steps: tuple[int, ...]) -> list[torch.Tensor]:
    """The model's outputs in the order in which it declares them; ValueError unless they are [*steps, *shape]."""
    values = {next(iter(specs)): y} if isinstance(y, torch.Tensor) else y
    for name, spec in specs.items():
        value = values[name]
        if value.shape != steps + spec.shape or value.dtype != getattr(torch, spec.dtype):
            raise ValueError(
                f"the model's output {name!r} is {value.dtype} {list(value.shape)}, it declares {spec.dtype} "
                f"{[*steps, *spec.shape]}"
            )
    return [values[name] for name in specs]
