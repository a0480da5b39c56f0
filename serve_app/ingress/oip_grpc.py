"""The Open Inference Protocol over gRPC: messages ↔ the plain values of oip.py. Any server can have the methods."""

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from serve_app.errors import InvalidInput, LockstepError, UnknownModel, WindowFull
from serve_app.ingress.oip import (
    DATATYPES,
    Answer,
    Call,
    InferenceServer,
    Input,
    Parameter,
    client_name,
    write_tensor,
)
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.sequences import Result, Space
from serve_app.ingress.shared_memory import write
from serve_app.rows import RowsRequest, RowsResult

M = TypeVar("M", bound=Message)
logger = logging.getLogger(__name__)

MAX_OUTSTANDING = 1024
"""Requests of a stream that are not answered yet; no more are read meanwhile."""
CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


class Context(Protocol):
    """Of a call, as gRPC has it or Serve."""

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        """What came with the call."""
        ...

    def set_code(self, code: grpc.StatusCode) -> None:
        """How it ends."""
        ...

    def set_details(self, details: str) -> None:
        """Why."""
        ...

    def set_trailing_metadata(self, metadata: Sequence[tuple[str, str]]) -> None:
        """What else there is to say."""
        ...


class InferenceService:
    """The methods of inference.GRPCInferenceService, by the names that gRPC calls them."""

    inference: InferenceServer

    async def ServerLive(self, request: pb.ServerLiveRequest, grpc_context: Context) -> pb.ServerLiveResponse:
        """Whether this process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, grpc_context: Context) -> pb.ServerReadyResponse:
        """Whether models can be asked."""
        with told(grpc_context):
            return pb.ServerReadyResponse(ready=await self.inference.ready())
        return pb.ServerReadyResponse()

    async def ModelReady(self, request: pb.ModelReadyRequest, grpc_context: Context) -> pb.ModelReadyResponse:
        """Whether one model can be asked."""
        with told(grpc_context):
            return pb.ModelReadyResponse(ready=await self.inference.model_ready(request.name, request.version))
        return pb.ModelReadyResponse()

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, grpc_context: Context
    ) -> pb.ServerMetadataResponse:
        """What this server is."""
        return pb.ServerMetadataResponse(**self.inference.server_metadata())

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, grpc_context: Context) -> pb.ModelMetadataResponse:
        """What a model takes and gives."""
        with told(grpc_context):
            return pb.ModelMetadataResponse(**await self.inference.metadata(request.name, request.version))
        return pb.ModelMetadataResponse()

    async def ModelConfig(self, request: pb.ModelConfigRequest, grpc_context: Context) -> pb.ModelConfigResponse:
        """How a model is served."""
        with told(grpc_context):
            config = await self.inference.config(request.name, request.version)
            return _filled(pb.ModelConfigResponse(), {"config": config})
        return pb.ModelConfigResponse()

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, grpc_context: Context
    ) -> pb.ModelStatisticsResponse:
        """What a model has done."""
        with told(grpc_context):
            statistics = await self.inference.statistics(request.name, request.version)
            return _filled(pb.ModelStatisticsResponse(), {"model_stats": statistics})
        return pb.ModelStatisticsResponse()

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, grpc_context: Context
    ) -> pb.RepositoryIndexResponse:
        """The models that are configured."""
        with told(grpc_context):
            return pb.RepositoryIndexResponse(models=await self.inference.index(only_ready=request.ready))
        return pb.RepositoryIndexResponse()

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, grpc_context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Serve a configured model (again)."""
        with told(grpc_context):
            await self.inference.load(request.model_name)
            return pb.RepositoryModelLoadResponse()
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, grpc_context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Start no new sequences of a model."""
        with told(grpc_context):
            await self.inference.unload(request.model_name)
            return pb.RepositoryModelUnloadResponse()
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, grpc_context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        """The regions that are registered."""
        with told(grpc_context):
            regions = self.inference.memory.status(request.name)
            return _filled(pb.SystemSharedMemoryStatusResponse(), {"regions": regions})
        return pb.SystemSharedMemoryStatusResponse()

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, grpc_context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Map a region."""
        with told(grpc_context):
            self.inference.memory.register(request.name, request.key, request.offset, request.byte_size)
            return pb.SystemSharedMemoryRegisterResponse()
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, grpc_context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forget a region, or all."""
        self.inference.memory.unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, grpc_context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        """None is ever registered."""
        return pb.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, grpc_context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        """Refused: the way in has no GPU."""
        with told(grpc_context):
            raise InvalidInput(
                f"failed to register CUDA shared memory region '{request.name}': use system shared memory, inputs "
                "arrive at a process without a GPU"
            )
        return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, grpc_context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        """There is nothing to forget."""
        return pb.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: pb.TraceSettingRequest, grpc_context: Context) -> pb.TraceSettingResponse:
        """What is traced: nothing, whatever is asked for."""
        settings = {name: {"value": value} for name, value in self.inference.trace.items()}
        return _filled(pb.TraceSettingResponse(), {"settings": settings})

    async def LogSettings(self, request: pb.LogSettingsRequest, grpc_context: Context) -> pb.LogSettingsResponse:
        """What is logged; Serve's configuration says it."""
        response = pb.LogSettingsResponse()
        for name, value in self.inference.log.items():
            _set_parameter(response.settings[name], value)
        return response

    async def ModelInfer(self, request: pb.ModelInferRequest, grpc_context: Context) -> pb.ModelInferResponse:
        """Run one request."""
        with told(grpc_context):
            call = await read_request(self.inference, request)
            space = self.inference.space(client_name(dict(grpc_context.invocation_metadata())))
            return write_response(self.inference, request, await self.inference.infer(call, space))
        return pb.ModelInferResponse()

    async def ModelStreamInfer(
        self, stream: AsyncIterator[pb.ModelInferRequest], grpc_context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Run requests as they come; those of a sequence are answered in order, sequences do not wait for each other.

        The sequences of a stream are its own, and end with it, unless its client has a name.
        """
        client = client_name(dict(grpc_context.invocation_metadata()))
        space = self.inference.own_space() if client is None else self.inference.space(client)
        talk = _Stream(self.inference, space)
        # In a context of its own: it opens sessions, which must not hang on this call.
        reader = asyncio.create_task(talk.read(stream), context=contextvars.Context())
        try:
            while (reply := await talk.replies.get()) is not None:
                talk.replied()
                yield reply
            await reader
        finally:
            reader.cancel()
            talk.leave()
            space.leave(talk)
            if client is None:
                space.abort()


class _Stream:
    """One stream: what has come and is not answered yet, and replies that wait for their turn."""

    def __init__(self, inference: InferenceServer, space: Space) -> None:
        self.replies: asyncio.Queue[pb.ModelStreamInferResponse | None] = asyncio.Queue()
        self._inference = inference
        self._space = space
        self._outstanding = 0
        self._running: set[asyncio.Task[None]] = set()  # calls to stateless models
        self._changed = asyncio.Event()

    async def read(self, stream: AsyncIterator[pb.ModelInferRequest]) -> None:
        """Take requests until the client sends no more, then wait for their replies."""
        try:
            async for request in stream:
                self._outstanding += 1
                await self._take(request)
                await self._until(MAX_OUTSTANDING)
            await self._until(0)
        finally:
            self.replies.put_nowait(None)

    def replied(self) -> None:
        """A reply goes out."""
        self._outstanding -= 1
        self._changed.set()

    def leave(self) -> None:
        """Nobody waits for replies any more."""
        for task in self._running:
            task.cancel()

    async def _until(self, outstanding: int) -> None:
        while self._outstanding > outstanding:
            self._changed.clear()
            await self._changed.wait()

    async def _take(self, request: pb.ModelInferRequest) -> None:
        try:
            call = await read_request(self._inference, request)
        except LockstepError as error:
            self._reply_error(request, error)
            return
        if isinstance(call.request, RowsRequest):
            running = asyncio.create_task(self._run(request, call))
            self._running.add(running)
            running.add_done_callback(self._running.discard)
            return
        while True:
            try:
                self._space.ask(call.request, lambda result: self._reply(request, call, result), self)
            except WindowFull:
                await self._space.room(call.request)
            else:
                return

    async def _run(self, request: pb.ModelInferRequest, call: Call) -> None:
        """Of a stateless model: in whatever order they are done."""
        try:
            result = await self._inference.run(call)
        except Exception:
            logger.exception("a request to model %s failed", call.spec.name)
            result = LockstepError("an unexpected error: the server's log has it")
        self._reply(request, call, result)

    def _reply(self, request: pb.ModelInferRequest, call: Call, result: Result | RowsResult | LockstepError) -> None:
        answer = self._inference.answer(call, result)
        try:
            if not isinstance(answer, LockstepError):
                response = write_response(self._inference, request, answer)
                self.replies.put_nowait(pb.ModelStreamInferResponse(infer_response=response))
                return
        except LockstepError as error:
            answer = error
        self._reply_error(request, answer)

    def _reply_error(self, request: pb.ModelInferRequest, error: LockstepError) -> None:
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        )
        response.parameters["error"].string_param = error.code  # for clients that know us: the message is for people
        self.replies.put_nowait(pb.ModelStreamInferResponse(error_message=error.message, infer_response=response))


class told:  # as a context manager reads
    """Let the call end with the code and the message of a LockstepError that is raised within.

    The exception goes no further: gRPC and Serve would log it, and say the message in words of their own.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, LockstepError):
            return False
        self._context.set_code(grpc.StatusCode[error.grpc])
        self._context.set_details(error.message)
        if error.retry:
            self._context.set_trailing_metadata([("retry-after", "1")])
        return True


