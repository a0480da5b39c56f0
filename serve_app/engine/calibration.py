"""Which way of computing a step is the fastest that is right: measured where it runs, remembered on disk."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from serve_app.models.interface import RecurrentModel

logger = logging.getLogger(__name__)

Forward = Callable[[torch.Tensor, Any], tuple[Any, Any]]
REFERENCE = "torch"
"""The model's own forward."""
TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Of an alternative against the reference, by norm, which is off by about half of that itself; else 1e-4."""


class Calibration:
    """Chooses among the forwards of a model, for each size of a step.

    Choices are remembered in `file` (none: only here), by device, versions, model, its forwards and size; a file that
    cannot be read or written is reported, and does without.
    """

    def __init__(self, model: RecurrentModel, device: torch.device, file: str, spare: int = 0) -> None:
        """spare: multiprocessors that a step leaves to states that move beside it, where its forward can."""
        self.spare = spare
        self._model = model
        self._device = device
        self._file = Path(file).expanduser() if file else None
        alternatives: Callable[[], Mapping[str, Forward]] = getattr(model, "alternatives", dict)
        self.forwards: dict[str, Forward] = {REFERENCE: model.forward, **alternatives()}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        among = " or ".join(self.forwards)  # one that is new may be faster than what was chosen without it
        options = getattr(model, "options", "")
        self._where = f"{name}, torch {torch.__version__}, {kind}, {options}, {spare} spare, {among}"
        self._chosen = self._read()

    def choose(self, k: int, size: int, time_s: Callable[[Forward], float]) -> Forward:
        """The forward for k timesteps of `size` sessions. `time_s` says how long a step with one takes."""
        key = f"{self._where}, {k} x {size}"
        known = self._chosen.get(key, "")
        if len(self.forwards) > 1 and not (known in self.forwards and self._right(known, k, size)):
            times = {REFERENCE: time_s(self._model.forward)}
            for name, forward in self.forwards.items():
                if name != REFERENCE and self._right(name, k, size):
                    times[name] = time_s(forward)
            self._chosen[key] = min(times, key=lambda name: times[name])
            logger.info("steps of %d x %d: %s", k, size, {name: f"{t * 1e6:.0f} us" for name, t in times.items()})
            self._write()
        return self.forwards[self._chosen.get(key, REFERENCE)]

    def _right(self, name: str, k: int, size: int) -> bool:
        """Whether a forward runs, and gives what the reference gives, for random inputs from random states."""
        if name == REFERENCE:
            return True
        try:
            error = self._error(name, k, size)
        except torch.AcceleratorError:
            raise  # the device is in an unknown state
        except Exception:
            logger.warning("%s is not used for steps of %d x %d: it fails", name, k, size, exc_info=True)
            return False
        dtype = next(leaf.dtype for leaf in pytree.tree_leaves(self._model.initial_state(1)))
        if not error <= getattr(self._model, "tolerance", TOLERANCE.get(dtype, 1e-4)):
            logger.warning("%s is not used for steps of %d x %d: it is off by %.2g", name, k, size, error)
            return False
        return True

    def _error(self, name: str, k: int, size: int) -> float:
        """The largest ‖found - expected‖ / ‖expected‖ of an output or a state; NaN counts as infinite."""
        spec = self._model.input
        x = torch.randn((k, size, *spec.shape), device=self._device).to(getattr(torch, spec.dtype))
        like = self._model.initial_state(size)
        state = pytree.tree_map(lambda leaf: torch.randn(leaf.shape, device=self._device).to(leaf.dtype) / 2, like)
        expected, found = (
            pytree.tree_leaves(self._run(forward, x, state)) for forward in (self._model.forward, self.forwards[name])
        )
        errors = [
            float((a.double() - b.double()).norm() / b.double().norm())
            for a, b in zip(found, expected, strict=True)
            if b.is_floating_point()  # indices of nearly equal values may change places
        ]
        return max(math.inf if math.isnan(error) else error for error in errors)

    def _run(self, forward: Forward, x: torch.Tensor, state: Any) -> tuple[Any, Any]:
        """As steps do: in slots where it can, with a session's timesteps together."""
        in_slots = getattr(forward, "in_slots", None)
        if in_slots is None:
            return forward(x, state)
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        states = pytree.tree_map(torch.clone, state)
        outputs = {
            name: x.new_empty(x.shape[1], len(x), *spec.shape, dtype=getattr(torch, spec.dtype)).transpose(0, 1)
            for name, spec in self._model.outputs.items()
        }
        in_slots(x, states, torch.arange(x.shape[1], device=x.device), list(outputs.values()), self.spare)
        return (outputs if len(outputs) > 1 else next(iter(outputs.values()))), states

    def _read(self) -> dict[str, str]:
        try:
            found = json.loads(self._file.read_text()) if self._file and self._file.exists() else {}
            if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
                raise ValueError("not an object of strings")
            return found
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read, steps are measured anew: %s", self._file, error)
            return {}

    def _write(self) -> None:
        if self._file is None:
            return
        chosen = {**self._read(), **self._chosen}  # another replica may have written
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new = self._file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(chosen, indent=1) + "\n")
            new.replace(self._file)
        except OSError as error:
            logger.warning("%s cannot be written, steps are measured anew next time: %s", self._file, error)
