"""Models that replicas import by path."""

import torch

from serve_app.spec import TensorSpec


class Picky:
    """Sums its inputs; one above `limit` raises."""

    input = TensorSpec((1,))
    outputs = {"total": TensorSpec((1,))}

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def initial_state(self, batch: int) -> torch.Tensor:
        return torch.zeros(batch, 1)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if (x > self.limit).any():
            raise ValueError(f"an input above {self.limit}")
        y = state + x.cumsum(0)
        return y, y[-1]
