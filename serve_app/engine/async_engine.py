"""An engine behind `await`: one wake-up of the event loop for all answers of a step."""

import asyncio

from serve_app.engine.engine import Engine
from serve_app.engine.loop import Delivery, EngineLoop
from serve_app.errors import LockstepError
from serve_app.frame import Answer, Frame
from serve_app.lease import Lease


class AsyncEngine:
    """Calls into an engine's thread, from the event loop that it is made on: that delivers what the thread answers."""

    def __init__(self, engine: Engine, cores: int = 0, lease: Lease | None = None) -> None:
        """cores, lease: see EngineLoop."""
        self._asyncio_loop = asyncio.get_running_loop()
        self._loop = EngineLoop(engine, self._deliver, cores, lease)

    async def frame(self, frame: Frame) -> Answer:
        """Hand a frame in; the answer brings what there is for its sender by then, of this frame or others."""
        future: asyncio.Future[Answer] = self._asyncio_loop.create_future()
        self._loop.call(frame, future)
        return await future

    @property
    def idle_s(self) -> float:
        """Seconds in which there was nothing to do, since the start."""
        return self._loop.idle_s

    def give_back(self, count: int) -> None:
        """Have so many sessions go on elsewhere: see Engine.give_back."""
        self._loop.give_back(count)

    async def fence(self) -> None:
        """Drop all sessions: others have them."""
        await asyncio.to_thread(self._loop.fence)

    def check_health(self) -> None:
        """Raise Unavailable when the engine has died."""
        self._loop.check_health()

    async def stop(self) -> None:
        """End the engine's thread; calls still open fail with Unavailable."""
        await asyncio.to_thread(self._loop.stop)

    def _deliver(self, replies: Delivery) -> None:
        if not self._asyncio_loop.is_closed():
            self._asyncio_loop.call_soon_threadsafe(_resolve, replies)


def _resolve(replies: Delivery) -> None:
    for future, reply in replies:
        assert isinstance(future, asyncio.Future)
        if future.done():
            continue  # its caller has gone
        if isinstance(reply, LockstepError):
            future.set_exception(reply)
        else:
            future.set_result(reply)
