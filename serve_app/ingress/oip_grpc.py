"""The Open Inference Protocol over gRPC: messages ↔ the plain values of oip.py. Any server can have the methods."""

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message

from serve_app.errors import InvalidInput, LockstepError, WindowFull
from serve_app.ingress.grpc_server import MAX_OUTSTANDING_BYTES, GrpcServer, methods
from serve_app.ingress.oip import (
    DATATYPE_OF,
    NOT_KNOWN,
    Answer,
    Call,
    Form,
    InferenceServer,
    Input,
    Parameter,
    client_name,
    write_tensor,
)
from serve_app.ingress.protos import oip_pb2 as pb
from serve_app.ingress.sequences import Request, Result
from serve_app.rows import RowsRequest, RowsResult
from serve_app.spec import split_name

M = TypeVar("M", bound=Message)
logger = logging.getLogger(__name__)

MAX_OUTSTANDING = 1024
"""Requests of a stream that are not answered yet; no more are read meanwhile."""
ID_TAG, PARAMETER_TAG, VALUES_TAG = (number << 3 | 2 for number in (3, 4, 7))
"""Of the fields `id`, `parameters` and `raw_input_contents` of a ModelInferRequest."""
NAME_TAG, CONTENT_TAG = (number << 3 | 2 for number in (1, 2))
"""Of a parameter."""
OUTPUT_TAG, ANSWER_TAG = (number << 3 | 2 for number in (6, 2))
"""Of `raw_output_contents` of a ModelInferResponse, and of that in a ModelStreamInferResponse."""
SEQUENCE_ID, INT64_TAG = b"\x0a\x0bsequence_id", 2 << 3
"""The name of that parameter, as it is written; and the tag of its content, where that is an integer."""
MAX_FORM_BYTES = 1024
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


class Head(NamedTuple):
    """Of a request whose form is known; its outputs go into the answer."""

    model_name: str
    model_version: str
    id: str
    form: Form
    outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor] = ()


Asked = pb.ModelInferRequest | Head
"""What an answer takes from its request."""


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
            regions = await self.inference.regions(request.name)
            return _filled(pb.SystemSharedMemoryStatusResponse(), {"regions": regions})
        return pb.SystemSharedMemoryStatusResponse()

    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, grpc_context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """Map a region."""
        with told(grpc_context):
            await self.inference.register_region(request.name, request.key, request.offset, request.byte_size)
            return pb.SystemSharedMemoryRegisterResponse()
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, grpc_context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """Forget a region, or all."""
        await self.inference.unregister_region(request.name)
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
            call = await self.inference.know(partial(read_request, self.inference, request))
            answer = await self.inference.infer(call, client_name(dict(grpc_context.invocation_metadata())))
            response = pb.ModelInferResponse()
            write_response(request, answer, response)
            return response
        return pb.ModelInferResponse()

    async def ModelStreamInfer(
        self, stream: AsyncIterator[pb.ModelInferRequest], grpc_context: Context
    ) -> AsyncIterator[pb.ModelStreamInferResponse]:
        """Run requests as they come; see RequestStream."""
        replies: asyncio.Queue[bytes | None] = asyncio.Queue()
        requests = self.open_stream(dict(grpc_context.invocation_metadata()), replies.put_nowait)
        # In a context of its own: it opens sessions, which must not hang on this call.
        reader = asyncio.create_task(_read(stream, requests, replies), context=contextvars.Context())
        try:
            while (reply := await replies.get()) is not None:
                requests.replied()
                yield pb.ModelStreamInferResponse.FromString(reply)
            await reader
        finally:
            reader.cancel()
            requests.leave()

    def server(self) -> GrpcServer:
        """A server of its own for these methods."""
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        return GrpcServer(methods(service, self, {"ModelStreamInfer": self.open_stream}), MAX_OUTSTANDING)

    def open_stream(self, metadata: Mapping[str, str], send: Callable[[bytes], None]) -> "RequestStream":
        """A stream that begins, of a client with that metadata; `send` gets each ModelStreamInferResponse as bytes."""
        return RequestStream(self.inference, client_name(metadata), send)


async def _read(
    stream: AsyncIterator[pb.ModelInferRequest], requests: "RequestStream", replies: asyncio.Queue[bytes | None]
) -> None:
    """Take requests until the client sends no more, then wait for their replies."""
    try:
        async for request in stream:
            requests.take_message(request)
            await requests.until(MAX_OUTSTANDING)
        await requests.until(0)
    finally:
        replies.put_nowait(None)