async def read_request(inference: InferenceServer, request: pb.ModelInferRequest) -> Call:
    """What a message asks for. Raises InvalidInput, UnknownModel and others, naming what is wrong."""
    parameters = {name: _parameter(value) for name, value in request.parameters.items()}
    inputs = _inputs(inference, request)
    outputs = [output.name for output in request.outputs]
    arguments = request.model_name, request.model_version, request.id, parameters, inputs, outputs
    try:
        return inference.read(*arguments)
    except UnknownModel:
        await inference.know(request.model_name)
    return inference.read(*arguments)


def write_response(inference: InferenceServer, request: pb.ModelInferRequest, answer: Answer) -> pb.ModelInferResponse:
    """The message for an answer. Outputs go where the request says: into the message, or into shared memory."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    regions = {output.name: output.parameters for output in request.outputs if output.parameters}
    for name, value in answer.outputs.items():
        tensor = response.outputs.add(name=name, datatype=DATATYPES[value.dtype.name], shape=value.shape)
        data = write_tensor(value)
        part = _part(inference, regions[name]) if name in regions else None
        if part is None:
            response.raw_output_contents.append(data)
        else:
            write(part, name, data)
            parameters = dict(regions[name]) | {"shared_memory_byte_size": pb.InferParameter(int64_param=len(data))}
            for each, parameter in parameters.items():
                tensor.parameters[each].CopyFrom(parameter)
    for name, parameter in answer.parameters.items():
        _set_parameter(response.parameters[name], parameter, int_field="int64_param")
    return response


def _inputs(inference: InferenceServer, request: pb.ModelInferRequest) -> list[Input]:
    raw = iter(request.raw_input_contents)
    inputs: list[Input] = []
    num_raw = 0
    for tensor in request.inputs:
        data: Any = _part(inference, tensor.parameters) if tensor.parameters else None
        if data is None and request.raw_input_contents:
            num_raw += 1
            data = next(raw, None)
        elif data is None:
            contents = CONTENTS.get(tensor.datatype)
            if contents is None:
                raise InvalidInput(
                    f"input '{tensor.name}' of datatype '{tensor.datatype}' has to come in raw_input_contents"
                )
            data = getattr(tensor.contents, contents)
        if data is not None:
            inputs.append(Input(tensor.name, tensor.datatype, list(tensor.shape), data))
    if num_raw != len(request.raw_input_contents):
        raise InvalidInput(
            f"expected {num_raw} raw input contents but got {len(request.raw_input_contents)} for model "
            f"'{request.model_name}'"
        )
    return inputs


def _part(inference: InferenceServer, parameters: Mapping[str, pb.InferParameter]) -> memoryview | None:
    return inference.memory.part({name: _parameter(value) for name, value in parameters.items()})


def _filled(message: M, values: dict[str, Any]) -> M:
    json_format.ParseDict(values, message)
    return message


def _parameter(value: pb.InferParameter) -> Parameter:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise InvalidInput("a parameter without a value arrived")
    parameter: Parameter = getattr(value, kind)
    return parameter


def _set_parameter(target: Message, value: Parameter, int_field: str = "uint32_param") -> None:
    field = {bool: "bool_param", int: int_field, str: "string_param", float: "double_param"}[type(value)]
    setattr(target, field, value)
