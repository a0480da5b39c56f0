"""Sessions over the Open Inference Protocol: sequences on one gRPC stream, which all sessions of a client share."""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import grpc
import numpy as np

from serve_app.directory import Turn
from serve_app.errors import InvalidInput, LockstepError, Unavailable, UnknownModel, from_wire
from serve_app.frame import ABORT, NO_CLOSE
from serve_app.ingress.oip import DATATYPES, DTYPES
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.protos import oip_pb2_grpc
from serve_app.segment import Run, Timing
from serve_app.session import Session
from serve_app.spec import ModelSpec, SessionLimits, TensorSpec, split_name

RETRY_DELAY_S = 0.05


def channel_to(address: str) -> tuple[grpc.aio.Channel, tuple[tuple[str, str], ...]]:
    """The channel to grpc://host:port/application, and the metadata of each call. Raises InvalidInput."""
    parts = urlsplit(address)
    if parts.scheme != "grpc" or not parts.netloc:
        raise InvalidInput(f"{address!r} is no address, expected one like grpc://host:8001")
    app = parts.path.strip("/")
    return grpc.aio.insecure_channel(parts.netloc), (("application", app),) if app else ()


class OpenInferenceTransport:
    """See client.Transport. `address` is one like grpc://host:8001; an application's name may follow as a path.

    The protocol has no answer to an opening alone: what a session cannot be opened for is said by its first outputs.
    """

    def __init__(self, address: str) -> None:
        """Raises InvalidInput for what is no address."""
        self._address = address
        self._channel, self._metadata = channel_to(address)
        self._stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream: SequenceStream | None = None

    async def open(
        self,
        session: str | None,
        model: str | None,
        initial_state: Sequence[np.ndarray] | None,
        checkpoint: bytes | None,
        turn: Turn,
    ) -> Session:
        """See Transport. Raises InvalidInput for a state to start from, which the protocol has no place for."""
        if initial_state is not None or checkpoint is not None:
            raise InvalidInput(
                "a session over grpc:// has no initial_state or checkpoint: open it over ws:// or by handle"
            )
        if turn.max_wait_s < math.inf:
            raise InvalidInput("a session over grpc:// has no max_wait_s: open it over ws:// or by handle")
        name = model or await self._only_model()
        spec = await self._spec(name)
        if spec is None:
            raise InvalidInput(f"model {name!r} is stateless, it has no sessions: ask it with clients.rows.RowsClient")
        if self._stream is None or self._stream.is_over:
            self._stream = SequenceStream(self._stub.ModelStreamInfer(metadata=self._metadata), self._address)
        opened = Session(session or uuid4().hex, spec, SessionLimits(), self._stream)
        if turn.priority:
            self._stream.priorities[opened.name] = turn.priority
        return opened

    async def models(self) -> dict[str, ModelSpec]:
        """See Transport."""
        index = (await self._call("RepositoryIndex", pb.RepositoryIndexRequest(ready=True))).models
        several = {name for name, versions in Counter(model.name for model in index).items() if versions > 1}
        names = [f"{model.name}@{model.version}" if model.name in several else model.name for model in index]
        return {name: spec for name in names if (spec := await self._spec(name)) is not None}

    async def stop(self) -> None:
        """See Transport."""
        if self._stream is not None:
            await self._stream.stop()
        await self._channel.close()

    async def _only_model(self) -> str:
        names = sorted({split_name(name)[0] for name in await self.models()})
        if len(names) != 1:
            raise UnknownModel(f"{self._address} serves {', '.join(names) or 'nothing'}: say which model")
        return names[0]

    async def _spec(self, model: str) -> ModelSpec | None:
        """None: of a stateless model."""
        metadata = await self._call("ModelMetadata", pb.ModelMetadataRequest(name=model))
        if metadata.platform != "lockstep_recurrent":
            return None
        config = (await self._call("ModelConfig", pb.ModelConfigRequest(name=model))).config
        (x,) = metadata.inputs
        rate = config.parameters["sample_rate"].string_value if "sample_rate" in config.parameters else ""
        outputs = {output.name: _tensor_spec(output) for output in metadata.outputs}
        return ModelSpec(model, _tensor_spec(x), outputs, 0, int(rate) if rate else None, x.name)

    async def _call(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._address) from error


class _Asked(NamedTuple):
    """A request that is on its way: timesteps [start, end) of a session, and whether it is the last."""

    session: Session
    start: int
    end: int
    ends: bool