class RequestStream:
    """One stream: requests of a sequence are answered in order, sequences do not wait for each other.

    The sequences of a stream are its own, and end with it, unless its client has a name.
    """

    def __init__(self, inference: InferenceServer, client: str | None, send: Callable[[bytes], None]) -> None:
        self._inference = inference
        self._client = client
        self._send = send
        self._space = inference.own_space() if client is None else inference.space(client)
        self._space.join(self)
        self._split = Splitter()
        #: Requests that were taken, and whose replies are not out.
        self.outstanding = 0
        #: Their inputs.
        self.outstanding_bytes = 0
        self._held: deque[pb.ModelInferRequest] = deque()  # until the first of them can go on
        self._running: set[asyncio.Task[None]] = set()
        self._changed: asyncio.Event | None = None

    def take(self, data: bytes) -> None:
        """The next request, as bytes. Raises DecodeError."""
        parts = self._split(data)
        form = None if self._held else self._inference.forms.get(parts.form)
        if (
            form is not None
            and (call := self._inference.fill(form, parts.id, parts.sequence, parts.values)) is not None
        ):
            self.outstanding += 1
            if self._ask(Head(form.model, form.version, parts.id, form), call):
                return
            self.outstanding -= 1
        self.take_message(pb.ModelInferRequest.FromString(data), parts.form)

    def take_message(self, request: pb.ModelInferRequest, key: bytes = b"") -> None:
        """The next request. Beyond MAX_OUTSTANDING none should come. key: of its form, if there may be others of it."""
        self.outstanding += 1
        if self._held or not self._take(request, key):
            self._held.append(request)
            self.outstanding_bytes += request.ByteSize()
            if len(self._held) == 1:
                self._start(self._go_on())

    def replied(self) -> None:
        """A reply goes out."""
        self.outstanding -= 1
        if self._changed is not None:
            self._changed.set()

    async def until(self, outstanding: int) -> None:
        """Wait until no more than so many are outstanding, nor more than MAX_OUTSTANDING_BYTES."""
        self._changed = asyncio.Event()
        while self.outstanding > outstanding or self.outstanding_bytes > MAX_OUTSTANDING_BYTES:
            self._changed.clear()
            await self._changed.wait()

    def leave(self) -> None:
        """Nobody waits for replies any more."""
        for task in self._running:
            task.cancel()
        self._space.leave(self)
        if self._client is None:
            self._space.abort()

    def _take(self, request: pb.ModelInferRequest, key: bytes) -> bool:
        """Run it; False where it has to wait, for the model to be known or for room in its sequence's window."""
        try:
            call = read_request(self._inference, request)
            if key and not any(tensor.parameters for tensor in (*request.inputs, *request.outputs)):
                datatype = request.inputs[0].datatype
                self._inference.learn(key, call, request.model_name, request.model_version, datatype)
            return self._ask(request, call)
        except NOT_KNOWN:
            return False
        except LockstepError as error:
            self._reply_error(request, error)
        except Exception:  # costs this request only, not the others of the stream
            logger.exception("a request to model %s failed", request.model_name)
            self._reply_error(request, LockstepError("an unexpected error: the server's log has it"))
        return True

    def _ask(self, request: Asked, call: Call) -> bool:
        """Run what was read; False without room."""
        if isinstance(call.request, RowsRequest):
            self._start(self._run(request, call))
        else:
            try:
                notice = partial(self._notice, call) if call.request.notice else None
                self._space.ask(call.request, partial(self._reply, request, call), self, notice)
            except WindowFull:
                return False
        self.outstanding_bytes += call.nbytes  # the reply, which may have come, takes that off
        return True

    async def _go_on(self) -> None:
        """Take what is held, in order."""
        while self._held:
            request = self._held[0]
            try:
                call = await self._inference.know(partial(read_request, self._inference, request))
                while not self._ask(request, call):
                    assert isinstance(call.request, Request)
                    await self._space.room(call.request)
            except LockstepError as error:
                self._reply_error(request, error)
            except Exception:
                logger.exception("a request to model %s failed", request.model_name)
                self._reply_error(request, LockstepError("an unexpected error: the server's log has it"))
            self.outstanding_bytes -= self._held.popleft().ByteSize()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # In a context of its own: what is opened on the way must not hang on this call.
        running = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def _run(self, request: Asked, call: Call) -> None:
        """Of a stateless model: in whatever order they are done."""
        try:
            result = await self._inference.run(call)
        except Exception:
            logger.exception("a request to model %s failed", call.spec.name)
            result = LockstepError("an unexpected error: the server's log has it")
        self._reply(request, call, result)

    def _reply(self, request: Asked, call: Call, result: Result | RowsResult | LockstepError) -> None:
        self.outstanding_bytes -= call.nbytes
        answer = self._inference.answer(call, result)
        try:
            if not isinstance(answer, LockstepError):
                self._send(self._response(request, answer))
                return
        except LockstepError as error:
            answer = error
        self._reply_error(request, answer)

    def _response(self, request: Asked, answer: Answer) -> bytes:
        template: Template | None = request.form.template if isinstance(request, Head) else None
        if template is not None and template.version == answer.version:
            return template.write(request.id, answer)
        response = pb.ModelInferResponse()
        write_response(request, answer, response)
        if isinstance(request, Head):
            request.form.template = Template(response)
        message: bytes = pb.ModelStreamInferResponse(infer_response=response).SerializeToString()
        return message

    def _notice(self, call: Call, error: LockstepError) -> None:
        """The sequence that began with this call has ended by itself."""
        assert isinstance(call.request, Request)
        name, version = split_name(call.spec.name)
        response = pb.ModelInferResponse(model_name=name, model_version=version, id=call.id)
        sequence = call.request.sequence
        kind = "string_param" if isinstance(sequence, str) else "int64_param" if sequence < 2**63 else "uint64_param"
        setattr(response.parameters["sequence_id"], kind, sequence)
        response.parameters["sequence_ended"].string_param = error.details.get("reason", error.code)
        self.outstanding += 1  # until it is out, as others
        self._send_error(error, response)

    def _reply_error(self, request: Asked, error: LockstepError) -> None:
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=request.model_version, id=request.id
        )
        response.parameters["error"].string_param = error.code  # for clients that know us: the message is for people
        if error.retry:
            response.parameters["retry_after_s"].int64_param = error.retry_after_s
        if "expected" in error.details:
            response.parameters["expected"].int64_param = error.details["expected"]
        self._send_error(error, response)

    def _send_error(self, error: LockstepError, response: pb.ModelInferResponse) -> None:
        message = pb.ModelStreamInferResponse(error_message=error.message, infer_response=response)
        self._send(message.SerializeToString())


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
        trailing = [("retry-after", str(error.retry_after_s))] if error.retry else []
        if "expected" in error.details:
            trailing.append(("expected", str(error.details["expected"])))
        if trailing:
            self._context.set_trailing_metadata(trailing)
        return True


