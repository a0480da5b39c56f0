"""The sessions of bench.chaos: what they send when, and whether all that comes back is right.

Sessions of the 2x256 LSTM, and of Silero on speech as fast as it is spoken, by a handle client, by WebSockets and by
plain gRPC. Every output is compared with the bare module's; each timestep has to come once, in order.
"""

import asyncio
import logging
import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import ray
import torch
import uvloop

from bench.closed_loop import INPUT, SEED, TOLERANCE, plain_module
from clients.audio import read_wav
from clients.client import Client, connect
from clients.session import Session
from serve_app.config import ModelConfig
from serve_app.errors import LockstepError, SessionExists
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc
from serve_app.models import registry

PERIOD_S = 0.5
KEPT = 8
"""Columns of an output that are compared."""
RESUME_WITHIN_S = 60.0
ANSWER_WITHIN_S, MAX_ANSWER_WITHIN_S = 2.0, 16.0
"""A foreign client gives up a stream that takes longer: it may lead to a process that stands still. Each time that it
does it waits for twice as long by the next, which may only be slow, until one has answered."""
RETRY_S = 0.2
NICENESS = -10
"""Clients are on other machines than what is killed, and starts again: where that is allowed they do not wait."""
CHUNK = 256
SPEECH = Path(__file__).parents[1] / "tests/data/speech.wav"
SILERO = "vad"
HANDLE, SOCKET, FOREIGN = "handle", "socket", "foreign"


class Work(NamedTuple):
    """A model's sessions: the timesteps of a segment, one of which is due every `period_s`, and the output compared.

    inputs: [N, *features], which all sessions take in turn, each from another one on. module: x [T, B, *features] and
    the state (None: at the start) -> y [T, B, columns] and the next.
    """

    model: str
    segment: int
    period_s: float
    output: str
    inputs: np.ndarray
    module: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]

    def __reduce__(self) -> tuple[Any, ...]:
        return (silero, (self.period_s,)) if self.model == SILERO else (lstm, (self.segment, self.period_s))


@cache
def lstm(segment: int = 5, period_s: float = PERIOD_S) -> Work:
    """The 2x256 LSTM on noise."""
    x = np.random.default_rng(SEED).standard_normal((4096, INPUT), np.float32)
    return Work("rnn", segment, period_s, "y", x, plain_module())


