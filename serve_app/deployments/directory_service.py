"""The session directory and its store of checkpoints."""

import asyncio
import logging
import math
import pickle
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import ray

from serve_app import lease
from serve_app.checkpoint import decode_checkpoint
from serve_app.checkpoint_store import CheckpointStore, key_of, open_store
from serve_app.config import DurabilityConfig
from serve_app.deployments.directory_metrics import DirectoryMetrics
from serve_app.deployments.messages import PICKLED, CallServer, Codec, is_listening
from serve_app.deployments.registration import News, Standing
from serve_app.directory import Ahead, Ask, Described, Directory, Grant, Owner, Record, SessionStatistics, Slab
from serve_app.errors import LockstepError, StateLost, Unavailable
from serve_app.policy.autoscaling import IDLE, Load
from serve_app.spec import ModelSpec
from serve_app.wire import Parts

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
PUBLISH_EVERY_S = 1.0
MAX_OWNERS = 1024


class Report(NamedTuple):
    """See Registry.report."""

    owner: str
    news: News
    ends: dict[str, int]
    load: Load


Question = Sequence[Ask] | Ahead | Report
"""What is asked many times a second, and so straight: sessions are to open, now or soon, an owner reports."""
Reply = Sequence[Grant | LockstepError] | Standing


def _encode_reply(reply: Reply | LockstepError) -> Parts:
    """Owners as they were pickled once: there are few, and that takes longer than all else."""
    if isinstance(reply, LockstepError | Standing):
        return PICKLED.encode_reply(reply)
    short = [(each.session, each.epoch, _pickled(each.owner)) if isinstance(each, Grant) else each for each in reply]
    return PICKLED.encode_reply(short)


def _decode_reply(data: memoryview) -> Reply | LockstepError:
    reply: Any = PICKLED.decode_reply(data)
    if isinstance(reply, LockstepError | Standing):
        return reply
    return [Grant(each[0], each[1], _unpickled(each[2])) if isinstance(each, tuple) else each for each in reply]


_owners: dict[int, tuple[Owner, bytes]] = {}


def _pickled(owner: Owner) -> bytes:
    known = _owners.get(id(owner))
    if known is None:
        if len(_owners) == MAX_OWNERS:
            _owners.clear()
        known = _owners[id(owner)] = owner, pickle.dumps(owner)
    return known[1]


@lru_cache(MAX_OWNERS)
def _unpickled(data: bytes) -> Owner:
    owner: Owner = pickle.loads(data)
    return owner


STRAIGHT: Codec[Question, Reply] = Codec(PICKLED.encode, PICKLED.decode, _encode_reply, _decode_reply)


