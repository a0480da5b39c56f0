"""What clients take for one server is several ingresses: what each knows for itself, the others are asked for."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class CountsOf(NamedTuple):
    """What has been counted of these models: their Statistics, by name."""

    models: Sequence[str]


class Regions(NamedTuple):
    """The regions that are registered, as SharedMemory.status has them, where the memory is the same."""

    memory: str


class Unregister(NamedTuple):
    """Forget a region, or all where no name is given, where the memory is the same."""

    memory: str
    name: str


Question = CountsOf | Regions | Unregister


class Siblings(Protocol):
    """The other ingresses of an application."""

    async def ask(self, question: Question) -> list[Any]:
        """What InferenceServer.tell says at each of them; nothing of those that are gone, or do not answer in time."""
        ...


class NoSiblings:
    """See Siblings: there are none."""

    async def ask(self, question: Question) -> list[Any]:
        """See Siblings."""
        return []