class Parts(NamedTuple):
    """Of the bytes of a request: all that its form is known by, and what others of that form have of their own.

    sequence: 0 where it is no positive number, and so one of the form's. values: of the one input. id_at: where the id
    begins and ends.
    """

    form: bytes = b""
    id: str = ""
    sequence: int = 0
    values: bytes = b""
    id_at: tuple[int, int] = (0, 0)


class Splitter:
    """Of the requests of one stream: most differ from the last one in id and values only, and are not read anew."""

    def __init__(self) -> None:
        self._last = Parts()
        self._size = -1
        self._before = self._between = b""  # up to the id, and from there to the values

    def __call__(self, data: bytes) -> Parts:
        """See `split`."""
        form, _, sequence, _, (begin, end) = last = self._last
        if len(data) == self._size and data.startswith(self._before) and data.startswith(self._between, end):
            try:
                return Parts(form, data[begin:end].decode(), sequence, data[end + len(self._between) :], last.id_at)
            except UnicodeDecodeError:
                pass
        parts = self._last = split(data)
        begin, end = parts.id_at
        values_at = len(data) - len(parts.values)
        self._size = len(data) if parts.form else -1
        self._before, self._between = data[:begin], data[end:values_at]
        return parts


def split(data: bytes) -> Parts:
    """The parts of a request that is still to be read; none where it is of a kind that is to be read anyway.

    gRPC's clients write its fields in the order of their numbers, so that the values are the last; and parameters in
    any order, which may be another each time.
    """
    at, size, sequence, kept, form, id_at = 0, len(data), 0, 0, b"", (0, 0)
    parameters: dict[bytes, bytes] = {}
    limit = min(size, MAX_FORM_BYTES)
    try:
        while at < limit:
            tag, length, begin = data[at], data[at + 1], at + 2
            if tag & 0x87 != 2:  # all fields have numbers below 16, and a length
                break
            if length > 127:
                length, begin = _varint(data, at + 1)
            end = begin + length
            if tag == VALUES_TAG:
                if end == size:  # there are no others
                    said = [bytes([PARAMETER_TAG]) + name + content for name, content in sorted(parameters.items())]
                    form = b"".join((form, data[kept:at], *said))
                    return Parts(form, data[slice(*id_at)].decode(), sequence, data[begin:], id_at)
                break
            if tag == ID_TAG:
                form, id_at, kept = form + data[kept:at], (begin, end), end
            elif tag == PARAMETER_TAG:
                content = begin + 2 + data[begin + 1]
                name = data[begin:content]
                is_plain = (data[begin], data[content], content + 2 + data[content + 1]) == (NAME_TAG, CONTENT_TAG, end)
                if name in parameters or not is_plain:  # said twice, the last one counts
                    break
                parameters[name] = data[content:end]
                if name == SEQUENCE_ID and data[content + 2] == INT64_TAG:
                    number, number_end = _varint(data, content + 3)
                    if 0 < number < 2**63 and number_end == end:
                        sequence, parameters[name] = number, b""
                form, kept = form + data[kept:at], end
            at = end
    except (IndexError, UnicodeDecodeError):
        pass  # who reads the message says what is wrong with it
    return Parts()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number as protobuf writes it, and where it ends."""
    number = shift = 0
    while (digit := data[at]) > 127 and shift < 63:
        number |= (digit & 127) << shift
        shift += 7
        at += 1
    return number | digit << shift, at + 1


def read_request(inference: InferenceServer, request: pb.ModelInferRequest) -> Call:
    """What a message asks for. Raises as InferenceServer.read does."""
    parameters = _parameters(request.parameters)
    inputs = _inputs(inference, request)
    outputs = {output.name: _parameters(output.parameters) for output in request.outputs}
    return inference.read(request.model_name, request.model_version, request.id, parameters, inputs, outputs)


def write_response(request: Asked, answer: Answer, response: pb.ModelInferResponse) -> None:
    """Fill in the answer. Outputs go where the request says: into the message, or into shared memory."""
    response.model_name, response.model_version, response.id = request.model_name, answer.version, request.id
    said = {output.name: output.parameters for output in request.outputs}
    for name, value in answer.outputs.items():
        tensor = response.outputs.add(name=name, datatype=DATATYPE_OF[value.dtype], shape=value.shape)
        data = write_tensor(value)
        part = answer.call.places.get(name)
        if part is None:
            response.raw_output_contents.append(data)
        else:
            part.write(name, data)
            parameters = dict(said[name]) | {"shared_memory_byte_size": pb.InferParameter(int64_param=len(data))}
            for each, parameter in parameters.items():
                tensor.parameters[each].CopyFrom(parameter)
    for name, parameter in answer.parameters.items():
        if type(parameter) is int:
            response.parameters[name].int64_param = parameter
        else:
            _set_parameter(response.parameters[name], parameter)


class Template:
    """Answers to requests of one form, which differ in id, times and values: all else is written once.

    A message that is changed again and again would keep all that it has ever held.
    """

    def __init__(self, response: pb.ModelInferResponse) -> None:
        """response: one of these answers."""
        self.version = response.model_version
        self._times = pb.ModelInferResponse(parameters=response.parameters)
        self._parameters = {name: self._times.parameters[name] for name in response.parameters}
        others = pb.ModelInferResponse()
        others.CopyFrom(response)
        for field in ("id", "parameters", "raw_output_contents"):
            others.ClearField(field)
        self._others = others.SerializeToString()

    def write(self, identity: str, answer: Answer) -> bytes:
        """The ModelStreamInferResponse."""
        for name, parameter in answer.parameters.items():
            if type(parameter) is int:
                self._parameters[name].int64_param = parameter
        name_bytes = identity.encode()
        parts = [self._others, self._times.SerializeToString(), _head(ID_TAG, len(name_bytes)), name_bytes]
        for value in answer.outputs.values():
            data = write_tensor(value)
            parts += _head(OUTPUT_TAG, len(data)), data
        return b"".join((_head(ANSWER_TAG, sum(map(len, parts))), *parts))


def _head(tag: int, size: int) -> bytes:
    """What protobuf writes before a field of so many bytes."""
    head = [tag]
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head)


def _inputs(inference: InferenceServer, request: pb.ModelInferRequest) -> list[Input]:
    raw = iter(request.raw_input_contents)
    inputs: list[Input] = []
    num_raw = 0
    for tensor in request.inputs:
        part = inference.memory.part(_parameters(tensor.parameters)) if tensor.parameters else None
        data: Any
        if part is not None:
            data = part.read()
        elif request.raw_input_contents:
            num_raw += 1
            data = next(raw, None)
        else:
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


def _filled(message: M, values: dict[str, Any]) -> M:
    json_format.ParseDict(values, message)
    return message


def _parameters(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for name in parameters:
        value = parameters[name]
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidInput(f"parameter '{name}' arrived without a value")
        found[name] = getattr(value, kind)
    return found


def _set_parameter(target: Message, value: Parameter) -> None:
    field = {bool: "bool_param", int: "uint32_param", str: "string_param", float: "double_param"}[type(value)]
    setattr(target, field, value)