class DirectoryService:
    """Of one application. What the directory decides it decides at once; the store is used beside that, in order."""

    def __init__(self, app: str, is_listening: Callable[[str], Awaitable[bool]] = is_listening) -> None:
        """is_listening: whether anybody takes calls at an owner's address, as far as can be told."""
        self._app = app
        self._is_listening = is_listening
        self._directory = Directory(time.time_ns() // 10**7, lease.now())  # none starts twice in 10 ms
        self._durability: DurabilityConfig | None = None
        self._store: CheckpointStore | None = None
        self._storing = asyncio.Lock()
        self._listening: asyncio.Task[str] | None = None
        self._drops: set[asyncio.Task[None]] = set()
        self._metrics = DirectoryMetrics()
        self._published_at = -math.inf
        #: Of owners.
        self.num_reports = 0

    async def register(self, owner: Owner, durability: DurabilityConfig) -> int:
        """See Registry, Directory.register; first, open the store unless it is open. A new actor learns of it so."""
        async with self._storing:
            if durability != self._durability:
                folder = quote(self._app, safe="")
                store = await asyncio.to_thread(open_store, durability.store, folder, durability.max_bytes)
                self._store, self._durability = store, durability
                self._directory.found(store.keys(), durability.keep_s, lease.now())
        self._directory.tick(lease.now())
        self._directory.register(owner)
        return self._directory.incarnation

    async def retire(self, owner: str) -> bool:
        """See Directory.retire."""
        return self._directory.retire(owner)

    async def unregister(self, owner: str) -> None:
        """See Directory.unregister."""
        self._directory.unregister(owner)

    async def address(self) -> str:
        """Where `open` and `report` can be asked straight, without Ray (see RayDirectory)."""
        if self._listening is None:
            host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            self._listening = asyncio.create_task(CallServer(STRAIGHT, self._answer).start(host))
        return await self._listening

    async def _answer(self, question: Question) -> Reply:
        if isinstance(question, Report):
            return await self.report(*question)
        return await (self.open_ahead(question) if isinstance(question, Ahead) else self.open(question))

    async def open(self, asks: Sequence[Ask]) -> list[Grant | LockstepError]:
        """See Directory.open; what each ask is granted, or why it is not. First, hear what is lost or has ended."""
        self._directory.tick(lease.now())
        for owner in {ask.lost: None for ask in asks if ask.lost}:
            await self.lost(owner)
        return [await self._open(ask) for ask in asks]

    async def open_ahead(self, ask: Ahead) -> list[Grant]:
        """See Directory.open_ahead."""
        self._directory.tick(lease.now())
        self._directory.unused(ask.unused)
        self._end(ask.ended)
        return self._directory.open_ahead(ask.sender, ask.model, ask.places) if ask.places else []

    async def attach(self, session: str, sender: str) -> tuple[Grant, int]:
        """See Directory.attach."""
        await self._recall([session])
        return self._directory.attach(session, sender)

    async def release(self, session: str, epoch: int) -> None:
        """See Directory.release."""
        self._directory.release(session, epoch)

    async def lookup(self, session: str) -> Record:
        """See Directory.lookup."""
        return self._directory.lookup(session)

    async def describe(self, session: str) -> Described:
        """See Directory.describe."""
        await self._recall([session])
        return self._directory.describe(session)

    async def sessions(self, after: str, limit: int) -> list[Described]:
        """See Directory.sessions."""
        return self._directory.sessions(after, limit)

    async def drop(self, session: str) -> Grant | None:
        """End a session that waits to be resumed, or say under which grant its owner is to. Raises UnknownSession."""
        await self._recall([session])
        grant = self._directory.grant_of(session)
        if grant is None:
            self._drop(self._directory.drop_waiting(session))
        return grant

    async def migrate(self, session: str, to: str | None) -> Grant:
        """See Directory.migrate."""
        await self._recall([session])
        return self._directory.migrate(session, to)

    async def report(self, owner: str, news: News, ends: dict[str, int], load: Load = IDLE) -> Standing:
        """See Registry."""
        self.num_reports += 1
        self._directory.tick(now := lease.now())
        self._directory.taken(owner, news.taken)
        self._drop(self._directory.ended(owner, news.ended))
        self._directory.tell(owner, ends, load)
        self._drop(self._directory.expire(now))
        if now - self._published_at > PUBLISH_EVERY_S:
            self._published_at = now
            self._metrics.publish(self._directory.statistics(), self._directory.num_moved())
        is_known = self._directory.heard(owner)
        return Standing(self._directory.incarnation, is_known, self._directory.give_back(owner))

    async def wanted_replicas(self, model: str, target: int) -> int:
        """See Directory.wanted_replicas."""
        self._directory.tick(lease.now())
        return self._directory.wanted_replicas(model, target)

    async def lost(self, owner: str) -> None:
        """A sender cannot reach the owner, which is given up if that is so of everybody; else when its lease is over.

        Meanwhile whoever sent to a session there, and so is the only one to hear of it, goes on with it elsewhere.
        """
        address = self._directory.address_of(owner)
        if address is not None and not await self._is_listening(address):
            self._directory.unregister(owner)
        self._directory.suspect(owner)

    async def gone(self, owners: Sequence[str]) -> list[str]:
        """See Directory.gone."""
        self._directory.tick(lease.now())
        return self._directory.gone(owners)

    async def models(self) -> dict[str, ModelSpec]:
        """See Directory.models."""
        self._directory.tick(lease.now())
        return self._directory.models()

    async def statistics(self) -> dict[str, SessionStatistics]:
        """See Directory.statistics."""
        self._directory.tick(lease.now())
        return self._directory.statistics()

    async def unloaded(self) -> dict[str, bool]:
        """See Directory.unloaded."""
        return self._directory.unloaded()

    async def load(self, model: str) -> None:
        """See Directory.load."""
        self._directory.load(model)

    async def unload(self, model: str, *, gone: bool) -> None:
        """See Directory.unload."""
        self._directory.unload(model, gone=gone)

    async def num_sessions(self) -> dict[str, int]:
        """See Directory.num_sessions."""
        return self._directory.num_sessions()

    async def keep(self, sender: str, slab: Slab) -> dict[str, LockstepError]:
        """Keep checkpoints; of which sessions none was, and why. Raises Unavailable when the store takes none now."""
        await self._recall(slab)
        refused = self._directory.keep(sender, {session: held for session, (held, _) in slab.items()})
        taken = {session: one for session, one in slab.items() if session not in refused}
        keys = {key_of(session): session for session in taken}
        records = {key: taken[session][1] for key, session in keys.items()}
        unkept = await self._stored(lambda store: store.keep(records))
        refused |= {keys[key]: error for key, error in unkept.items()}
        kept = {session: held for session, (held, _) in taken.items() if session not in refused}
        self._drop(self._directory.has_kept(kept, lease.now()))
        return refused

    async def fetch(self, session: str) -> tuple[int, bytes]:
        """The checkpoint of a session that has no owner, and the epoch to claim it by. See Directory.restorable."""
        await self._recall([session])
        epoch = self._directory.restorable(session)
        return epoch, await self._stored(lambda store: store.get(key_of(session)))

    async def _open(self, ask: Ask) -> Grant | LockstepError:
        self._end(ask.ended)
        try:
            if ask.claim is not None:
                await self._recall([ask.session])
            return self._directory.open(
                ask.session, ask.sender, ask.model,
                resumable=ask.resumable, claim=ask.claim, turn=ask.turn, waited_s=ask.waited_s,
            )  # fmt: skip
        except LockstepError as error:
            return error

    def _end(self, ended: Mapping[str, Collection[int]]) -> None:
        for owner, epochs in ended.items():
            self._drop(self._directory.ended(owner, epochs))

    async def _recall(self, sessions: Iterable[str]) -> None:
        """Learn from the store of sessions that an earlier directory has known."""
        keys = {key_of(session): session for session in self._directory.unknown(sessions)}
        records = await self._stored(lambda store: store.find(keys)) if keys else {}
        for key, record in records.items():
            try:
                self._directory.recall(keys[key], decode_checkpoint(record, keys[key]).epoch)
            except StateLost as error:
                logger.warning("a checkpoint cannot be used: %s", error)

    async def _stored(self, work: Callable[[CheckpointStore], T]) -> T:
        """Do something with the store, after all that was to be done before; the directory goes on meanwhile."""
        async with self._storing:
            if self._store is None:
                raise Unavailable("no replica is ready: try again in a moment")
            return await asyncio.to_thread(work, self._store)

    def _drop(self, keys: Collection[str]) -> None:
        if keys:
            drop = asyncio.get_running_loop().create_task(self._try_drop(keys))
            self._drops.add(drop)
            drop.add_done_callback(self._drops.discard)

    async def _try_drop(self, keys: Collection[str]) -> None:
        try:
            await self._stored(lambda store: store.drop(keys))
        except LockstepError as error:
            logger.warning("checkpoints of sessions that are over stay in the store for now: %s", error)
