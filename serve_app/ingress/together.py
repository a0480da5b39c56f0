"""Many calls in one, where each has a cost whatever it holds."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from serve_app.errors import LockstepError, Unavailable

MAX_TOGETHER = 1000
"""Of one call: it takes the directory some 10 ms, for which all others wait."""
STOPPED = "nothing is asked for here any more: it was stopped"
A = TypeVar("A")
T = TypeVar("T")


class Together(Generic[A, T]):
    """Calls that are made while one is on its way go together with the next: thousands, when an owner is lost.

    More than MAX_TOGETHER go in several, all at once: what is done with the answers to one does not hold up the next.
    `work` takes what each was made with, and returns what each is answered with, or raises (a LockstepError); what it
    raises, all of them raise.
    """

    def __init__(self, work: Callable[[Sequence[A]], Awaitable[Sequence[T | LockstepError]]]) -> None:
        self._work = work
        self._waiting: list[tuple[A, asyncio.Future[T]]] = []
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def call(self, ask: A) -> asyncio.Future[T]:
        """One call; who awaits it may be cancelled. Raises Unavailable once this was stopped.

        The task that makes it for all is in a context of its own: it must not die with a request.
        """
        if self._stopped:
            raise Unavailable(STOPPED)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        self._waiting.append((ask, answer))
        if self._task is None:
            self._task = loop.create_task(self._run(), context=contextvars.Context())
        return answer

    async def stop(self) -> None:
        """Give up the call that is on its way, and all that wait."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for _, answer in self._waiting:
            _fail(answer, Unavailable(STOPPED))
        self._waiting.clear()

    async def _run(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, []
            try:
                if len(asked) <= MAX_TOGETHER:
                    await self._make(asked)
                else:
                    parts = [asked[at : at + MAX_TOGETHER] for at in range(0, len(asked), MAX_TOGETHER)]
                    await asyncio.gather(*map(self._make, parts))
            except asyncio.CancelledError:
                self._waiting[:0] = asked
                raise
        self._task = None

    async def _make(self, some: Sequence[tuple[A, asyncio.Future[T]]]) -> None:
        try:
            results = await self._work([ask for ask, _ in some])
        except Exception as error:
            for _, answer in some:
                _fail(answer, error)
        else:
            for (_, answer), result in zip(some, results, strict=True):
                if isinstance(result, LockstepError):
                    _fail(answer, result)
                elif not answer.done():
                    answer.set_result(result)


def _fail(answer: asyncio.Future[T], error: Exception) -> None:
    if not answer.done():  # whoever made it may have gone
        answer.set_exception(error)
