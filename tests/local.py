"""A whole Lockstep in one process, without Ray: engines, a directory, and hubs that reach them by a function call."""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve_app.config import AppConfig
from serve_app.directory import Directory, Grant, Owner
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.engine import Engine
from serve_app.errors import StateLost, Unavailable
from serve_app.frame import Answer, Frame
from serve_app.ingress.hub import Hub
from serve_app.ingress.outbox import Channel
from serve_app.models.interface import RecurrentModel
from serve_app.spec import ModelSpec, SessionLimits

REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")


class LocalCluster:
    """Owners `owner-0`, `owner-1`, …; `kill` makes one unreachable.

    `frames` has every frame sent, `requests` in which request's context, `closed` the owner of each channel closed,
    `num_cancelled` counts the calls that were given up.
    Frames take `delay_s()` to arrive, so they may overtake each other.
    """

    def __init__(self, models: list[RecurrentModel], config: AppConfig) -> None:
        self.directory = Directory(incarnation=1)
        self.engines: dict[str, Engine] = {}
        self.frames: list[Frame] = []
        self.requests: list[str] = []
        self.closed: list[str] = []
        self.num_cancelled = 0
        self.delay_s: Callable[[], float] = lambda: 0.0
        self._running: dict[str, AsyncEngine] = {}
        self._dying: list[asyncio.Task[None]] = []
        self._config = config
        for model in models:
            self.add(model)

    def add(self, model: RecurrentModel) -> None:
        """One more owner."""
        config, name = self._config, f"owner-{len(self.engines)}"
        engine = self.engines[name] = Engine(model, config, name)
        self._running[name] = AsyncEngine(engine)
        session = config.session
        limits = SessionLimits(session.max_segment_timesteps, session.max_window_timesteps, session.nan == "refuse")
        checkpoints = session.checkpoint_timesteps > 0
        self.directory.register(
            Owner(name, name, engine.spec, limits, session.max_sessions, config.frame.max_bytes, checkpoints)
        )

    @property
    def alive(self) -> list[str]:
        """Owners that run."""
        return list(self._running)

    async def open(self, session: str, sender: str, model: str | None, ended: dict[str, list[int]]) -> Grant:
        for owner, epochs in ended.items():
            self.directory.ended(owner, epochs)
        return self.directory.open(session, sender, model)

    async def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        return self.directory.attach(session, sender)

    async def lost(self, owner: str) -> None:
        self.directory.unregister(owner)

    async def models(self) -> dict[str, ModelSpec]:
        return self.directory.models()

    def connect(self, owner: Owner) -> Channel:
        return LocalChannel(self, owner.name)

    async def call(self, owner: str, frame: Frame) -> Answer:
        self.frames.append(frame)
        self.requests.append(REQUEST.get())
        await asyncio.sleep(self.delay_s())
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


@asynccontextmanager
async def local(
    *models: RecurrentModel, config: AppConfig | None = None, ack_on_receipt: bool = True
) -> AsyncIterator[tuple[LocalCluster, Hub]]:
    """A cluster with an engine for each model, and a hub to it."""
    cluster = LocalCluster(list(models), config or AppConfig())
    hub = Hub(cluster, ack_on_receipt=ack_on_receipt)
    try:
        yield cluster, hub
    finally:
        await hub.stop()
        await cluster.stop()
