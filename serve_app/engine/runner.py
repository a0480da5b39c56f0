"""One step of the model: inputs and states in, outputs out, states written last."""

import numpy as np
import torch

from serve_app.engine.state_pool import StatePool
from serve_app.models.interface import RecurrentModel
from serve_app.spec import TensorSpec


class StepRunner:
    """Runs a model over sessions in slots of a pool."""

    def __init__(self, model: RecurrentModel, pool: StatePool, device: torch.device) -> None:
        self._model = model
        self._pool = pool
        self._device = device
        self._outputs = model.outputs

    def run(self, x: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
        """x [k, B, *features] of the sessions in `slots` -> each output as [B, k, *shape].

        The states change only if everything went well: whatever is raised here has changed nothing.
        """
        with torch.inference_mode():
            y, state = self._model.forward(torch.from_numpy(x).to(self._device), self._pool.gather(slots))
            values = {next(iter(self._outputs)): y} if isinstance(y, torch.Tensor) else y
            outputs = [self._to_host(name, values[name], spec, x.shape[:2]) for name, spec in self._outputs.items()]
            self._pool.scatter(slots, state)
        return outputs

    def _to_host(self, name: str, value: torch.Tensor, spec: TensorSpec, steps: tuple[int, ...]) -> np.ndarray:
        """[k, B, *shape] on the device -> [B, k, *shape] in host memory, in memory of its own."""
        array = np.array(value.cpu().numpy().swapaxes(0, 1), order="C")
        if array.shape != (steps[1], steps[0], *spec.shape) or array.dtype != spec.dtype:
            raise ValueError(
                f"the model's output {name!r} is {array.dtype} {list(value.shape)}, it declares {spec.dtype} "
                f"{[*steps, *spec.shape]}"
            )
        return array
