"""The client for programs without an event loop: the same sessions, run by a thread in the background."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from clients.client import connect
from clients.session import Session
from serve_app.segment import Outputs
from serve_app.spec import ModelSpec

T = TypeVar("T")


class BlockingClient:
    """`clients.client.Client`, blocking. Use as a context manager, or call `stop` at the end.

    timeout_s: how long any call may take (None: for ever); then it raises TimeoutError.
    """

    def __init__(self, target: Any, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lockstep-client", daemon=True)
        self._thread.start()
        try:
            self._client = self.run(_call(connect, target))
        except BaseException:
            self._end()
            raise

    def open(
        self,
        session: str | None = None,
        model: str | None = None,
        initial_state: Sequence[np.ndarray] | None = None,
        *,
        checkpoint: bytes | None = None,
        priority: int = 0,
        max_wait_s: float = math.inf,
    ) -> "BlockingSession":
        """See Client.open."""
        opening = self._client.open(
            session, model, initial_state, checkpoint=checkpoint, priority=priority, max_wait_s=max_wait_s
        )
        opened = self.run(opening)
        return BlockingSession(self, opened)

    def models(self) -> dict[str, ModelSpec]:
        """See Client.models."""
        return self.run(self._client.models())

    def stop(self) -> None:
        """Give up whatever is still open, and end the thread."""
        try:
            self.run(self._client.stop())
        finally:
            self._end()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's event loop, and wait for it; one that takes too long is cancelled."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, self._timeout_s), self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "BlockingClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class BlockingSession:
    """`clients.session.Session`, blocking; `submit` still returns at once."""

    def __init__(self, client: BlockingClient, session: Session) -> None:
        self._client = client
        self._session = session
        self.name = session.name
        self.spec = session.spec

    @property
    def progress(self) -> int:
        """Timesteps whose outputs are here."""
        return self._session.progress

    def submit(self, x: ArrayLike) -> int:
        """See Session.submit."""
        return self._client.run(_call(self._session.submit, x))

    def wait(self, timestep: int | None = None) -> int:
        """See Session.wait."""
        return self._client.run(self._session.wait(timestep))

    def outputs(self) -> Iterator[Outputs]:
        """See Session.outputs; every item is waited for."""
        outputs = self._session.outputs()
        while (item := self._client.run(_next(outputs))) is not None:
            yield item

    def read(self) -> Outputs | None:
        """See Session.read."""
        return self._client.run(_call(self._session.read))

    def export(self) -> bytes:
        """See Session.export."""
        return self._client.run(self._session.export())

    def close(self) -> str:
        """See Session.close."""
        return self._client.run(self._session.close())

    def __enter__(self) -> "BlockingSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.run(self._session.__aexit__(kind, error, trace))


async def _call(function: Callable[..., T], *args: Any) -> T:
    """A plain call, on the event loop's thread."""
    return function(*args)


async def _next(outputs: AsyncIterator[Outputs]) -> Outputs | None:
    async for item in outputs:
        return item
    return None
