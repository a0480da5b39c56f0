"""A model of your own: smooth sensor values, and say how unusual each one is.

    serve run serve_app.app:build model=examples.own_model:Smoother model.channels=4 model.half_life=50

The four members below are the whole interface (serve_app/models/interface.py); options are arguments of `__init__`.
"""

import torch

from serve_app.spec import TensorSpec

Tensors = tuple[torch.Tensor, ...]


class Smoother(torch.nn.Module):
    """Exponentially weighted mean of each channel, and each value's distance from it in standard deviations."""

    def __init__(self, channels: int = 1, half_life: float = 20.0) -> None:
        """`half_life`: timesteps after which a value counts half."""
        super().__init__()
        self.input = TensorSpec((channels,))
        self.outputs = {"mean": TensorSpec((channels,)), "deviation": TensorSpec((channels,))}
        self.decay: torch.Tensor
        self.register_buffer("decay", torch.tensor(0.5 ** (1 / half_life)))

    def initial_state(self, batch: int) -> Tensors:
        """Weight, mean and summed squares of each session's channels, all [batch, channels]."""
        return tuple(torch.zeros(batch, *self.input.shape, device=self.decay.device) for _ in range(3))

    def forward(self, x: torch.Tensor, state: Tensors) -> tuple[dict[str, torch.Tensor], Tensors]:
        """x [T, B, channels] -> mean and deviation, each [T, B, channels]."""
        weight, mean, squares = state
        means, deviations = torch.empty_like(x), torch.empty_like(x)
        for t, now in enumerate(x):  # [B, channels]
            weight = self.decay * weight + 1
            before, mean = mean, mean + (now - mean) / weight
            squares = self.decay * squares + (now - before) * (now - mean)
            means[t], deviations[t] = mean, (now - mean) / (squares / weight + 1e-9).sqrt()
        return {"mean": means, "deviation": deviations}, (weight, mean, squares)
