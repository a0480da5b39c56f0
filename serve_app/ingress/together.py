"""Many calls in one, where each has a cost whatever it holds."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

MAX_TOGETHER = 1000
"""Of one call: it takes the directory some 10 ms, for which all others wait."""
A = TypeVar("A")
T = TypeVar("T")


class Together(Generic[A, T]):
    """Calls that are made while one is on its way go together with the next: thousands, when an owner is lost.

    `work` takes what each was made with, and returns what each is answered with; what it raises, all of them raise.
    """

    def __init__(self, work: Callable[[Sequence[A]], Awaitable[Sequence[T]]]) -> None:
        self._work = work
        self._waiting: list[tuple[A, asyncio.Future[T]]] = []
        self._task: asyncio.Task[None] | None = None

    async def call(self, ask: A) -> T:
        """One call. The task that makes it for all is in a context of its own: it must not die with a request."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._waiting.append((ask, answer))
        if self._task is None:
            self._task = loop.create_task(self._run(), context=contextvars.Context())
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
            try:
                results = await self._work([ask for ask, _ in some])
            except Exception as error:
                for _, answer in some:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for (_, answer), result in zip(some, results, strict=True):
                    if not answer.done():  # whoever made it may have gone
                        answer.set_result(result)
        self._task = None
