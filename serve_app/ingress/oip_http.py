"""The Open Inference Protocol over HTTP: JSON, with tensors as bytes behind it where the client says so."""

import asyncio
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from serve_app.errors import InvalidInput, LockstepError
from serve_app.ingress.oip import DATATYPE_OF, Answer, Call, InferenceServer, Input, client_name, write_tensor
from serve_app.ingress.presence import while_there
from serve_app.ingress.sequences import Request as SequenceRequest
from serve_app.spec import split_name

logger = logging.getLogger(__name__)

JSON_LENGTH = "Inference-Header-Content-Length"
MAX_BODY = 256 * 2**20
"""Bytes of a request, unpacked."""
MAX_JSON = 16 * 2**20
"""Of that, what is JSON: nothing else runs while it is read."""
MAX_DIGITS = 20


class Route(APIRoute):
    """A route that tells errors as this protocol does: {"error": text}."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except LockstepError as error:
                headers = {"Retry-After": str(error.retry_after_s)} if error.retry else None
                expected = {name: error.details[name] for name in ("expected",) if name in error.details}
                return _json({"error": error.message, **expected}, error.http, headers)
            except HTTPException as error:
                return _json({"error": error.detail}, error.status_code)
            except Exception:
                logger.exception("%s %s failed", request.method, request.url.path)
                return _json({"error": "an unexpected error: the server's log has it"}, 500)

        return guarded


router = APIRouter(prefix="/v2", route_class=Route, include_in_schema=False)  # the protocol describes itself


@router.get("/health/live")
async def live() -> Response:
    """Whether this process answers."""
    return _json({"live": True})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Whether models can be asked."""
    found = await _inference(request).ready()
    return _json({"ready": found}, 200 if found else 503)


@router.get("")
@router.get("/")
async def server_metadata(request: Request) -> Response:
    """What this server is."""
    return _json(_inference(request).server_metadata())


@router.get("/models/stats")
async def all_statistics(request: Request) -> Response:
    """What all models have done."""
    return _json({"model_stats": await _inference(request).statistics("", "")})


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(request: Request, model: str, version: str = "") -> Response:
    """Whether one model can be asked."""
    found = await _inference(request).model_ready(model, version)
    return _json({"name": model, "ready": found}, 200 if found else 400)


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def metadata(request: Request, model: str, version: str = "") -> Response:
    """What a model takes and gives."""
    return _json(await _inference(request).metadata(model, version))


@router.get("/models/{model}/config")
@router.get("/models/{model}/versions/{version}/config")
async def config(request: Request, model: str, version: str = "") -> Response:
    """How a model is served."""
    return _json(await _inference(request).config(model, version))


@router.get("/models/{model}/stats")
@router.get("/models/{model}/versions/{version}/stats")
async def statistics(request: Request, model: str, version: str = "") -> Response:
    """What a model has done."""
    return _json({"model_stats": await _inference(request).statistics(model, version)})


@router.post("/models/{model}/infer")
@router.post("/models/{model}/versions/{version}/infer")
async def infer(request: Request, model: str, version: str = "") -> Response:
    """Run one request."""
    inference = _inference(request)
    head, tail = await _read_body(request)
    call, wanted = await inference.know(partial(_read_request, inference, model, version, head, tail))
    answering = inference.infer(call, client_name(request.headers))
    waits = isinstance(call.request, SequenceRequest) and call.request.start
    answer = await (while_there(request, answering) if waits else answering)
    return _write_response(request, answer, wanted, _mapping(head, "parameters"))


@router.post("/repository/index")
async def index(request: Request) -> Response:
    """The models that are configured."""
    wanted = await _read_json(request)
    return _json(await _inference(request).index(only_ready=wanted.get("ready") is True))


@router.post("/repository/models/{model}/load")
async def load(request: Request, model: str) -> Response:
    """Serve a configured model (again)."""
    await _inference(request).load(model)
    return _json({})


@router.post("/repository/models/{model}/unload")
async def unload(request: Request, model: str) -> Response:
    """Start no new sequences of a model."""
    await _inference(request).unload(model)
    return _json({})


