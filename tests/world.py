"""A whole Lockstep in which all that happens is one of a list of events, and whoever uses it chooses the next.

Clients, ingresses, owners and the directory are the real ones (WebSocketCarrier, converse, Hub, Engine,
DirectoryService), each a process of its own; what goes from one to another is a message that lies there until its
delivery is chosen. The event loop has no clock and no threads but those here: the same events lead to the same world.
"""

import asyncio
import heapq
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosedError

from clients import websocket
from serve_app import directory, lease
from serve_app.checkpoint_store import MemoryStore, key_of
from serve_app.config import AppConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.deployments.directory_service import DirectoryService
from serve_app.deployments.registration import News, Registration
from serve_app.directory import Ask, Directory, Grant, Owner
from serve_app.engine.engine import Engine
from serve_app.errors import LockstepError, StateLost, StepFailed, Unavailable
from serve_app.frame import Answer, Frame
from serve_app.ingress.hub import Hub
from serve_app.ingress.websocket import converse
from serve_app.lease import LEASE_S, MARGIN_S, Lease
from serve_app.session import Session
from serve_app.wire import decode_frame, decode_reply, encode_frame, encode_reply
from tests.fakes import SumModel

CONFIG = AppConfig(
    engine=EngineConfig(device="cpu", slots=2, max_batch_size=2, max_step_timesteps=2),
    session=SessionConfig(
        max_sessions=8, max_segment_timesteps=4, max_window_timesteps=4, checkpoint_timesteps=2, checkpoint_apart_s=0
    ),
    frame=FrameConfig(answer_within_s=10.0),
)
SEGMENT = 2
MAX_EVENTS = 600
SOON_S = 1.0
DIRECTORY = "directory"
TIME_PASSES = "time passes"


async def nobody_watches(carrier: websocket.WebSocketCarrier, session: Session) -> None:
    """That a client gives its connection up is an event of its own."""


class Violation(AssertionError):
    """Something that must never be."""


class Loop(asyncio.AbstractEventLoop):
    """Runs what is ready until nothing is; time passes when it is told to."""

    def __init__(self, in_thread: Callable[[Callable[[], Any]], asyncio.Future[Any]]) -> None:
        self.now = 0.0
        self.tasks: list[asyncio.Task[Any]] = []
        self.errors: list[str] = []
        self._in_thread = in_thread
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[asyncio.TimerHandle] = []

    def run(self) -> None:
        asyncio._set_running_loop(self)
        try:
            while self._ready:
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
        finally:
            asyncio._set_running_loop(None)

    @property
    def next_timer(self) -> float | None:
        while self._timers and self._timers[0].cancelled():
            heapq.heappop(self._timers)
        return self._timers[0].when() if self._timers else None

    def advance(self, now: float) -> None:
        self.now = now
        while (at := self.next_timer) is not None and at <= now:
            self._ready.append(heapq.heappop(self._timers))

    def end(self) -> None:
        """Cancel what still waits."""
        while live := [task for task in self.tasks if not task.done()]:
            for task in live:
                task.cancel()
            self.run()

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, handle)
        return handle

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(coro, loop=self, context=context)
        self.tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        return self._in_thread(partial(func, *args))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if "never retrieved" not in context["message"]:
            self.errors.append(f"{context['message']}: {context.get('exception')!r}")


class Message:
    """On its way from one process to another. Of those with the same `order` the first goes first."""

    def __init__(self, world: "World", source: str, to: str, what: str, act: Callable[[], None], order: Any) -> None:
        self.source, self.to, self.act, self.order = source, to, act, order
        world.counts[source] += 1
        self.key = hash((world.past.get(source, 0), world.counts[source], source))
        self.clock = world.clocks[source] + 1
        world.counts[what, source, to] += 1
        self.name = f"{what} {world.counts[what, source, to]} {source} > {to}"


