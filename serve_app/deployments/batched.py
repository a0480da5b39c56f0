"""A replica with a stateless model: its batches behind Serve calls."""

import asyncio
from collections.abc import Mapping

import numpy as np

from serve_app.config import AppConfig
from serve_app.deployments.metrics import BatcherMetrics
from serve_app.engine.batcher import build_batcher
from serve_app.rows import BatchedSpec, RowsRequest, RowsResult

PUBLISH_PERIOD_S = 0.25


class Batched:
    """`infer` is for plain handle calls, `run` for the ingress. Calls that arrive together share batches."""

    async def __init__(self, config: AppConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self._batcher = build_batcher(config)
        self._metrics = BatcherMetrics(self._batcher.spec.name)
        self._publisher = asyncio.create_task(self._publish())

    async def infer(
        self, inputs: Mapping[str, np.ndarray], priority: int | None = None, timeout_s: float = 0.0
    ) -> dict[str, np.ndarray]:
        """Outputs [rows, *shape] by name, for inputs [rows, *shape] by name. See rows.RowsRequest, Batcher.infer."""
        return (await self.run(RowsRequest(inputs, priority, timeout_s))).values

    async def run(self, request: RowsRequest) -> RowsResult:
        """See Batcher.infer."""
        return await self._batcher.infer(request)

    def describe(self) -> BatchedSpec:
        """What the model takes and gives."""
        return self._batcher.spec

    def check_health(self) -> None:
        """Raise when nothing can be run any more: Serve then replaces this replica."""
        self._batcher.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "_publisher"):  # its start came that far
            self._publisher.cancel()
            await self._batcher.stop()

    async def _publish(self) -> None:
        while True:
            self._metrics.publish(self._batcher)
            await asyncio.sleep(PUBLISH_PERIOD_S)