@cache
def silero(period_s: float = PERIOD_S) -> Work:
    """Silero on speech, as fast as it is spoken: segments of 0.512 s where one is due every 0.5 s."""
    model = registry.load(ModelConfig("silero_vad"))

    def module(x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        y, state = model.forward(x, model.initial_state(x.shape[1]) if state is None else state)
        assert isinstance(y, torch.Tensor)
        return y[..., None], state

    samples, rate = read_wav(SPEECH)
    (size,) = model.input.shape
    inputs = samples[: len(samples) // size * size].reshape(-1, size)
    return Work(SILERO, math.ceil(period_s * rate / size), period_s, "probability", inputs, module)


@dataclass
class Line:
    """One session: what it has sent, what came back, and how late. `seed`: which inputs, and when in a period.

    has_name: the client, of a foreign one.
    epochs: when it was known to have another owner, or another way in. begins: the timesteps at which its state was
    that of a new sequence. wrong_at: a timestep whose output is not the bare module's, or was another when it came
    before, and wrong_by how much. error: what it has ended with.
    """

    seed: int
    work: Work
    way: str = HANDLE
    has_name: bool = False
    epochs: list[tuple[float, int]] = field(default_factory=list)
    begins: list[int] = field(default_factory=lambda: [0])
    due: deque[tuple[int, float]] = field(default_factory=deque)
    outputs: list[np.ndarray] = field(default_factory=list)
    received: int = 0
    submitted: int = 0
    doubled: int = 0
    wrong_at: int | None = None
    wrong_by: float = 0.0
    error: LockstepError | None = None
    delays: list[tuple[float, float]] = field(default_factory=list)  # when due, how late

    def inputs(self, start: int, end: int) -> np.ndarray:
        """x [end - start, *features]"""
        at = 7919 * self.seed + np.arange(start, end)
        x: np.ndarray = self.work.inputs[at % len(self.work.inputs)]
        return x

    def take(self, start: int, y: np.ndarray, asked: int | None = None) -> None:
        """Outputs from timestep `start` on have come; `asked`: those from there on were asked for again."""
        now = time.monotonic()
        self.doubled += max(0, (self.received if asked is None else asked) - start)
        assert start <= self.received, "outputs come in order"
        came = y.reshape(len(y), -1)[:, :KEPT]
        if start < self.received:
            before = np.concatenate(self.outputs)[start : start + len(y)]
            self.check(start, came[: len(before)], before)
        self.outputs.append(came[self.received - start :])
        self.received = max(self.received, start + len(y))
        while self.due and self.due[0][0] <= self.received:
            _, due = self.due.popleft()
            self.delays.append((due, now - due))

    def check(self, start: int, came: np.ndarray, expected: np.ndarray) -> None:
        """Outputs from timestep `start` on, as they came, against those that they should be."""
        off = np.abs(came - expected).max(1, initial=0.0)
        is_off = ~(off <= TOLERANCE)
        if is_off.any() and self.wrong_at is None:
            self.wrong_at, self.wrong_by = start + int(is_off.argmax()), float(off.max())

    def saw(self, epoch: int) -> None:
        """That is who has it now."""
        if not self.epochs or self.epochs[-1][1] != epoch:
            self.epochs.append((time.monotonic(), epoch))

    def longest(self, begin: float, end: float) -> float:
        """Of the segments that were due then, the longest delay; of those that never came, until now."""
        found = [late for due, late in self.delays if begin <= due < end]
        found += [time.monotonic() - due for _, due in self.due if begin <= due < end]
        return max(found, default=0.0)

    def gap(self, at: float, end: float) -> float:
        """The longest delay until `end` of what something that happened `at` then could hold up."""
        return self.longest(at - self.work.period_s, end)

    def hit(self, at: float, within_s: float) -> bool:
        """Whether it has got another owner, or another way in, within that time."""
        return any(at <= then < at + within_s for then, _ in self.epochs[1:])


IsOver = Callable[[], bool]
"""Whether no more segments are due."""


def load_apart(cluster: str, lines: Sequence[Line], sockets: str, rpc: Sequence[str], over: Path) -> Sequence[Line]:
    """As `load` until that file is there, in a process of its own, which is no part of the cluster at that address.

    Returns the lines as they have ended.
    """
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    ray.init(address=cluster, namespace="clients", log_to_driver=False, logging_level=logging.ERROR)
    try:
        uvloop.run(load(lines, sockets, rpc, over.exists))
    finally:
        ray.shutdown()
    for line in lines:
        line.outputs = [np.concatenate(line.outputs)] if line.outputs else []  # or they would be pickled one by one
    return lines


async def load(lines: Sequence[Line], sockets: str, rpc: Sequence[str], is_over: IsOver) -> None:
    """All sessions. sockets: addresses as `connect` takes them; rpc: host:port of gRPC."""
    async with connect("lockstep") as by_handle, connect(sockets, resume_within_s=RESUME_WITHIN_S) as by_socket:
        clients = {HANDLE: by_handle, SOCKET: by_socket}
        await asyncio.gather(
            *(
                run_foreign(rpc, line, is_over)
                if line.way == FOREIGN
                else run_session(clients[line.way], line, is_over)
                for line in lines
            )
        )


async def _submit(line: Line, is_over: IsOver, submit: Callable[[int, int], None]) -> float:
    """Segments, when they are due; when that was over."""
    due = time.monotonic() + random.Random(line.seed).random() * line.work.period_s
    while not is_over():
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        start, line.submitted = line.submitted, line.submitted + line.work.segment
        line.due.append((line.submitted, due))
        submit(start, line.submitted)
        due += line.work.period_s
    return time.monotonic()


async def run_session(client: Client, line: Line, is_over: IsOver) -> None:
    """One of our clients: send segments when they are due, take outputs as they come."""
    session = await client.open(model=line.work.model)
    reader = asyncio.create_task(read(session, line))

    def submit(start: int, end: int) -> None:
        x = line.inputs(start, end)
        session.submit(x.ravel() if session.spec.sample_rate else x)
        line.saw(session.epoch)

    try:
        await _submit(line, is_over, submit)
        await session.close()
    except LockstepError as error:
        line.error = error
    await reader


async def read(session: Session, line: Line) -> None:
    """Take what comes, until the session has ended."""
    with suppress(LockstepError):  # whoever submits is told the same
        async for outputs in session.outputs():
            line.take(outputs.start, outputs.values[line.work.output])


class Broken(Exception):
    """A foreign client's stream is over. `is_lost`: so is its sequence."""

    def __init__(self, is_lost: bool) -> None:
        super().__init__()
        self.is_lost = is_lost


async def run_foreign(addresses: Sequence[str], line: Line, is_over: IsOver) -> None:
    """A plain client of the Open Inference Protocol: one sequence, one stream, one segment a message.

    What is due while there is no stream waits for the next one, by the next address, as long as a session of ours does.
    A client that has a name numbers its timesteps: its sequence outlives the stream, and goes on where the server says.
    Of the others it ends with the stream, and a new one begins with what has had no answer; under an id of its own, or
    what is still on its way of the one before would be taken for it.
    """
    due = asyncio.Event()
    producing = asyncio.create_task(_submit(line, is_over, lambda start, end: due.set()))
    turn = line.seed
    is_new, within_s = True, ANSWER_WITHIN_S
    while not producing.done() or (
        line.received < line.submitted and time.monotonic() < producing.result() + RESUME_WITHIN_S
    ):
        address = addresses[turn % len(addresses)]
        turn += 1
        before = line.received
        try:
            async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                await _Stream(channel, line, turn, is_new).run(due, producing, within_s)
        except Broken as broken:
            if line.received > before:
                within_s = ANSWER_WITHIN_S
            elif isinstance(broken.__cause__, TimeoutError):
                within_s = min(2 * within_s, MAX_ANSWER_WITHIN_S)
            await asyncio.sleep(RETRY_S * random.uniform(0.5, 1))
            is_new = broken.is_lost or (is_new and line.received == line.begins[-1])
            if is_new and line.begins[-1] != line.received:
                line.begins.append(line.received)


class _Stream:
    """A foreign client's stream number `turn`. is_new: it begins a sequence, with what has had no answer."""

    def __init__(self, channel: Any, line: Line, turn: int, is_new: bool) -> None:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        self._has_name = line.has_name
        self._call = stub.ModelStreamInfer(metadata=[("lockstep-client", str(line.seed))] if self._has_name else None)
        self._line, self._turn, self._is_new = line, turn, is_new
        self._sent = self._asked = line.received
        self._resends = 0  # so often it was told from where to: what was sent before that is not answered any more

    async def run(self, due: asyncio.Event, producing: "asyncio.Task[float]", within_s: float) -> None:
        """Until all is answered, and nothing more comes. Raises Broken, also where nothing comes for so long."""
        line, sending = self._line, asyncio.create_task(self._send(due))
        try:
            while not (producing.done() and line.received == line.submitted):
                async with asyncio.timeout(line.work.period_s + within_s):
                    response = await self._call.read()
                if response is grpc.aio.EOF:
                    raise Broken(not self._has_name)
                self._take(response, due)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            raise Broken(not self._has_name) from error
        finally:
            sending.cancel()
            self._call.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, due: asyncio.Event) -> None:
        while True:
            while self._sent < self._line.submitted:
                start, self._sent = self._sent, min(self._sent + self._line.work.segment, self._line.submitted)
                await self._call.write(self._request(start, self._sent))
            due.clear()
            await due.wait()

    def _request(self, start: int, end: int) -> pb.ModelInferRequest:
        line = self._line
        x = line.inputs(start, end)
        request = pb.ModelInferRequest(model_name=line.work.model, id=f"{self._resends} {start} {end}")
        request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        request.raw_input_contents.append(np.ascontiguousarray(x, "<f4").tobytes())
        request.parameters["sequence_id"].string_param = f"{line.seed}.{line.begins[-1]}"
        request.parameters["sequence_start"].bool_param, self._is_new = self._is_new, False
        request.parameters["sequence_end"].bool_param = False
        if self._has_name:
            request.parameters["sequence_timestep"].int64_param = start - line.begins[-1]
        return request

    def _take(self, response: pb.ModelStreamInferResponse, due: asyncio.Event) -> None:
        line, parameters = self._line, response.infer_response.parameters
        resends, start, end = map(int, response.infer_response.id.split())
        if resends < self._resends:
            line.doubled += (end - start) * (not response.error_message)
        elif response.error_message and "expected" in parameters:
            self._resends += 1
            self._sent = self._asked = line.begins[-1] + parameters["expected"].int64_param
            if self._sent > line.received:  # it has had answers that were lost on their way
                raise Broken(is_lost=True)
            due.set()
        elif response.error_message:
            lives = "retry_after_s" in parameters or parameters["error"].string_param == SessionExists.code
            raise Broken(is_lost=not (self._has_name and lives))  # the stream before may still have it
        else:
            line.saw(self._turn)
            (data,) = response.infer_response.raw_output_contents
            line.take(start, np.frombuffer(data, np.float32).reshape(end - start, -1), self._asked)
            self._asked = end


def wrong(lines: Sequence[Line]) -> int:
    """How many sessions have an output that is not the bare module's; their `wrong_at` says from where on."""
    models = {line.work.model: line.work for line in lines}
    for model, work in models.items():
        _compare(work, [line for line in lines if line.work.model == model])
    return sum(line.wrong_at is not None for line in lines)


def _compare(work: Work, lines: Sequence[Line]) -> None:
    """All sequences are one batch, the shorter ones with more inputs than they were sent."""
    pieces = [
        (line, start, np.concatenate(line.outputs)[start:end])
        for line in lines
        for start, end in zip(line.begins, [*line.begins[1:], line.received], strict=True)
        if end > start
    ]
    state = None
    for at in range(0, max((len(came) for _, _, came in pieces), default=0), CHUNK):
        x = np.stack([line.inputs(start + at, start + at + CHUNK) for line, start, _ in pieces], axis=1)
        with torch.inference_mode():
            y, state = work.module(torch.from_numpy(x), state)
        for i, (line, start, came) in enumerate(pieces):
            part = came[at : at + CHUNK]
            line.check(start + at, part, y[: len(part), i, :KEPT].numpy())
