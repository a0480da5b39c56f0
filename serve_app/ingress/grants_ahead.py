"""Grants that are asked for ahead, while many sessions begin whose names nobody else has: those ask nobody."""

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve_app.directory import Grant
from serve_app.errors import LockstepError, Unavailable

logger = logging.getLogger(__name__)

LIFE_S = 1.0
"""So long a grant may be used: by then another owner may have more room, or a session may wait that came before."""
FEW = 8
"""Where no more sessions than these have begun within that time, nothing is asked for ahead."""
MAX_AHEAD = 32
GIVE_BACK_WITHIN_S = 2.0


@dataclass(slots=True)
class _Model:
    """begun: when the last sessions began. grants: with when they expire, the first is the first.

    asks_from: not before, since there were fewer than wanted.
    """

    begun: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_AHEAD))
    grants: deque[tuple[float, Grant]] = field(default_factory=deque)
    is_asking: bool = False
    asks_from: float = 0.0


OpenAhead = Callable[[str | None, int, dict[str, list[int]]], Coroutine[Any, Any, Sequence[Grant]]]
"""Asks the directory for so many grants of a model, and tells it which are not used: epochs, by owner."""


class GrantsAhead:
    """Of one sender, by model: about as many as there were sessions in the last LIFE_S, MAX_AHEAD at most."""

    def __init__(self, open_ahead: OpenAhead) -> None:
        self._open_ahead = open_ahead
        self._models: dict[str | None, _Model] = {}
        self._unused: dict[str, list[int]] = {}
        self._asking: set[asyncio.Task[object]] = set()
        self._looking: asyncio.TimerHandle | None = None
        self._stopped = False

    def take(self, model: str | None) -> Grant | None:
        """One for a session of the model that begins now; None where that has to ask."""
        one, now = self._models.setdefault(model, _Model()), asyncio.get_running_loop().time()
        one.begun.append(now)
        self._expire(one, now)
        grant = one.grants.popleft()[1] if one.grants else None
        wanted = len(one.begun) if len(one.begun) > FEW else 0
        if len(one.grants) < (wanted + 1) // 2 and not one.is_asking and one.asks_from <= now and not self._stopped:
            one.is_asking = True
            self._start(self._ask(model, one, wanted - len(one.grants)))
        self._look_later()
        return grant

    def drop(self, owner: str) -> None:
        """Let no session begin at that owner, which may be gone."""
        for one in self._models.values():
            grants, one.grants = one.grants, deque()
            for until, grant in grants:
                if grant.owner.name == owner:
                    self.give_back(grant)
                else:
                    one.grants.append((until, grant))

    def give_back(self, grant: Grant) -> None:
        """No session has begun there."""
        self._unused.setdefault(grant.owner.name, []).append(grant.epoch)

    async def stop(self) -> None:
        """Give all back, unless nobody answers; no other is asked for."""
        self._stopped = True
        if self._looking is not None:
            self._looking.cancel()
        try:
            async with asyncio.timeout(GIVE_BACK_WITHIN_S):
                await asyncio.gather(*self._asking, return_exceptions=True)
                for one in self._models.values():
                    for _, grant in one.grants:
                        self.give_back(grant)
                    one.grants.clear()
                if self._unused:
                    await self._tell()
        except TimeoutError:
            logger.warning("the directory does not answer: it has places kept free for a minute that are not used")

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        """In a context of its own: it must not die with the request that it is begun in."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _ask(self, model: str | None, one: _Model, places: int) -> None:
        until = asyncio.get_running_loop().time() + LIFE_S
        try:
            grants = await self._tell(model, places)
        finally:
            one.is_asking = False
        one.grants.extend((until, grant) for grant in grants)
        if len(grants) < places:
            one.asks_from = until

    async def _tell(self, model: str | None = None, places: int = 0) -> Sequence[Grant]:
        """Give back what is not used, and get so many others; none where the directory says why not."""
        unused, self._unused = self._unused, {}
        try:
            return await self._open_ahead(model, places, unused)
        except LockstepError as error:  # the next session that asks is told, too
            logger.debug("no grants ahead: %s", error)
            if isinstance(error, Unavailable):  # who knows whether it has heard
                for owner, epochs in unused.items():
                    self._unused.setdefault(owner, []).extend(epochs)
                self._look_later()
            return ()

    def _look_later(self) -> None:
        if self._looking is None and (self._models or self._unused) and not self._stopped:
            loop = asyncio.get_running_loop()
            self._looking = loop.call_later(LIFE_S, self._look, context=contextvars.Context())

    def _look(self) -> None:
        """Give back what has expired, though nobody takes any."""
        self._looking, now = None, asyncio.get_running_loop().time()
        for model, one in list(self._models.items()):
            self._expire(one, now)
            if not (one.begun or one.grants or one.is_asking):
                del self._models[model]
        if self._unused:
            self._start(self._tell())
        self._look_later()

    def _expire(self, one: _Model, now: float) -> None:
        while one.begun and one.begun[0] <= now - LIFE_S:
            one.begun.popleft()
        while one.grants and one.grants[0][0] <= now:
            self.give_back(one.grants.popleft()[1])
