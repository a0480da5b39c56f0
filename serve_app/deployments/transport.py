"""How senders reach the directory and the owners on Ray."""

import pickle
from collections.abc import Awaitable
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.serve._private.common import RequestMetadata

from serve_app.config import DurabilityConfig
from serve_app.deployments.directory_actor import DirectoryActor
from serve_app.deployments.frame_channel import FrameChannel
from serve_app.directory import Claim, Grant, Owner, Record, Slab
from serve_app.errors import LockstepError, StateLost, Unavailable
from serve_app.ingress.outbox import Channel
from serve_app.spec import ModelSpec

NAMESPACE = "lockstep"
SERVE_NAMESPACE = "serve"
T = TypeVar("T")


class RayDirectory:
    """The directory of an application, from any process of the cluster (see hub.DirectoryClient)."""

    def __init__(self, app: str) -> None:
        options = {
            "name": f"directory:{app}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1,
        }
        self.actor: Any = ray.remote(DirectoryActor).options(**options).remote(app)

    async def open(
        self,
        session: str,
        sender: str,
        model: str | None,
        ended: dict[str, list[int]],
        *,
        resumable: bool = False,
        claim: Claim | None = None,
    ) -> Grant:
        """See DirectoryClient."""
        return await _result(self.actor.open.remote(session, sender, model, ended, resumable=resumable, claim=claim))

    async def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        """See DirectoryClient."""
        return await _result(self.actor.attach.remote(session, sender))

    async def release(self, session: str, epoch: int) -> None:
        """See DirectoryClient."""
        await _result(self.actor.release.remote(session, epoch))

    async def keep(self, sender: str, slab: Slab) -> dict[str, LockstepError]:
        """See DirectoryClient."""
        return await _result(self.actor.keep.remote(sender, slab))

    async def fetch(self, session: str) -> tuple[int, bytes]:
        """See DirectoryClient."""
        return await _result(self.actor.fetch.remote(session))

    async def lost(self, owner: str) -> None:
        """See DirectoryClient."""
        await _result(self.actor.lost.remote(owner))

    async def models(self) -> dict[str, ModelSpec]:
        """See DirectoryClient."""
        return await _result(self.actor.models.remote())

    async def register(self, owner: Owner, durability: DurabilityConfig) -> None:
        """Make an owner known, and where checkpoints are kept. Raises ConfigError where they cannot be."""
        await _result(self.actor.register.remote(owner, durability))

    async def unregister(self, owner: str) -> None:
        """The owner takes nothing any more."""
        await _result(self.actor.unregister.remote(owner))

    async def report(self, owner: str, ended: list[int]) -> bool:
        """Say that the owner is alive; False when it has to register again."""
        return await _result(self.actor.report.remote(owner, ended))

    async def lookup(self, session: str) -> Record:
        """Who holds a session."""
        return await _result(self.actor.lookup.remote(session))

    def connect(self, owner: Owner) -> Channel:
        """See DirectoryClient."""
        return FrameChannel(owner.address)


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


async def _result(reference: Awaitable[T]) -> T:
    """The result of an actor call; a LockstepError comes out as itself, a dead actor as Unavailable."""
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, LockstepError):
            raise error.cause from None
        raise
    except (ActorDiedError, RayActorError) as error:
        raise Unavailable(f"a part of Lockstep is gone: {error}") from error