class SequenceStream:
    """A carrier: one stream of many sequences. It keeps the order: no request waits for what became of the last."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._requests: asyncio.Queue[pb.ModelInferRequest] = asyncio.Queue()
        self._asked: dict[str, _Asked] = {}
        self._started: dict[str, Session] = {}
        #: Of sessions that have not started yet, where it is not the usual one.
        self.priorities: dict[str, int] = {}
        self._last = 0
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    @property
    def is_over(self) -> bool:
        """Whether nothing can be sent any more."""
        return any(task.done() for task in self._tasks)

    async def stop(self) -> None:
        """Give up what is open."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    def notify(self, session: Session) -> None:
        """See Carrier."""
        if self.is_over:
            session.fail(self._gone())
        while session.sendable:
            self._ask(session)

    def notify_later(self, session: Session) -> None:
        """See Carrier."""
        asyncio.get_running_loop().call_later(RETRY_DELAY_S, session.offer)

    def notify_ack(self, session: Session) -> None:
        """See Carrier: whoever answers a request takes it as acknowledged."""

    def want_state(self, session: Session) -> None:
        """See Carrier: the protocol has no place for it."""
        raise InvalidInput("a session over grpc:// cannot be exported: open it over ws:// or by handle")

    def _ask(self, session: Session) -> None:
        start, x, _, _, close = session.take(session.limits.max_segment)
        end, ends = start + len(x), close != NO_CLOSE
        session.arrived(session.handed)
        if session.name in self._started or len(x):
            self._last += 1
            self._asked[str(self._last)] = _Asked(session, start, end, ends)
            self._requests.put_nowait(self._request(session, str(self._last), x, ends))
            self._started[session.name] = session
        if ends:
            self._started.pop(session.name, None)
        if close == ABORT or (ends and end == 0):
            session.notice("ended", None, "closed" if close != ABORT else "aborted", session.progress)

    def _request(self, session: Session, identity: str, x: np.ndarray, ends: bool) -> pb.ModelInferRequest:
        request = pb.ModelInferRequest(model_name=session.spec.name, id=identity)
        dtype = np.dtype(session.spec.input.dtype)
        request.inputs.add(name=session.spec.input_name, datatype=DATATYPES[dtype.name], shape=x.shape)
        request.raw_input_contents.append(np.ascontiguousarray(x, dtype.newbyteorder("<")).tobytes())
        request.parameters["sequence_id"].string_param = session.name
        request.parameters["sequence_start"].bool_param = session.name not in self._started
        request.parameters["sequence_end"].bool_param = ends
        request.parameters["sequence_notice"].bool_param = session.name not in self._started
        if priority := self.priorities.pop(session.name, 0):
            request.parameters["priority"].int64_param = priority
        return request

    async def _send(self) -> None:
        while True:
            await self._call.write(await self._requests.get())

    async def _receive(self) -> None:
        why: LockstepError = self._gone()
        try:
            async for response in self._call:
                self._take(response)
        except grpc.aio.AioRpcError as error:
            why = error_of(error, self._address)
        finally:
            for session in [*self._started.values(), *(asked.session for asked in self._asked.values())]:
                session.fail(why)

    def _take(self, response: pb.ModelStreamInferResponse) -> None:
        infer = response.infer_response
        if "sequence_ended" in infer.parameters:
            ended = self._started.pop(infer.parameters["sequence_id"].string_param, None)
            if ended is not None:
                ended.notice("ended", None, infer.parameters["sequence_ended"].string_param, ended.progress)
            return
        session, start, end, ends = self._asked.pop(infer.id)
        if response.error_message:
            code = infer.parameters["error"].string_param
            self._started.pop(session.name, None)
            session.fail(from_wire({"code": code, "message": response.error_message}))
            return
        values = {}
        for output, data in zip(infer.outputs, infer.raw_output_contents, strict=True):
            values[output.name] = np.frombuffer(data, DTYPES[output.datatype]).reshape(output.shape)
        session.timing.add(*(infer.parameters[each.name].int64_param for each in fields(Timing)))
        session.deliver(end, 0, Run(start, end, values) if end > start else None)
        if ends:
            session.notice("ended", None, "closed", end)

    def _gone(self) -> Unavailable:
        return Unavailable(f"the stream to {self._address} is over, and its sessions: open new ones")


def _tensor_spec(tensor: Any) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape[1:]), DTYPES[tensor.datatype].name)


def error_of(error: grpc.aio.AioRpcError, address: str) -> LockstepError:
    """What a call has failed with."""
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return UnknownModel(error.details())
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidInput(error.details())
    return Unavailable(f"no answer from {address}: {error.code().name}, {error.details()}")
