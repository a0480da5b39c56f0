"""How senders reach the directory and the owners on Ray."""

import asyncio
import logging
import pickle
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import uuid4

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private.state import actors
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.serve._private.common import ReplicaID, RequestMetadata

from serve_app.config import DurabilityConfig
from serve_app.deployments.autoscaling import NAMES
from serve_app.deployments.directory_process import DirectoryProcess, Elsewhere
from serve_app.deployments.directory_service import STRAIGHT, DirectoryService, Question, Reply, Report
from serve_app.deployments.frame_channel import FrameChannel
from serve_app.deployments.messages import CallChannel
from serve_app.deployments.registration import News, Standing
from serve_app.directory import Ahead, Ask, Described, Grant, Owner, Record, SessionStatistics, Slab
from serve_app.errors import LockstepError, StateLost, Unavailable
from serve_app.ingress.outbox import Channel
from serve_app.ingress.together import Together
from serve_app.policy.autoscaling import IDLE, Load
from serve_app.rows import BatchedSpec, RowsRequest, RowsResult
from serve_app.spec import ModelSpec

NAMESPACE = "lockstep"
SERVE_NAMESPACE = "serve"
RETRY_S = 1.0
ANSWER_WITHIN_S = 2.0
P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger("ray.serve")


class Gone(Unavailable):
    """An actor is gone, or starts again."""


