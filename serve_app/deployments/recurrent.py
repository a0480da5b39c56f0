"""A replica that owns sessions: an engine behind Serve calls."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import numpy as np
import ray
from ray import serve
from ray._private.worker import global_worker

from serve_app.config import AppConfig
from serve_app.deployments.frame_channel import frame_server
from serve_app.deployments.metrics import EngineMetrics
from serve_app.deployments.registration import News, Registration
from serve_app.deployments.transport import RayDirectory, ReplicaActor
from serve_app.directory import Owner
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.build import build_engine
from serve_app.engine.stats import StepRecord
from serve_app.errors import InvalidInput, LockstepError, UnknownSession
from serve_app.garbage import collect_seldom
from serve_app.ingress.hub import Hub
from serve_app.lease import Lease
from serve_app.policy.autoscaling import Load, LoadMeter, Scaling
from serve_app.policy.session_queue import QueueLimits
from serve_app.segment import Outputs, Segment

logger = logging.getLogger("ray.serve")

REPORT_PERIOD_S = 0.25
MAX_SEGMENTS = 256
MAX_BATCHES = 32


class Recurrent:
    """A replica takes frames at a port of its own; `open`, `segment`, `close` are for plain handle calls.

    Every replica is an owner: the directory places sessions at it, and tells senders its address. A plain handle call
    lands anywhere; it is brought to the replica where the session was opened, which sends to the owner.
    """

    async def __init__(self, config: AppConfig, models: tuple[str, ...]) -> None:  # type: ignore[misc]  # Serve awaits it
        """models: all that the application serves to sessions."""
        collect_seldom()
        self._parts = AsyncExitStack()  # what is to be ended with this replica, however far its start got
        context = serve.get_replica_context()
        self._actor_name = context.replica_id.to_full_id_str()
        self._engine = build_engine(config, owner=context.replica_id.unique_id)
        lease = Lease()
        self._serving = AsyncEngine(self._engine, config.engine.threads if config.engine.pin_threads else 0, lease)
        self._frames = frame_server(self._serving.frame)
        self._parts.push_async_callback(self._frames.stop)
        self._directory = RayDirectory(context.app_name)
        self._hub = Hub(self._directory, ack_on_receipt=False, sender=self._actor_name)
        self._parts.push_async_callback(self._hub.stop)
        self._parts.push_async_callback(self._serving.stop)  # while the last lease holds
        self._answering: Counter[str] = Counter()  # plain handle calls that wait, by session
        self._metrics = EngineMetrics(self._engine.spec.name)
        self._meter = LoadMeter(*self._engine.step_sizes, time.monotonic())
        session = config.session
        self._owner = Owner(
            name=self._engine.owner,
            address=await self._frames.start(ray.util.get_node_ip_address()),  # type: ignore[no-untyped-call]
            spec=self._engine.spec,
            limits=self._engine.limits,
            max_sessions=session.max_sessions,
            max_bytes=self._engine.max_frame_bytes,
            checkpoints=session.checkpoint_timesteps > 0,
            models=models,
            queue=QueueLimits(session.max_waiting, session.max_wait_s, session.default_priority),
            moves_per_s=session.moves_per_s,
            scaling=_scaling(config),
        )
        self._registration = Registration(self._directory, self._owner, config.durability, lease, self._serving.fence)
        await self._registration.register()
        self._ending = asyncio.Event()
        self._reporter = asyncio.create_task(self._report())
        self._parts.push_async_callback(self._end_reports)

    async def open(self, session: str | None = None, model: str | None = None) -> str:
        """Open a session for plain handle calls, of this deployment's model unless another is named; returns its id."""
        return (await self._hub.open(session, model or self._engine.spec.name)).name

    async def segment(self, segment: Segment) -> Outputs:
        """Run one segment of a session opened with `open`; returns its outputs.

        `segment.start` says that the caller holds the outputs below it; a resend of the last segment is answered again.
        """
        return _raised(await self._gather(segment))

    async def close(self, session: str) -> int:
        """End a session when all its segments have run; returns the timestep at which it ended."""
        try:
            closing = self._hub.get(session)
        except UnknownSession:
            return int(await self._forward(session, "close", session))
        closing.close()
        await closing.closed()
        closing.ack(closing.progress)
        return closing.progress

    async def segments(self, segments: list[Segment]) -> list[Outputs | LockstepError]:
        """Many calls of `segment`; an error is returned in the place of its outputs."""
        return await asyncio.gather(*(_caught(self._one(segment)) for segment in segments))

    def stats(self) -> dict[str, float]:
        """This replica's counters since its start, and how full it is."""
        stats = self._engine.stats
        counted = {name: getattr(stats, name) for name in ("segments", "timesteps", "steps", "session_steps")}
        return {**counted, **self._engine.gauges()}

    def check_health(self) -> None:
        """Raise when the engine has died, or what reports of it: Serve then replaces this replica."""
        self._serving.check_health()
        if self._reporter.done():
            self._reporter.result()

    async def __del__(self) -> None:
        await self._parts.aclose()

    @serve.batch(max_batch_size=MAX_SEGMENTS, batch_wait_timeout_s=0, max_concurrent_batches=MAX_BATCHES)
    async def _gather(self, segments: list[Segment]) -> list[Any]:
        """All segments that arrive together start together, and so share a frame."""
        return await self.segments(segments)

    async def _one(self, segment: Segment) -> Outputs:
        _check(segment)
        try:
            session = self._hub.get(segment.session)
        except UnknownSession:
            (result,) = await self._forward(segment.session, "segments", [segment])
            return _raised(result)
        end = session.submit(segment.x, segment.start)
        start = end - len(segment.x)
        if self._answering[session.name] == 0:  # or an earlier call could lose what it waits for
            session.ack(min(start, session.progress))
        self._answering[session.name] += 1
        try:
            await session.wait(end)
        finally:
            self._answering[session.name] -= 1
            if not self._answering[session.name]:
                del self._answering[session.name]
        outputs = session.peek(start)
        if outputs is None or outputs.start > start:
            raise InvalidInput(
                f"outputs of session {session.name!r} from timestep {start} on were acknowledged and are gone"
            )
        return Outputs(start, {name: value[: end - start] for name, value in outputs.values.items()}, outputs.timing)

    async def _forward(self, session: str, method: str, *args: Any) -> Any:
        """Call the replica where the session was opened. Raises UnknownSession when that is not another one."""
        record = await self._directory.lookup(session)
        if record.sender == self._actor_name or "#" not in record.sender:
            raise UnknownSession(f"session {session!r} was not opened by a plain handle call: use its own client")
        return await ReplicaActor(record.sender).call(method, *args)

    async def _report(self) -> None:
        """Tell the directory what has ended, which renews the lease, and the dashboard how things are.

        A replica that is to stop gives its sessions back without being asked: `__del__` comes when no handle call is
        left, which may be never, and then Serve kills the replica without it.
        """
        while not (self._ending.is_set() or _is_stopping()):
            try:
                self._serving.give_back(await self._renew())
            except LockstepError as error:
                logger.warning("the directory does not answer, trying again: %s", error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), REPORT_PERIOD_S)
        try:
            await self._registration.hand_over(lambda: self._engine.num_sessions, self._serving.give_back, self._renew)
        except LockstepError as error:
            logger.warning("the directory does not answer, all sessions go at once: %s", error)
        try:
            await self._registration.leave()
        finally:
            await self._serving.stop()

    async def _end_reports(self) -> None:
        self._ending.set()
        await self._reporter

    async def _renew(self) -> int:
        """How many sessions are to go on elsewhere. Raises Unavailable."""
        stats = self._engine.stats
        load = self._measure(stats.take_recent())
        return await self._registration.renew(News(stats.take_taken(), stats.take_ended()), dict(stats.ends), load)

    def _measure(self, steps: Sequence[StepRecord]) -> Load:
        """Bring metrics up to date with the last steps; what there is to do now."""
        now = time.monotonic()
        sizes = np.array([(step.batch_size, step.timesteps, step.alone_s) for step in steps])
        self._meter.add(sizes, self._serving.idle_s, self._engine.longest_wait_s(now), now)
        load = self._meter.load(self._engine.num_sessions)
        self._metrics.publish(self._engine, steps, load)
        return load