@router.get("/systemsharedmemory/status")
@router.get("/systemsharedmemory/region/{region}/status")
async def memory_status(request: Request, region: str = "") -> Response:
    """The regions that are registered."""
    return _json(list((await _inference(request).regions(region)).values()))


@router.post("/systemsharedmemory/region/{region}/register")
async def memory_register(request: Request, region: str) -> Response:
    """Map a region."""
    wanted = await _read_json(request)
    key, offset, byte_size = wanted.get("key"), wanted.get("offset", 0), wanted.get("byte_size")
    if not isinstance(key, str) or type(offset) is not int or type(byte_size) is not int:
        raise InvalidInput(f"region '{region}' needs key, a text, and byte_size, a whole number; offset may be one")
    await _inference(request).register_region(region, key, offset, byte_size)
    return _json({})


@router.post("/systemsharedmemory/unregister")
@router.post("/systemsharedmemory/region/{region}/unregister")
async def memory_unregister(request: Request, region: str = "") -> Response:
    """Forget a region, or all."""
    await _inference(request).unregister_region(region)
    return _json({})


@router.get("/cudasharedmemory/status")
@router.get("/cudasharedmemory/region/{region}/status")
async def cuda_memory_status(region: str = "") -> Response:
    """None is ever registered."""
    return _json([])


@router.post("/cudasharedmemory/region/{region}/register")
async def cuda_memory_register(region: str) -> Response:
    """Refused: the way in has no GPU."""
    raise InvalidInput(
        f"failed to register CUDA shared memory region '{region}': use system shared memory, inputs arrive at a "
        "process without a GPU"
    )


@router.post("/cudasharedmemory/unregister")
@router.post("/cudasharedmemory/region/{region}/unregister")
async def cuda_memory_unregister(region: str = "") -> Response:
    """There is nothing to forget."""
    return _json({})


@router.api_route("/trace/setting", methods=["GET", "POST"])
@router.api_route("/models/{model}/trace/setting", methods=["GET", "POST"])
async def trace_setting(request: Request, model: str = "") -> Response:
    """What is traced: nothing, whatever is asked for."""
    settings = _inference(request).trace
    return _json({name: value if name == "trace_level" else value[0] for name, value in settings.items()})


@router.api_route("/logging", methods=["GET", "POST"])
async def logging_settings(request: Request) -> Response:
    """What is logged; Serve's configuration says it."""
    return _json(_inference(request).log)


def _inference(request: Request) -> InferenceServer:
    inference: InferenceServer = request.app.state.inference
    return inference


def _json(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(values), status, headers, "application/json")


async def _read_json(request: Request) -> dict[str, Any]:
    head, _ = await _read_body(request)
    return head


async def _read_body(request: Request) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a request (none: without keys), and the bytes behind it."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MAX_BODY:
            raise HTTPException(413, f"the body is longer than {MAX_BODY} bytes: send it in parts")
    body = b"".join(parts)
    if encoding := request.headers.get("content-encoding", ""):
        body = await asyncio.to_thread(_unpacked, body, encoding)
    length = request.headers.get(JSON_LENGTH, str(len(body)))
    if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > len(body):
        raise InvalidInput(f"{JSON_LENGTH} is {length:.80}, the body has {len(body)} bytes")
    if int(length) > MAX_JSON:
        text = f"the JSON has {length} bytes, the limit is {MAX_JSON}: send tensors as bytes behind it, or in parts"
        raise HTTPException(413, text)
    view = memoryview(body)
    try:
        head = json.loads(bytes(view[: int(length)]) or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"failed to parse the request JSON buffer: {error}") from error
    if not isinstance(head, dict):
        raise InvalidInput("failed to parse the request JSON buffer: it has to be an object")
    return head, view[int(length) :]


def _unpacked(body: bytes, encoding: str) -> bytes:
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise HTTPException(415, f"Content-Encoding is {encoding!r}, expected gzip or deflate")
    unpacker = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15)
    try:
        data = unpacker.decompress(body, MAX_BODY)
    except zlib.error as error:
        raise InvalidInput(f"the body is no {encoding}: {error}") from error
    if not unpacker.eof:
        raise InvalidInput(f"the body is cut off, or longer than {MAX_BODY} bytes when unpacked")
    return data


