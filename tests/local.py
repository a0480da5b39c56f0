"""A whole Lockstep in one process, without Ray: engines, a directory, and hubs that reach them by a function call."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from serve_app import lease
from serve_app.config import AppConfig
from serve_app.deployments.directory_service import DirectoryService
from serve_app.deployments.registration import News
from serve_app.directory import Ahead, Ask, Described, Directory, Grant, Owner, SessionStatistics, Slab
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.engine import Engine, spare_rows_of
from serve_app.errors import LockstepError, StateLost, Unavailable
from serve_app.frame import Answer, Frame
from serve_app.ingress.hub import Hub
from serve_app.ingress.outbox import Channel
from serve_app.models.interface import RecurrentModel
from serve_app.policy.session_queue import QueueLimits
from serve_app.spec import ModelSpec

T = TypeVar("T")
REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")


class LocalCluster:
    """Owners `owner-0`, `owner-1`, …; `kill` makes one unreachable.

    `frames` has every frame sent, `requests` in which request's context, `closed` the owner of each channel closed,
    `num_cancelled` counts the calls that were given up, `num_overtaken` the frames that came after a later one.
    Frames take `delay_s()` to arrive, so they may overtake each other.
    """

    def __init__(self, models: list[RecurrentModel], config: AppConfig) -> None:
        self.actor = DirectoryService("app", self._is_listening)
        self.engines: dict[str, Engine] = {}
        self.frames: list[Frame] = []
        self.requests: list[str] = []
        self.closed: list[str] = []
        self.num_cancelled = 0
        self.num_overtaken = 0
        self._newest = 0  # number of the newest frame that arrived
        self.stopped: set[str] = set()  # owners that neither report nor answer
        self.delay_s: Callable[[], float] = lambda: 0.0
        self._running: dict[str, AsyncEngine] = {}
        self._dying: list[asyncio.Task[None]] = []
        self._config = config
        self.owners: dict[str, Owner] = {}
        for model in models:
            self.add(model)

    def add(self, model: RecurrentModel, config: AppConfig | None = None) -> None:
        """One more owner; of another model where it has a configuration of its own."""
        config, name = config or self._config, f"owner-{len(self.engines)}"
        engine = self.engines[name] = Engine(model, config, name, spare_rows=spare_rows_of(config.session.max_sessions))
        self._running[name] = AsyncEngine(engine)
        session = config.session
        checkpoints = session.checkpoint_timesteps > 0
        self.owners[name] = Owner(
            name, name, engine.spec, engine.limits, session.max_sessions, engine.max_frame_bytes, checkpoints,
            queue=QueueLimits(session.max_waiting, session.max_wait_s, session.default_priority),
            moves_per_s=session.moves_per_s,
        )  # fmt: skip
        self.directory.register(self.owners[name])

    @property
    def alive(self) -> list[str]:
        """Owners that run."""
        return list(self._running)

    @property
    def directory(self) -> Directory:
        return self.actor._directory

    async def start_directory(self) -> None:
        """A directory starts (again), and all that live register, as they do on Ray."""
        self.actor = DirectoryService("app", self._is_listening)
        for name in self._running:
            await self.actor.register(self.owners[name], self._config.durability)

    async def _is_listening(self, owner: str) -> bool:
        return owner in self._running

    def _report(self) -> None:
        """All that live do so all the time."""
        self.directory.tick(lease.now())
        for owner in self._running:
            if owner not in self.stopped:
                self.directory.heard(owner)

    async def report(self) -> None:
        """All that live do so once, and give back the sessions that they are told to."""
        for owner in self._running:
            stats = self.engines[owner].stats
            standing = await self.actor.report(owner, News(stats.take_taken(), stats.take_ended()), dict(stats.ends))
            self.give_back(owner, standing.give_back)

    def give_back(self, owner: str, count: int) -> None:
        """An owner is told to give so many sessions back."""
        self._running[owner].give_back(count)

    async def open(self, ask: Ask) -> Grant:
        self._report()
        (opened,) = await self.actor.open([ask])
        if isinstance(opened, LockstepError):
            raise opened
        return opened

    async def open_ahead(self, ask: Ahead) -> Sequence[Grant]:
        self._report()
        return await self.actor.open_ahead(ask)

    async def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        return await self.actor.attach(session, sender)

    async def release(self, session: str, epoch: int) -> None:
        await self.actor.release(session, epoch)

    async def keep(self, sender: str, slab: Slab) -> dict[str, LockstepError]:
        return await self.actor.keep(sender, slab)

    async def fetch(self, session: str) -> tuple[int, bytes]:
        return await self.actor.fetch(session)

    async def lost(self, owner: str) -> None:
        await self.actor.lost(owner)

    async def gone(self, owners: Sequence[str]) -> list[str]:
        self._report()
        return await self.actor.gone(owners)

    async def describe(self, session: str) -> Described:
        return await self.actor.describe(session)

    async def sessions(self, after: str, limit: int) -> list[Described]:
        return await self.actor.sessions(after, limit)

    async def drop(self, session: str) -> Grant | None:
        return await self.actor.drop(session)

    async def migrate(self, session: str, to: str | None) -> Grant:
        return await self.actor.migrate(session, to)

    async def statistics(self) -> dict[str, SessionStatistics]:
        for name, engine in self.engines.items():
            stats = engine.stats
            await self.actor.report(name, News(stats.take_taken(), stats.take_ended()), dict(stats.ends))
        return await self.actor.statistics()

    async def models(self) -> dict[str, ModelSpec]:
        self._report()
        return await self.actor.models()

    def connect(self, owner: Owner) -> Channel:
        return LocalChannel(self, owner.name)

    async def call(self, owner: str, frame: Frame) -> Answer:
        self.frames.append(frame)
        self.requests.append(REQUEST.get())
        number = len(self.frames)
        await asyncio.sleep(self.delay_s())
        self.num_overtaken += number < self._newest
        self._newest = max(self._newest, number)
        while owner in self.stopped:
            await asyncio.sleep(0.01)
        try:
            answer = await self._running[owner].frame(frame)
            if owner not in self._running:
                raise StateLost(f"owner {owner!r} is gone: its sessions are lost")
            return answer
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        except (KeyError, Unavailable) as error:
            raise StateLost(f"owner {owner!r} is gone: its sessions are lost") from error

    async def kill(self, owner: str) -> None:
        """It is gone at once, and what it was about to say."""
        self._dying.append(asyncio.create_task(self._running.pop(owner).stop()))
        await asyncio.sleep(0)

    async def drain(self, owner: str) -> None:
        """It stops in order."""
        self.directory.unregister(owner)
        await self._running[owner].stop()
        del self._running[owner]

    async def stop(self) -> None:
        for owner in list(self._running):
            await self.kill(owner)
        await asyncio.gather(*self._dying)


class LocalChannel:
    """A function call, where others have a network."""

    def __init__(self, cluster: LocalCluster, owner: str) -> None:
        self._cluster = cluster
        self._owner = owner

    async def call(self, frame: Frame) -> Answer:
        return await self._cluster.call(self._owner, frame)

    async def close(self) -> None:
        self._cluster.closed.append(self._owner)


class Mortal:
    """A cluster as one hub sees it (see hub.DirectoryClient). Once it is `dead` the hub can do nothing any more."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.dead = False

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Unavailable("this process is dead")
            return await self.reach(getattr(self.cluster, name)(*args, **kwargs), Unavailable)

        return call

    async def reach(self, work: Coroutine[Any, Any, T], error: type[LockstepError]) -> T:
        result = await work
        if self.dead:
            raise error("this process is dead")
        return result

    def connect(self, owner: Owner) -> Channel:
        return MortalChannel(self, owner.name)


class MortalChannel:
    """See Mortal."""

    def __init__(self, mortal: Mortal, owner: str) -> None:
        self._mortal = mortal
        self._owner = owner

    async def call(self, frame: Frame) -> Answer:
        if self._mortal.dead:
            raise StateLost("this process is dead")
        return await self._mortal.reach(self._mortal.cluster.call(self._owner, frame), StateLost)

    async def close(self) -> None:
        pass


@asynccontextmanager
async def local(
    *models: RecurrentModel, config: AppConfig | None = None, ack_on_receipt: bool = True
) -> AsyncIterator[tuple[LocalCluster, Hub]]:
    """A cluster with an engine for each model, and a hub to it."""
    cluster = LocalCluster(list(models), config or AppConfig())
    await cluster.start_directory()
    hub = Hub(cluster, ack_on_receipt=ack_on_receipt)
    try:
        yield cluster, hub
    finally:
        await hub.stop()
        await cluster.stop()