def _scaling(config: AppConfig) -> Scaling | None:
    if (found := config.autoscaling) is None:
        return None
    return Scaling(
        found.min_replicas, found.max_replicas, found.target_sessions, found.target_load, found.max_queue_delay_s
    )


def _is_stopping() -> bool:
    """Whether Serve has told this replica to stop. It has no public way to ask."""
    stopping: bool = global_worker.actors[global_worker.actor_id]._replica_impl._shutting_down
    return stopping


def _check(segment: Segment) -> None:
    """Raise InvalidInput for what is of another type than it should be; what else may be wrong, its session says."""
    x, start = segment.x, segment.start
    if not isinstance(x, np.ndarray):
        raise InvalidInput(f"a segment whose x is a {type(x).__name__} arrived: make it a numpy array")
    if not isinstance(start, int | None):
        raise InvalidInput(f"a segment whose start is {start!r} arrived: make it an int, or leave it out")


def _raised(result: Outputs | LockstepError) -> Outputs:
    """The inverse of `_caught`."""
    if isinstance(result, LockstepError):
        raise result
    return result


async def _caught(work: Coroutine[Any, Any, Outputs]) -> Outputs | LockstepError:
    try:
        return await work
    except LockstepError as error:
        return error
    except Exception:  # costs this caller only, not the others whose segments came with this
        logger.exception("a segment failed")
        return LockstepError("an unexpected error: the server's log has it")
