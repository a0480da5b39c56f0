"""The stateless models of an application, as the ways in see them."""

from collections.abc import Mapping
from typing import Protocol

from serve_app.rows import BatchedSpec, RowsRequest, RowsResult


class BatchedModels(Protocol):
    """The way to their replicas."""

    def specs(self) -> Mapping[str, BatchedSpec | None]:
        """All that are configured, by name; None for one whose replicas are not ready yet."""
        ...

    async def infer(self, model: str, request: RowsRequest) -> RowsResult:
        """Run a request. Raises what it fails with."""
        ...


class NoModels:
    """See BatchedModels: there are none."""

    def specs(self) -> Mapping[str, BatchedSpec | None]:
        """See BatchedModels."""
        return {}

    async def infer(self, model: str, request: RowsRequest) -> RowsResult:
        """See BatchedModels."""
        raise AssertionError(f"there is no model {model!r}. This is a bug.")
