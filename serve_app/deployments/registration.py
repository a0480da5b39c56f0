"""An owner's standing at the directory: registered, under a lease."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from serve_app import lease as clock
from serve_app.config import DurabilityConfig
from serve_app.directory import Owner
from serve_app.errors import Unavailable
from serve_app.lease import Lease
from serve_app.policy.autoscaling import IDLE, Load

ANSWERED_WITHIN_S = 0.3
"""By a directory that lives, mostly."""
HAND_OVER_EVERY_S, HAND_OVER_TURNS = 0.1, 20
"""An owner that leaves gives its sessions back in so many parts: each waits while those of its part go on elsewhere."""


class Standing(NamedTuple):
    """What an owner hears of the directory: its incarnation, and whether it knows the owner.

    give_back: so many sessions go on elsewhere now, since others have fewer.
    """

    incarnation: int
    is_known: bool
    give_back: int = 0


class News(NamedTuple):
    """The sessions that an owner has taken in since its last report, epochs and names; epochs that have ended."""

    taken: list[tuple[int, str]]
    ended: list[int]

    def after(self, told: "News") -> "News":
        """What is left when that has been told, with which it begins."""
        return News(self.taken[len(told.taken) :], self.ended[len(told.ended) :])


class Registry(Protocol):
    """The part of the directory that knows owners."""

    async def register(self, owner: Owner, durability: DurabilityConfig) -> int:
        """Make an owner known; which incarnation of the directory that is."""
        ...

    async def retire(self, owner: str) -> bool:
        """The owner is to take nothing more; whether another can have what it has."""
        ...

    async def unregister(self, owner: str) -> None:
        """The owner takes nothing any more."""
        ...

    async def report(self, owner: str, news: News, ends: dict[str, int], load: Load = IDLE) -> Standing:
        """The owner is alive, and that is new of its sessions.

        ends: how many have ended since the owner started, by reason.
        """
        ...

    async def is_down(self) -> bool:
        """Whether the last incarnation is known to be dead."""
        ...


class Registration:
    """`renew` has to be called several times within a lease.

    A directory that has given the owner up has let others have its sessions: `fence` drops what is left of them. One
    that has started again has not. While there is none a lease that holds goes on: nobody gives the owner up.
    """

    def __init__(
        self,
        directory: Registry,
        owner: Owner,
        durability: DurabilityConfig,
        lease: Lease,
        fence: Callable[[], Awaitable[None]],
    ) -> None:
        self._directory, self._owner, self._durability = directory, owner, durability
        self._lease, self._fence = lease, fence
        self._incarnation = -1
        self._news = News([], [])

    async def register(self) -> None:
        """Be known from now on. Raises ConfigError where checkpoints cannot be kept as configured."""
        asked_at = clock.now()
        self._incarnation = await self._directory.register(self._owner, self._durability)
        self._lease.renew(asked_at)

    async def hand_over(
        self, num_sessions: Callable[[], int], give_back: Callable[[int], None], renew: Callable[[], Awaitable[object]]
    ) -> None:
        """Before it leaves, give back what others can take, in HAND_OVER_TURNS parts. Raises Unavailable.

        renew: called for each, as `self.renew` has to be.
        """
        for turns_left in range(HAND_OVER_TURNS, 0, -1):
            if not num_sessions() or not await self._directory.retire(self._owner.name):
                return
            await renew()
            give_back(math.ceil(num_sessions() / turns_left))
            await asyncio.sleep(HAND_OVER_EVERY_S)

    async def leave(self) -> None:
        """Take nothing any more; what is here is given back under a last lease, unless there is none now."""
        asked_at, held = clock.now(), self._lease.holds
        await self._directory.unregister(self._owner.name)
        if held:
            self._lease.renew(asked_at)

    async def renew(self, news: News, ends: dict[str, int], load: Load = IDLE) -> int:
        """Say that the owner lives, and what is new of its sessions; how many it is to give back.

        Raises Unavailable, keeping what was said. ends: see Registry.report.
        """
        self._news = News(self._news.taken + news.taken, self._news.ended + news.ended)
        asking = asyncio.ensure_future(self._renew(ends, load))
        try:
            while not (await asyncio.wait([asking], timeout=ANSWERED_WITHIN_S))[0]:
                await self._go_on_alone()
            return asking.result()
        except Unavailable:
            await self._go_on_alone()
            raise
        finally:
            asking.cancel()

    async def _go_on_alone(self) -> None:
        asked_at = clock.now()
        if self._lease.holds and await self._directory.is_down():
            self._lease.renew(asked_at)

    async def _renew(self, ends: dict[str, int], load: Load) -> int:
        asked_at, told = clock.now(), self._news
        standing = await self._directory.report(self._owner.name, told, ends, load)
        self._news = self._news.after(told)
        if standing.is_known:
            self._lease.renew(asked_at)
            return standing.give_back
        if standing.incarnation == self._incarnation:
            await self._fence()
        await self.register()
        return 0
