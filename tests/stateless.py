"""Stateless models to test with."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import torch

from serve_app.config import AppConfig, BatchingConfig, EngineConfig, ModelConfig
from serve_app.engine.batcher import Batcher, build_batcher
from serve_app.errors import InvalidInput
from serve_app.models.stateless import Packed
from serve_app.rows import BatchedSpec, RowsRequest, RowsResult
from serve_app.spec import TensorSpec


class MaskedSum:
    """Of a row's ids [L] where its mask [L] is set: the sum [], and the sums so far [L]. An id of 666 fails.

    The mask may be left out: all count. Ids are 0 to 999.
    """

    inputs = {"ids": TensorSpec((-1,), "int64"), "mask": TensorSpec((-1,), "int64")}
    outputs = {"total": TensorSpec((), "float32"), "sums": TensorSpec((-1,), "int64")}
    optional = ("mask",)
    max_length = 32

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        ids = inputs["ids"]
        if ((ids < 0) | (ids > 999)).any():
            raise InvalidInput(f"id {ids[(ids < 0) | (ids > 999)][0]} is out of range: expected 0 to 999")
        return {"mask": np.ones_like(ids), **inputs}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        ids = inputs["ids"] * inputs["mask"]
        self.shapes.append((ids.shape[0], ids.shape[1]))
        if (ids == 666).any():
            raise RuntimeError("a bad row")
        return {"total": ids.sum(1).float(), "sums": ids.cumsum(1)}


class PackedSum(MaskedSum):
    """The same of rows that lie one behind the other."""

    packs = True

    def forward(self, inputs: Mapping[str, torch.Tensor], packed: Packed | None = None) -> Mapping[str, torch.Tensor]:
        if packed is None:
            return super().forward(inputs)
        ids = inputs["ids"] * inputs["mask"]
        self.shapes.append((ids.shape[0], ids.shape[1]))
        if (ids == 666).any():
            raise RuntimeError("a bad row")
        so_far = ids.flatten().cumsum(0)
        first = torch.arange(ids.numel()) - packed.position.flatten()  # of its row
        before = so_far[first] - ids.flatten()[first]
        of_row = packed.row.flatten() == torch.arange(packed.num_rows)[:, None]
        return {"total": (of_row * ids.flatten()).sum(1).float(), "sums": (so_far - before).reshape(ids.shape)}


class Words:
    """The number of bytes of a text."""

    max_length = 100
    inputs = {"text": TensorSpec((), "object")}
    prepared = {"letters": TensorSpec((-1,), "uint8")}
    outputs = {"count": TensorSpec((), "int64")}

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        text = inputs["text"].item().decode()
        if not text:
            raise InvalidInput("the text is empty: send 1 letter or more")
        return {"letters": np.frombuffer(text.encode(), np.uint8)}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (inputs["letters"] > 0).sum(1)


class LocalModels:
    """One stateless model in this process (see ingress.batched.BatchedModels), and one that is not ready yet."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    @classmethod
    @asynccontextmanager
    async def of(cls, name: str = "MaskedSum", **batching: Any) -> AsyncIterator["LocalModels"]:
        model = ModelConfig(f"tests.stateless:{name}", served_as={"MaskedSum": "masked", "Words": "words"}[name])
        batcher = build_batcher(AppConfig(model, EngineConfig(device="cpu"), batching=BatchingConfig(**batching)))
        yield cls(batcher)
        await batcher.stop()

    def specs(self) -> Mapping[str, BatchedSpec | None]:
        return {self.batcher.spec.name: self.batcher.spec, "starting": None}

    async def infer(self, model: str, request: RowsRequest) -> RowsResult:
        assert model == self.batcher.spec.name
        return await self.batcher.infer(request)