def _read_request(
    inference: InferenceServer, model: str, version: str, head: dict[str, Any], tail: memoryview
) -> tuple[Call, dict[str, dict[str, Any]]]:
    """The call, and the parameters of each output that is asked for."""
    parameters = _mapping(head, "parameters")
    inputs, at = [], 0
    for tensor in _objects(head, "inputs"):
        of_tensor = _mapping(tensor, "parameters")
        size = of_tensor.get("binary_data_size")
        data: Any
        part = inference.memory.part(of_tensor)
        if part is not None:
            data = part.read()
        elif size is not None:
            if type(size) is not int or not 0 <= size <= len(tail) - at:
                raise InvalidInput(f"binary_data_size is {size!r}, {len(tail) - at} bytes are left behind the JSON")
            data, at = tail[at : at + size], at + size
        else:
            data = _flat(tensor.get("data"))
        shape = tensor.get("shape")
        if not isinstance(shape, list):
            raise InvalidInput(f"input '{tensor.get('name')}' has no shape: a list of whole numbers")
        inputs.append(Input(str(tensor.get("name")), str(tensor.get("datatype")), shape, data))
    if at != len(tail):
        raise InvalidInput(f"{len(tail) - at} bytes behind the JSON belong to no input")
    outputs = {str(output.get("name")): _mapping(output, "parameters") for output in _objects(head, "outputs")}
    identity = head.get("id", "")
    if not isinstance(identity, str):
        raise InvalidInput(f"id is {identity!r}, expected a text")
    return inference.read(model, version, identity, parameters, inputs, outputs), outputs


def _write_response(
    request: Request,
    answer: Answer,
    wanted: dict[str, dict[str, Any]],
    parameters: dict[str, Any],
) -> Response:
    """Outputs as JSON, as bytes behind it, or in shared memory, as the request says for each."""
    all_binary = parameters.get("binary_data_output") is True
    described, tail = [], []
    for name, value in answer.outputs.items():
        tensor: dict[str, Any] = {
            "name": name, "datatype": DATATYPE_OF[value.dtype], "shape": list(value.shape),
        }  # fmt: skip
        of_output = wanted.get(name, {})
        part = answer.call.places.get(name)
        data = write_tensor(value)
        if part is not None:
            part.write(name, data)
            tensor["parameters"] = {**of_output, "shared_memory_byte_size": len(data)}
        elif of_output.get("binary_data", all_binary) is True:
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail.append(data)
        else:
            tensor["data"] = _json_values(value)
        described.append(tensor)
    head = json.dumps(
        {
            "model_name": split_name(answer.call.spec.name)[0],
            "model_version": answer.version,
            "id": answer.call.id,
            "parameters": dict(answer.parameters),
            "outputs": described,
        }
    ).encode()
    headers = {JSON_LENGTH: str(len(head))} if tail else {}
    body = b"".join([head, *tail])
    accepted = request.headers.get("accept-encoding", "")
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        if encoding in accepted:
            body, headers["Content-Encoding"] = pack(body), encoding
            break
    return Response(body, 200, headers, "application/octet-stream" if tail else "application/json")


def _mapping(values: dict[str, Any], key: str) -> dict[str, Any]:
    found: Any = values.get(key, {})
    if not isinstance(found, dict):
        raise InvalidInput(f"{key} has to be an object")
    return found


def _objects(values: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found: Any = values.get(key, [])
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InvalidInput(f"{key} has to be a list of objects")
    return found


def _flat(data: Any) -> list[Any]:
    """JSON's data, whose nesting is free."""
    if not isinstance(data, list):
        raise InvalidInput("an input has neither data, a list, nor binary_data_size, nor a shared_memory_region")
    values: list[Any] = data
    while values and all(isinstance(item, list) for item in values):
        values = [value for item in values for value in item]
    return values


def _json_values(value: np.ndarray) -> list[Any]:
    """One after the other; JSON has no number for NaN and infinity."""
    flat: np.ndarray = value.reshape(-1)
    if flat.dtype == object:
        return [each.decode(errors="replace") for each in flat]
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        return [number if np.isfinite(number) else None for number in flat.tolist()]
    numbers: list[Any] = flat.tolist()
    return numbers
