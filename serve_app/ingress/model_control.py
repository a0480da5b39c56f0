"""Loading and unloading of the models that are configured, as the ways in see it."""

from collections.abc import Collection, Mapping
from typing import Protocol

WATCH_S = 1.0
"""So often every way in looks what the others have loaded and unloaded."""


class ModelControl(Protocol):
    """What is served of what is configured."""

    @property
    def configured(self) -> Collection[str]:
        """The models that there are, whether they can be asked now or not."""
        ...

    async def unloaded(self) -> Mapping[str, bool]:
        """The models of which no new session may start, and whether all their replicas are gone."""
        ...

    async def load(self, model: str) -> None:
        """Serve the model (again); returns when it can be asked. Raises Unavailable where it cannot start."""
        ...

    async def unload(self, model: str) -> None:
        """Start nothing new of the model; when what runs has ended, its replicas go, and their memory."""
        ...


class Marks:
    """See ModelControl: nothing new starts, and that is all. For models that live in this process."""

    def __init__(self, configured: Collection[str] = ()) -> None:
        self.configured = configured
        self._unloaded: dict[str, bool] = {}

    async def unloaded(self) -> Mapping[str, bool]:
        """See ModelControl."""
        return dict(self._unloaded)

    async def load(self, model: str) -> None:
        """See ModelControl."""
        self._unloaded.pop(model, None)

    async def unload(self, model: str) -> None:
        """See ModelControl."""
        self._unloaded[model] = True