class RayDirectory:
    """The directory of an application, from any process of the cluster (see hub.DirectoryClient)."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._processes = _processes(app)
        self._straight: CallChannel[Question, Reply] | None = None
        self._straightening = asyncio.Lock()
        self._opens = Together(self._ask_for_grants)
        self._losses = Together(self._lose_all)

    def open(self, ask: Ask) -> Awaitable[Grant]:
        """See DirectoryClient."""
        return self._opens.call(ask)

    async def open_ahead(self, ask: Ahead) -> Sequence[Grant]:
        """See DirectoryClient."""
        grants = await self._ask_for_grants(ask)
        return [grant for grant in grants if isinstance(grant, Grant)]

    async def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.attach, session, sender)

    async def release(self, session: str, epoch: int) -> None:
        """See DirectoryClient."""
        await self.ask(DirectoryService.release, session, epoch)

    async def keep(self, sender: str, slab: Slab) -> dict[str, LockstepError]:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.keep, sender, slab)

    async def fetch(self, session: str) -> tuple[int, bytes]:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.fetch, session)

    async def lost(self, owner: str) -> None:
        """See DirectoryClient."""
        await self._losses.call(owner)

    async def gone(self, owners: Sequence[str]) -> list[str]:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.gone, owners)

    async def is_down(self) -> bool:
        """See Registry: the cluster's own table says so of both processes."""
        processes = tuple(self._processes)  # which calls that come back meanwhile put into another order
        return all([await asyncio.to_thread(_is_dead, process) for process in processes])

    async def describe(self, session: str) -> Described:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.describe, session)

    async def sessions(self, after: str, limit: int) -> list[Described]:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.sessions, after, limit)

    async def drop(self, session: str) -> Grant | None:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.drop, session)

    async def migrate(self, session: str, to: str | None) -> Grant:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.migrate, session, to)

    async def models(self) -> dict[str, ModelSpec]:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.models)

    async def statistics(self) -> dict[str, SessionStatistics]:
        """See DirectoryClient."""
        return await self.ask(DirectoryService.statistics)

    async def register(self, owner: Owner, durability: DurabilityConfig) -> int:
        """See Registry. Raises ConfigError where checkpoints cannot be kept as configured."""
        return await self.ask(DirectoryService.register, owner, durability)

    async def retire(self, owner: str) -> bool:
        """See Registry."""
        return await self.ask(DirectoryService.retire, owner)

    async def unregister(self, owner: str) -> None:
        """The owner takes nothing any more."""
        await self.ask(DirectoryService.unregister, owner)

    async def unloaded(self) -> dict[str, bool]:
        """See Directory.unloaded."""
        return await self.ask(DirectoryService.unloaded)

    async def load(self, model: str) -> None:
        """See Directory.load."""
        await self.ask(DirectoryService.load, model)

    async def unload(self, model: str, *, gone: bool = False) -> None:
        """See Directory.unload."""
        await self.ask(DirectoryService.unload, model, gone=gone)

    async def report(self, owner: str, news: News, ends: dict[str, int], load: Load = IDLE) -> Standing:
        """See Registry."""
        try:
            standing = await self._ask_straight(Report(owner, news, ends, load))
        except OSError:  # the other process may have the directory by now
            return await self.ask(DirectoryService.report, owner, news, ends, load)
        assert isinstance(standing, Standing)
        return standing

    async def lookup(self, session: str) -> Record:
        """Who holds a session."""
        return await self.ask(DirectoryService.lookup, session)

    async def ask(
        self, method: Callable[Concatenate[DirectoryService, P], Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a method in the process where the directory is. Raises what it does, Unavailable where it is in none."""
        failure: LockstepError | None = None
        for process in tuple(self._processes):
            try:
                answer: Awaitable[T] = process.ask.remote(method.__name__, *args, **kwargs)
                return await _result(answer)
            except (Elsewhere, Gone) as error:
                failure = error
                if self._processes[0] is process:
                    self._processes.rotate()
        if failure is not None and isinstance(failure.__cause__, ActorDiedError):
            self._processes = _processes(self._app)  # they ended while the application was deleted and deployed anew
        raise Unavailable("the directory starts: try again in a moment") from failure

    def connect(self, owner: Owner) -> Channel:
        """See DirectoryClient."""
        return FrameChannel(owner.address)

    async def close(self) -> None:
        """Nothing is asked for any more."""
        await self._opens.stop()
        await self._losses.stop()
        if self._straight is not None:
            await self._straight.close()

    async def _ask_for_grants(self, asks: Sequence[Ask] | Ahead) -> Sequence[Grant | LockstepError]:
        try:
            found = await self._ask_straight(asks)
        except OSError as error:
            raise Unavailable(f"the directory does not answer: {error!r}") from error
        assert not isinstance(found, Standing)
        return found

    async def _ask_straight(self, question: Question) -> Reply:
        """At the directory's own port: a call through Ray costs more than a few timesteps do. Raises OSError."""
        if self._straight is None or self._straight.is_lost:
            async with self._straightening:
                if self._straight is None or self._straight.is_lost:
                    self._straight = CallChannel(STRAIGHT, await self.ask(DirectoryService.address))
        return await self._straight.call(question)

    async def _lose_all(self, owners: Sequence[str]) -> Sequence[None]:
        for owner in dict.fromkeys(owners):
            await self.ask(DirectoryService.lost, owner)
        return [None] * len(owners)


class ReplicaActor:
    """One replica of a Serve deployment, addressed as the actor it is: no router could send the call elsewhere.

    `address` is the actor's name. This is how Serve's own handles call their
    replicas; it is no public interface, so the version of Ray is pinned.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._actor: Any = None

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of the deployment's class there. Raises what it raises, StateLost when the replica is gone."""
        try:
            if self._actor is None:
                self._actor = ray.get_actor(self._address, namespace=SERVE_NAMESPACE)
            metadata = RequestMetadata(request_id=uuid4().hex, internal_request_id=uuid4().hex, call_method=method)
            return await _result(self._actor.handle_request.remote(pickle.dumps(metadata), *args))
        except (ValueError, Unavailable) as error:
            raise StateLost(f"replica {self._address!r} is gone, and its sessions with it ({error})") from error


class OtherReplicas:
    """The other replicas of a deployment, by the names that Serve gives to their actors (see ingress.siblings)."""

    def __init__(self, own: ReplicaID, method: str) -> None:
        """method: of the deployment's class; it takes the question."""
        self._own, self._method = own.to_full_id_str(), method
        self._prefix = self._own.removesuffix(own.unique_id)
        self._actors: dict[str, ReplicaActor] = {}

    async def ask(self, question: Any) -> list[Any]:
        """See Siblings."""
        found = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = {each["name"] for each in found if each["namespace"] == SERVE_NAMESPACE} - {self._own}
        self._actors = {
            name: self._actors.get(name) or ReplicaActor(name) for name in names if name.startswith(self._prefix)
        }
        answers = await asyncio.gather(*(self._ask(name, actor, question) for name, actor in self._actors.items()))
        return [answer for some in answers for answer in some]

    async def _ask(self, name: str, actor: ReplicaActor, question: Any) -> list[Any]:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return [await actor.call(self._method, question)]
        except (LockstepError, RayError, TimeoutError) as error:  # it starts, stops, or stands still
            logger.warning("replica %r does not answer, the others go on without: %r", name, error)
            return []


class BatchedHandles:
    """The stateless models of an application, by their handles (see ingress.batched.BatchedModels)."""

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = handles
        self._specs: dict[str, BatchedSpec | None] = {name: None for name in handles}
        self._asking = [asyncio.create_task(self._ask(name)) for name in handles]

    def specs(self) -> Mapping[str, BatchedSpec | None]:
        """See BatchedModels."""
        return self._specs

    async def infer(self, model: str, request: RowsRequest) -> RowsResult:
        """See BatchedModels: at whichever replica has the least to do."""
        return await _result(self._handles[model].run.remote(request))

    async def stop(self) -> None:
        """Ask no more."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _ask(self, name: str) -> None:
        """Learn what a model takes, as soon as one of its replicas is there."""
        while self._specs[name] is None:
            try:
                self._specs[name] = await _result(self._handles[name].describe.remote())
            except Exception as error:
                logger.warning("model %r does not say what it takes, trying again: %s", name, error)
                await asyncio.sleep(RETRY_S)


async def _result(reference: Awaitable[T]) -> T:
    """The result of an actor call; a LockstepError comes out as itself, one of Ray (a dead actor, mostly) as Gone."""
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, LockstepError):
            raise error.cause from None
        raise
    except RayError as error:
        raise Gone(f"a part of Lockstep is gone: {error}") from error


def _processes(app: str) -> deque[Any]:
    """Both of the directory, which are started unless they are there."""
    options = {
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": {HEAD_NODE_RESOURCE_NAME: 0.001},  # where Serve's controller is, and replicas seldom are
        "max_restarts": -1,
    }
    actor, names = ray.remote(DirectoryProcess), [name.format(app) for name in NAMES]
    return deque(actor.options(name=name, **options).remote(app, names, NAMESPACE) for name in names)


def _is_dead(actor: Any) -> bool:
    found = actors(actor._actor_id.hex())
    return bool(found) and found["State"] in ("RESTARTING", "DEAD")