class Call:
    """A message that is answered, unless whoever made it has given it up before."""

    def __init__(self, world: "World", source: str, to: str, what: str, work: Callable[["Call"], None], error: Any):
        self.world, self.source, self.to, self.error = world, source, to, error
        self.future = world.loop.create_future()
        order = (source, to) if to == DIRECTORY else None
        self.message = world.send(source, to, what, lambda: work(self), order)
        self.is_open, self.answered = True, self.message
        world.calls[self.message.name] = self

    def answer(self, value: Any) -> None:
        if self.is_open:
            self.is_open = False
            what = f"answer to {self.message.name}:"
            self.answered = self.world.send(self.to, self.source, what, lambda: self.resolve(value))

    def resolve(self, value: Any) -> None:
        if self.world.calls.pop(self.message.name, None) and not self.future.done():  # it may have been cancelled
            if isinstance(value, Exception):
                self.future.set_exception(value)
            else:
                self.future.set_result(value)


class World:
    """`events` are those that can happen now, the usual one first; `do` lets one happen."""

    def __init__(self, num_clients: int = 2, num_segments: int = 3) -> None:
        self.past: dict[str, int] = {}  # of each process, all that has happened to it
        self.clocks: Counter[str] = Counter()
        self.counts: Counter[Any] = Counter()
        self.trace: list[str] = []
        self.pending: dict[str, Message] = {}
        self.calls: dict[str, Call] = {}
        self.loop = Loop(self._in_thread)
        self.acting = ""
        self.kept: set[str] = set()  # keys of sessions of which a checkpoint has ever been kept
        self.store = MemoryStore(2**20)
        self.directories = 0
        self.fenced: dict[str, set[int]] = {}  # epochs of sessions that owners have no lease for any more
        websocket.connect = self.connect  # type: ignore[attr-defined]
        websocket.WebSocketCarrier._watch = nobody_watches  # type: ignore[method-assign]
        lease.now = lambda: self.loop.now
        directory.SETTLED_S = 0.0  # sessions move as often as they can
        with torch.inference_mode():
            self.actor = self._new_directory()
            self.owners = {name: Replica(self, name) for name in ("owner-0", "owner-1")}
            self.ingresses = {name: Ingress(self, name) for name in ("ingress-0", "ingress-1")}
            for owner in self.owners.values():
                self.actor._directory.register(owner.card)
                owner.renew()
                owner.registration._incarnation = self.directories
            self.clients = {f"client-{i}": Client(self, f"client-{i}", i, num_segments) for i in range(num_clients)}
            self.loop.run()

    # What can happen.

    def events(self) -> list[str]:
        usual = [f"submit {name}" for name, client in self.clients.items() if client.may_submit]
        usual += [f"close {name}" for name, client in self.clients.items() if client.may_close]
        usual += self._deliveries()
        usual += [f"step {name}" for name, owner in self.owners.items() if owner.may_step]
        usual += [f"report {name}" for name, owner in self.owners.items() if owner.may_report]
        usual += [f"give up {name}" for name, call in self.calls.items() if self._is_stuck(call)]
        usual += [f"wake {name}" for name, owner in self.owners.items() if owner.is_stopped]
        timer = self.loop.next_timer
        if not usual or (timer is not None and timer <= self.loop.now + SOON_S):
            usual.append(TIME_PASSES)
        return usual

    def faults(self) -> list[str]:
        found = [f"kill {name}" for name in [*self.owners, *self.ingresses]]
        found.append(f"restart {DIRECTORY}")
        for name, owner in self.owners.items():
            if not owner.is_stopped and not owner.is_leaving:
                found += [f"stop {name}", f"sleep {name}", f"drain {name}", f"rebalance {name}"]
                found += [f"fail {name}"] * (not owner.model.fails)
        for name, client in self.clients.items():
            if client.connection is not None:
                found += [f"break {name}", f"migrate {name}"]
        others = [name for name, call in self.calls.items() if call.to in self.owners and not self._is_stuck(call)]
        return found + [f"give up {name}" for name in others]

    @property
    def is_over(self) -> bool:
        return all(client.is_over for client in self.clients.values())

    def _deliveries(self) -> list[str]:
        found, seen = [], set()
        for message in sorted(self.pending.values(), key=lambda message: message.clock):
            if message.order is not None and message.order in seen:
                continue
            seen.add(message.order)
            if message.to == "ingress":
                last = self.clients[message.source].last_ingress
                found += [f"{message.name} {name}" for name in sorted(self.ingresses, key=lambda name: name == last)]
            elif (owner := self.owners.get(message.to)) is None or not owner.is_stopped:
                found.append(message.name)
        return found

    def _is_stuck(self, call: Call) -> bool:
        return call.is_open and call.to in self.owners and self.owners[call.to].is_stopped

    def after(self, event: str) -> int:
        """What `state` will be after an event, without doing it."""
        touched = self._touched(event)
        return hash(frozenset({**self.past, **touched}.items()))

    @property
    def state(self) -> int:
        """The same for worlds in which the same has happened to each process, in whatever order between them."""
        return hash(frozenset(self.past.items()))

    def _touched(self, event: str) -> dict[str, int]:
        process, what = self._what(event)
        names = [process] if process else [*self.clients, *self.ingresses, *self.owners, DIRECTORY]
        return {name: hash((self.past.get(name, 0), what)) for name in names}

    def _what(self, event: str) -> tuple[str, Any]:
        """To which process something happens, and what."""
        if event in self.pending:
            return self.pending[event].to, self.pending[event].key
        name, _, last = event.rpartition(" ")
        if name in self.pending:
            return last, self.pending[name].key
        if event.startswith("give up "):
            call = self.calls[event.removeprefix("give up ")]
            return call.source, ("give up", call.message.key)
        return ("", event) if event == TIME_PASSES else (last, event)

    def do(self, event: str) -> None:
        self.trace.append(event)
        process, _ = self._what(event)
        self.past |= self._touched(event)
        self.acting = process
        with torch.inference_mode():
            self._happen(event)
            self.loop.run()
        self.kept |= self.actor._directory._kept
        for client in self.clients.values():
            client.look()
        if self.loop.errors:
            raise Violation(self.loop.errors[0])

    def _happen(self, event: str) -> None:
        name, _, last = event.rpartition(" ")
        if event in self.pending:
            message = self.pending.pop(event)
            self.clocks[message.to] = max(self.clocks[message.to], message.clock)
            message.act()
        elif name in self.pending:
            message = self.pending.pop(name)
            message.to = last
            message.act()
        elif event.startswith("give up "):
            self.calls[event.removeprefix("give up ")].resolve(StateLost("there is no answer"))
        elif event == TIME_PASSES:
            self._time_passes()
        elif name == "restart":
            self._fail_calls(DIRECTORY)
            self.actor = self._new_directory()
            self.fenced.clear()  # it does not know whom the last has given up; epochs keep those harmless
        elif last in self.ingresses:
            self.ingresses[last].die()
            self.ingresses[f"{last}'"] = Ingress(self, f"{last}'")
        elif last in self.clients:
            getattr(self.clients[last], name)()
        else:
            owner = self.owners[last]
            if name in ("kill", "drain") and not owner.is_leaving:
                self.owners[f"{last}'"] = Replica(self, f"{last}'")
            getattr(owner, name)()

    def _time_passes(self) -> None:
        wakes = [owner.engine.wake_at() for owner in self.owners.values() if not owner.is_stopped]
        timer = self.loop.next_timer
        self.pass_until(max(self.loop.now, min(wakes + [timer] * (timer is not None))))

    def pass_until(self, now: float) -> None:
        self.loop.advance(now)
        for owner in list(self.owners.values()):
            owner.time_passes()
        directory = self.actor._directory
        known = [name for name in self.owners if directory.knows(name)]
        while directory._now < now:  # it looks all the time
            directory.tick(min(now, directory._now + MARGIN_S / 2))
            for name in known:
                self.owners[name].renew()
        for name in known:
            if not directory.knows(name):
                self.fenced[name] = {*self.fenced.get(name, ()), *self.owners[name].epochs}

    # How processes reach each other.

    def is_alive(self, name: str) -> bool:
        return name in self.owners or name in self.ingresses or name in self.clients or name == DIRECTORY

    def send(self, source: str, to: str, what: str, act: Callable[[], None], order: Any = None) -> Message:
        message = Message(self, source, to, what, act, order)
        if self.is_alive(source):
            self.pending[message.name] = message
        return message

    def fail(self, name: str) -> None:
        """A process is gone: what is on its way there arrives nowhere, and who waits for it hears of that."""
        self.lose(lambda message: message.to == name)
        self.calls = {key: call for key, call in self.calls.items() if call.source != name}
        self._fail_calls(name)

    def _fail_calls(self, name: str) -> None:
        for call in list(self.calls.values()):
            if call.to == name:
                self.lose(lambda message, call=call: message in (call.message, call.answered))  # type: ignore[misc]
                call.is_open = True
                call.answer(call.error(f"{name} is gone"))
        self.lose(lambda message: message.source == message.to == name)

    def lose(self, which: Callable[[Message], bool]) -> None:
        """These messages do not arrive."""
        self.pending = {name: message for name, message in self.pending.items() if not which(message)}

    def _in_thread(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """The directory's store takes its time; elsewhere nobody could tell."""
        done = self.loop.create_future()
        if self.acting == DIRECTORY and not self.loop_ends:
            self.send(DIRECTORY, DIRECTORY, "store", lambda: _resolve(done, work), (DIRECTORY, "store"))
        else:
            _resolve(done, work)
        return done

    loop_ends = False

    def ask(self, source: str, method: str, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Call the directory."""

        def work(call: Call) -> None:
            task = self.loop.create_task(getattr(self.actor, method)(*args, **kwargs))
            task.add_done_callback(lambda task: None if task.cancelled() else call.answer(_result(task)))

        return Call(self, source, DIRECTORY, method, work, Unavailable).future

    def connect(self, uri: str, **_: Any) -> "asyncio.Future[Connection]":
        """A client's way in; see websockets.connect."""
        parts = urlsplit(uri)
        assert parts.hostname is not None
        return Connection(self, self.clients[parts.hostname], parts.query).opened

    def _new_directory(self) -> DirectoryService:
        actor = DirectoryService("app", self._is_listening)
        self.directories += 1
        actor._directory = Directory(self.directories, self.loop.now)
        actor._directory.found(self.store.keys(), CONFIG.durability.keep_s, self.loop.now)
        actor._store, actor._durability = self.store, CONFIG.durability
        return actor

    async def _is_listening(self, owner: str) -> bool:
        return owner in self.owners

    def end(self) -> None:
        """Check what must be true of every owner, and leave nothing behind."""
        try:
            for owner in self.owners.values():
                owner.engine.check()
        finally:
            self.loop_ends = True
            self.owners, self.ingresses, self.clients = {}, {}, {}
            self.loop.end()


def _resolve(future: asyncio.Future[Any], work: Callable[[], Any]) -> None:
    try:
        result = work()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _result(task: asyncio.Task[Any]) -> Any:
    return task.exception() or task.result()


class Registry:
    """See registration.Registry."""

    def __init__(self, world: World, owner: str) -> None:
        self.register = partial(world.ask, owner, "register")
        self.report = partial(world.ask, owner, "report")

    async def is_down(self) -> bool:
        return False  # it starts again at once


class Replica:
    """An engine, and what a deployment does for it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.model = FailingModel()
        self.engine = Engine(self.model, CONFIG, name)
        self.is_stopped = self.is_leaving = self.is_draining = self.reports = False
        self.lease = Lease()
        session = CONFIG.session
        spec = self.engine.spec
        self.card = Owner(
            name, name, spec, self.engine.limits, session.max_sessions, self.engine.max_frame_bytes, checkpoints=True,
            moves_per_s=session.moves_per_s,
        )  # fmt: skip
        self.registration = Registration(Registry(world, name), self.card, CONFIG.durability, self.lease, self.fence)

    @property
    def epochs(self) -> set[int]:
        sessions = self.engine._sessions
        return set(sessions.epoch[list(sessions.names)].tolist())

    @property
    def may_step(self) -> bool:
        return not self.is_stopped and not self.is_draining and self.engine.ready and self.lease.holds

    @property
    def may_report(self) -> bool:
        directory = self.world.actor._directory
        is_known = directory.knows(self.name) and self.lease.holds
        stats = self.engine.stats
        news = bool(stats.taken or stats.ended_epochs or directory._moves(self.card, 1)[self.name])
        return (news or not is_known) and not (self.is_stopped or self.is_leaving or self.reports)

    def receive(self, data: bytes, call: Call) -> None:
        try:
            self.engine.receive(decode_frame(data), call, self.world.loop.now)
        except LockstepError as error:
            call.answer(b"".join(encode_reply(error)))
        self._answer()

    def renew(self) -> None:
        """It reports all the time."""
        if not (self.is_stopped or self.is_leaving) and self.world.actor._directory.heard(self.name):
            self.lease.renew(self.world.loop.now)

    def step(self) -> None:
        if self.epochs & self.world.fenced.get(self.name, set()):
            raise Violation(f"{self.name} works without a lease")
        self.engine.step(self.world.loop.now)
        self.engine.expire(self.world.loop.now)
        self._answer()

    def time_passes(self) -> None:
        if not self.is_stopped:
            self.engine.expire(self.world.loop.now)
            self._answer()
            if self.is_draining:
                self.kill()

    def _answer(self) -> None:
        now = self.world.loop.now
        if not self.lease.holds:
            return
        for call, answer in self.engine.farewell(now) if self.is_draining else self.engine.answers(now):
            assert isinstance(call, Call)
            call.answer(b"".join(encode_reply(answer)))
        if self.is_draining and self.engine.parted:
            self.kill()

    def report(self) -> None:
        self.reports = True
        self.world.loop.create_task(self._report())

    async def _report(self) -> None:
        try:
            stats = self.engine.stats
            news = News(stats.take_taken(), stats.take_ended())
            self.engine.give_back(await self.registration.renew(news, dict(stats.ends)))
            self._answer()
        except LockstepError:
            pass
        self.reports = False

    def rebalance(self) -> None:
        """What it was told long ago arrives: to give a session back."""
        self.engine.give_back(1)
        self._answer()

    async def fence(self) -> None:
        self.engine.drop_all(self.world.loop.now)

    def kill(self) -> None:
        self.world.fail(self.name)
        del self.world.owners[self.name]

    def stop(self) -> None:
        self.is_stopped = True

    def sleep(self) -> None:
        """It is stopped for longer than its lease."""
        self.stop()
        self.world.pass_until(self.world.loop.now + LEASE_S + 2 * MARGIN_S)

    def wake(self) -> None:
        self.is_stopped = False

    def fail(self) -> None:
        """The next step that it runs fails."""
        self.model.fails = True

    def drain(self) -> None:
        self.is_leaving = True
        self.world.loop.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self.world.ask(self.name, "unregister", self.name)
        except LockstepError:
            pass
        self.is_draining = True
        self._answer()


class FailingModel(SumModel):
    fails = False

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fails:
            self.fails = False
            raise RuntimeError("out of luck")
        return super().forward(x, state)


class Ingress:
    """A hub, and the conversations of its clients. It is the hub's directory, too (see hub.DirectoryClient)."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.hub = Hub(self, ack_on_receipt=False, sender=name)  # type: ignore[arg-type]
        self.hub._watching = self.hub._watch  # type: ignore[assignment]  # it gives up when it is told to
        self.connections: list[Connection] = []

    def __getattr__(self, method: str) -> Callable[..., asyncio.Future[Any]]:
        if method not in ("attach", "gone", "migrate", "open_ahead", "release", "keep", "fetch", "lost", "models"):
            raise AttributeError(method)
        return partial(self.world.ask, self.name, method)

    async def open(self, ask: Ask) -> Grant:
        (opened,) = await self.world.ask(self.name, "open", [ask])
        if isinstance(opened, LockstepError):
            raise opened
        assert isinstance(opened, Grant)
        return opened

    def connect(self, owner: Owner) -> "FrameChannel":
        return FrameChannel(self.world, self.name, owner.name)

    def die(self) -> None:
        """It is gone at once, with what it was about to say to clients."""
        self.world.lose(lambda message: message.source == self.name and message.to in self.world.clients)
        for connection in self.connections:
            connection.break_off()
        self.world.fail(self.name)
        del self.world.ingresses[self.name]


class FrameChannel:
    """See ingress.outbox.Channel."""

    def __init__(self, world: World, source: str, owner: str) -> None:
        self.world, self.source, self.owner = world, source, owner

    async def call(self, frame: Frame) -> Answer:
        data = b"".join(encode_frame(frame))
        if self.owner not in self.world.owners:
            raise StateLost(f"{self.owner} is gone")

        def work(call: Call) -> None:
            self.world.owners[self.owner].receive(data, call)

        reply = decode_reply(await Call(self.world, self.source, self.owner, "frame", work, _gone).future)
        if isinstance(reply, LockstepError):
            raise reply
        return reply

    async def close(self) -> None:
        pass


def _gone(why: str) -> bytes:
    return b"".join(encode_reply(StateLost(why)))


class Connection:
    """A WebSocket: the client's side is what websockets gives it, the ingress's what it gets from its server."""

    def __init__(self, world: World, client: "Client", query: str) -> None:
        self.world, self.client, self.query = world, client, query
        self.opened: asyncio.Future[Connection] = world.loop.create_future()
        self.ingress = ""
        self.close_code: int | None = None
        self._has_ended = False  # as the ingress sees it
        self._received: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._arrived: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._arrived.put_nowait({"type": "websocket.connect"})
        world.send(client.name, "ingress", "connect", self._accept)

    # The client's side.

    async def send(self, data: bytes) -> None:
        if self.close_code is not None:
            raise ConnectionClosedError(None, None)
        self._tell_ingress("message", {"type": "websocket.receive", "bytes": data})

    async def recv(self) -> bytes:
        if self.close_code is not None and self._received.empty():
            raise ConnectionClosedError(None, None)
        if (data := await self._received.get()) is None:
            raise ConnectionClosedError(None, None)
        return data

    async def __aiter__(self) -> Any:
        while True:
            yield await self.recv()

    async def close(self) -> None:
        self.leave(1000)

    @property
    def transport(self) -> "Connection":
        return self

    def abort(self) -> None:
        self.leave(1006)

    def leave(self, code: int) -> None:
        if self.close_code is None:
            self._closed(code)
            self._tell_ingress("goodbye", {"type": "websocket.disconnect", "code": code})

    def _closed(self, code: int) -> None:
        if self.close_code is None:
            self.close_code = code
            self._received.put_nowait(None)
            if not self.opened.done():
                self.opened.set_exception(OSError("refused"))

    # The ingress's side.

    def _accept(self) -> None:
        self.ingress = self.client.last_ingress = self.world.acting
        ingress = self.world.ingresses[self.ingress]
        ingress.connections.append(self)
        scope = {
            "type": "websocket", "path": "/v1/session", "headers": [], "query_string": self.query.encode(),
            "subprotocols": [websocket.SUBPROTOCOL],
        }  # fmt: skip
        talk = converse(WebSocket(scope, self._arrived.get, self._reply), ingress.hub)
        self.world.loop.create_task(talk)

    async def _reply(self, event: Any) -> None:
        if self._has_ended:
            raise OSError("the client is gone")
        if event["type"] == "websocket.accept":
            self._tell_client("accepted", lambda: self.opened.set_result(self))
        elif event["type"] == "websocket.send":
            self._tell_client("message", lambda: self._take(event["bytes"]))
        else:
            self.tell(event["code"])

    def tell(self, code: int) -> None:
        """The ingress hangs up."""
        if not self._has_ended:
            self._has_ended = True
            self._tell_client("goodbye", lambda: self._closed(code))

    def break_off(self) -> None:
        """The ingress is gone."""
        self._has_ended = self.close_code is not None
        self.tell(1006)

    def _take(self, data: bytes) -> None:
        if self.close_code is None:
            self._received.put_nowait(data)

    def _tell_client(self, what: str, act: Callable[[], None]) -> None:
        self.world.send(self.ingress, self.client.name, what, act, (id(self), "down"))

    def _tell_ingress(self, what: str, event: dict[str, Any]) -> None:
        def act() -> None:
            self._has_ended |= event["type"] == "websocket.disconnect"
            self._arrived.put_nowait(event)

        if self.world.is_alive(self.ingress):
            self.world.send(self.client.name, self.ingress, what, act, (id(self), "up"))


class Client:
    """Submits a few segments, as far as the window lets it, and adds up what it has submitted."""

    def __init__(self, world: World, name: str, number: int, num_segments: int) -> None:
        self.world, self.name, self.number = world, name, number
        self.timesteps = num_segments * SEGMENT
        self.line = np.empty((0, 2), np.int64)  # inputs
        self.progress = 0  # outputs that have come
        self.failures = self.attempts = 0
        self.last_ingress = f"ingress-{1 - number % 2}"
        self.session: Session | None = None
        self.is_over = self.closes = False
        world.loop.create_task(self._live())

    async def _live(self) -> None:
        while self.session is None:
            self.attempts += 1
            try:
                self.session = await websocket.open_websocket(
                    f"ws://{self.name}", session=f"{self.name}.{self.attempts}", resume_within_s=1e9
                )
            except LockstepError:
                await asyncio.sleep(0.05)

    @property
    def connection(self) -> Connection | None:
        if self.session is None or self.is_over:
            return None
        found = self.session.carrier._websocket  # type: ignore[attr-defined]
        assert isinstance(found, Connection)
        return None if found.close_code is not None else found

    @property
    def may_submit(self) -> bool:
        return (
            self.session is not None
            and not self.is_over
            and self.session.end_reason is None
            and len(self.line) < self.timesteps
            and len(self.line) + SEGMENT - self.progress <= CONFIG.session.max_window_timesteps
        )

    @property
    def may_close(self) -> bool:
        return self.session is not None and len(self.line) == self.timesteps and not (self.closes or self.is_over)

    def submit(self) -> None:
        assert self.session is not None
        at = np.arange(len(self.line), len(self.line) + SEGMENT)
        x = np.stack([at + 1, at * 0 + 1 + 100 * self.number + 10 * self.failures], axis=1)
        self.line = np.concatenate([self.line, x])
        self.session.submit(x)

    def close(self) -> None:
        assert self.session is not None
        self.closes = True
        self.session.close()

    def leave(self) -> None:
        assert self.connection is not None
        self.connection.leave(1006)

    def migrate(self) -> None:
        """Somebody, by some ingress, has the session moved."""
        assert self.session is not None
        ingress = self.world.ingresses[min(self.world.ingresses)]
        self.world.loop.create_task(_tried(ingress.hub.migrate(self.session.name)))

    def _give_up_if_lost(self, session: Session) -> None:
        """Nothing was kept of the session before all that held it was gone."""
        world = self.world
        record = world.actor._directory._sessions.get(session.name)
        held = any(session.name in ingress.hub._sessions for ingress in world.ingresses.values())
        if key_of(session.name) not in world.kept and not held and (record is None or record.owner is None):
            session.carrier._stopped = self.is_over = True  # type: ignore[attr-defined]

    def look(self) -> None:
        """Compare what has come with what must come."""
        session = self.session
        if session is None or self.is_over:
            return
        try:
            session.check()
        except StepFailed as error:
            self.line = self.line[: session.next]
            self.failures += 1
            self.closes = False
            if session.next < self.progress:
                raise Violation(
                    f"{self.name} has outputs up to {self.progress}, is told to resend from {session.next}"
                ) from error
        except LockstepError as error:
            raise Violation(f"{self.name} has lost its session: {error!r}") from error
        if (outputs := session.read()) is not None:
            if outputs.start != self.progress:
                raise Violation(f"{self.name} got outputs from {outputs.start}, {self.progress} was due")
            expected = self.line.cumsum(0)[outputs.start : outputs.end]
            if not np.array_equal(outputs.values["total"], expected):
                found = outputs.values["total"].tolist()
                raise Violation(f"{self.name} got {found} from {outputs.start} on, expected {expected.tolist()}")
            self.progress = outputs.end
        if session.end_reason is not None:
            if session.end_reason != "closed" or self.progress != self.timesteps:
                raise Violation(f"{self.name} ended ({session.end_reason}) at {self.progress} of {self.timesteps}")
            self.is_over = True
        elif self.connection is None:
            self._give_up_if_lost(session)


async def _tried(work: Coroutine[Any, Any, Any]) -> None:
    with suppress(LockstepError):
        await work


setattr(Client, "break", Client.leave)
