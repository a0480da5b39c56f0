"""Sessions over HTTP: segments are posted, outputs fetched until they are acknowledged; docs/protocol.md has it all."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, NamedTuple

import httpx
import numpy as np
from fastapi import APIRouter, FastAPI, Query, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from serve_app.directory import Described
from serve_app.errors import InvalidInput, LockstepError, SessionEnded, Unavailable, UnknownSession
from serve_app.frame import UNKNOWN
from serve_app.ingress import oip_http
from serve_app.ingress.codec import (
    JSON,
    MSGPACK,
    OVERHEAD_BYTES,
    Encoding,
    Message,
    describe_model,
    describe_numbers,
    describe_outputs,
    describe_session,
    max_body,
    read_raw,
)
from serve_app.ingress.hub import Hub
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.peers import NOT_HERE, Gone, NotHere, Peers
from serve_app.ingress.presence import while_there
from serve_app.ingress.websocket import converse
from serve_app.segment import Outputs
from serve_app.session import Session

logger = logging.getLogger(__name__)

MAX_WAIT_S = 30.0
MAX_LISTED = 1000
CARRIED = ("content-type", "accept")
"""Headers of a request that mean something to another ingress."""
FROM_PEER, BODY = "lockstep.from_peer", "lockstep.body"
"""In the scope of a request: it has come by another ingress; its body, where that was read before its turn."""
RAW = "application/octet-stream"
MSGPACK_TYPES = {"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"}

# What the pages under /docs show; codec.py is what reads and writes.


class TensorBody(BaseModel):
    shape: list[int]
    dtype: str


class LimitsBody(BaseModel):
    max_segment: int
    max_window: int
    refuse_nan: bool


class ModelBody(BaseModel):
    model: str
    input: TensorBody
    outputs: dict[str, TensorBody]
    sample_rate: int | None = None


class ModelsBody(BaseModel):
    models: list[ModelBody]


class NumbersBody(BaseModel):
    next: int
    progress: int
    acked: int
    rewind: int


class OpenBody(BaseModel):
    session: str | None = None
    model: str | None = None
    initial_state: list[Any] | None = None
    priority: int | None = None
    max_wait_s: float | None = None


class OpenedBody(ModelBody, NumbersBody):
    session: str
    limits: LimitsBody


class SegmentBody(BaseModel):
    x: list[Any]
    start: int | None = None
    acked: int | None = None


class AcceptedBody(NumbersBody):
    end: int


class OutputsBody(NumbersBody):
    start: int
    end: int
    outputs: dict[str, list[Any]]
    queue_us: int
    compute_us: int
    batch_size: int
    ended: str | None = None


class DescribedBody(BaseModel):
    session: str
    model: str | None
    owner: str | None
    sender: str
    epoch: int
    resumable: bool


class MigratedBody(BaseModel):
    session: str
    owner: str = Field(description="the replica that it leaves")


class SessionsBody(BaseModel):
    sessions: list[DescribedBody]


class SessionBody(DescribedBody):
    next: int | None = None
    progress: int | None = None
    acked: int | None = None
    rewind: int | None = None
    ended: str | None = None


class EndedBody(BaseModel):
    reason: str
    next: int | None = None
    progress: int | None = None
    acked: int | None = None
    rewind: int | None = None


class ErrorValues(BaseModel):
    code: str
    message: str
    retry: bool
    details: dict[str, Any]


class ErrorBody(BaseModel):
    error: ErrorValues


class HttpCall(NamedTuple):
    """A request for the ingress that has its session. target: path and query."""

    session: str
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class HttpReply(NamedTuple):
    """What that answers."""

    status: int
    headers: dict[str, str]
    body: bytes


class Answered(Exception):
    """Another ingress has done what was asked for."""

    def __init__(self, reply: HttpReply) -> None:
        super().__init__(reply.status)
        self.reply = reply


class Route(APIRoute):
    """A route that answers what nobody foresaw as it answers other errors, and logs it once."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except Answered as answered:
                return Response(answered.reply.body, answered.reply.status, answered.reply.headers)
            except (LockstepError, HTTPException, RequestValidationError):
                raise
            except Exception:
                logger.exception("%s %s failed", request.method, request.url.path)
                return await _on_error(request, LockstepError("an unexpected error: the server's log has it"))

        return guarded


router = APIRouter(
    prefix="/v1", route_class=Route, responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
)


def build_http(hub: Hub, inference: InferenceServer | None = None) -> FastAPI:
    """The application. `hub` keeps outputs until they are acknowledged (`ack_on_receipt=False`).

    inference: what speaks the Open Inference Protocol for that hub (None: a new one).
    """
    app = FastAPI(
        title="Lockstep", description="Recurrent models for live sessions; docs/protocol.md explains the numbers."
    )
    app.state.hub, app.state.inference = hub, inference or InferenceServer(hub)
    app.state.peers = app.state.inference.peers
    app.state.peers.on(HttpCall, partial(_answer_peer, app))
    app.include_router(router)
    app.include_router(oip_http.router)
    app.add_exception_handler(LockstepError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameter)
    return app


def _body_of(model: type[BaseModel], *, required: bool, raw: bool = False) -> dict[str, Any]:
    schema = model.model_json_schema()
    content: dict[str, Any] = {kind: {"schema": schema} for kind in (JSON.media_type, MSGPACK.media_type)}
    if raw:
        content[RAW] = {"schema": {"type": "string", "format": "binary", "description": "timesteps, little-endian"}}
    return {"requestBody": {"required": required, "content": content}}


@router.post("/sessions", status_code=201, response_model=OpenedBody, openapi_extra=_body_of(OpenBody, required=False))
async def open_session(request: Request) -> Response:
    """Open a session. Without `session` it gets an id of its own; `model` may be left out where there is one."""
    hub = _hub(request)
    limit = OVERHEAD_BYTES
    if int(request.headers.get("content-length", limit + 1)) > limit:
        limit = max_body(max((spec.state_bytes for spec in (await hub.models()).values()), default=0))
    message = await _read_message(request, limit, empty=True)
    message.only("session", "model", "initial_state", "priority", "max_wait_s")
    name = message.text("session")
    if name is not None and "/" in name:
        raise InvalidInput(f"session {name!r} has a '/' in it, and would not fit into a path: choose another id")
    model, state = message.text("model"), message.arrays("initial_state")
    opening = hub.open(name, model, state, resumable=True, keep=False, turn=message.turn())
    session = await while_there(request, opening)
    return _answer(request, describe_session(session), 201)


@router.get("/sessions", response_model=SessionsBody)
async def list_sessions(
    request: Request,
    after: Annotated[str, Query(description="the last one of the list before")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="sessions of this list, at most")] = 100,
) -> Response:
    """The sessions of all clients of the application, by id."""
    sessions = await _hub(request).sessions(after, limit)
    return _answer(request, {"sessions": [session._asdict() for session in sessions]})


@router.post("/sessions/{session:path}/migrate", response_model=MigratedBody)
async def migrate_session(
    request: Request,
    session: str,
    to: Annotated[str | None, Query(description="the replica that is to have it; any other, if left out")] = None,
) -> Response:
    """Have a session go on at another replica, state and all. Its client does not notice."""
    return _answer(request, {"session": session, "owner": await _hub(request).migrate(session, to)})


@router.delete("/sessions/{session:path}", response_model=EndedBody)
async def close_session(
    request: Request,
    session: str,
    start: Annotated[int | None, Query(ge=0, description="timesteps submitted; anything else is refused")] = None,
    abort: Annotated[bool, Query(description="drop what has not run, and outputs not fetched")] = False,
) -> Response:
    """Close a session, and wait until all that was submitted has run. Outputs stay until acknowledged.

    A session whose way in cannot be asked can be aborted only: what its client has submitted is not known here.
    """
    hub = _hub(request)
    held = await _find(request, session, take_over=not abort)
    if held is None:
        if not abort:
            await hub.describe(session)
            raise InvalidInput(f"session {session!r} has another way in, which could close it: end it with abort=true")
        await hub.drop(session)
        return _answer(request, {"reason": "aborted"})
    if abort:
        held.abort()
        held.ack(held.progress)
    else:
        held.close(start)
    reason = await held.closed()
    return _answer(request, {"reason": reason, **describe_numbers(held)})


@router.post(
    "/sessions/{session}/segments",
    status_code=202,
    response_model=AcceptedBody,
    openapi_extra=_body_of(SegmentBody, required=True, raw=True),
)
async def submit_segment(
    request: Request,
    session: str,
    start: Annotated[int | None, Query(ge=0, description="with raw bytes: first timestep of the segment")] = None,
    acked: Annotated[int | None, Query(ge=0, description="with raw bytes: outputs below are here")] = None,
) -> Response:
    """Submit a segment; outputs are fetched by another call. A resend is known by its `start`, and not run again."""
    held = await _get(request, session)
    spec, limit = held.spec.input, max_body(held.limits.max_segment * held.spec.input.nbytes)
    if _content_type(request) == RAW:
        x = read_raw(await _read_body(request, limit), "the body", spec)
    else:
        message = await _read_message(request, limit)
        message.only("x", "start", "acked")
        if (start, acked) != (None, None):
            raise InvalidInput("start and acked belong into the body: they are query parameters of raw bytes only")
        x, start, acked = message.array("x", spec), message.number("start"), message.number("acked")
    held.ack(acked or 0)
    end = held.submit(x, start)
    return _answer(request, {"end": end, **describe_numbers(held)}, 202)


@router.get("/sessions/{session}/outputs", response_model=OutputsBody)
async def fetch_outputs(
    request: Request,
    session: str,
    start: Annotated[int | None, Query(ge=0, description="first timestep wanted; default: from `acked` on")] = None,
    wait_s: Annotated[float, Query(ge=0, description=f"wait so long for a first one, {MAX_WAIT_S:g} at most")] = 0.0,
) -> Response:
    """Outputs from `start` on, as many as there are and fit. Asking from `start` acknowledges those below."""
    held = await _get(request, session)
    start = held.acked if start is None else start
    if not held.acked <= start <= held.next:
        raise InvalidInput(
            f"outputs of session {session!r} from timestep {start} on were asked for: those below {held.acked} were "
            f"acknowledged and are gone, and {held.next} timesteps are submitted"
        )
    held.ack(min(start, held.progress))
    with suppress(TimeoutError):
        async with asyncio.timeout(min(wait_s, MAX_WAIT_S)):
            await held.available(start)
    encoding = _accepted(request)
    none = Outputs(start, {name: np.empty((0, *o.shape), o.dtype) for name, o in held.spec.outputs.items()})
    outputs = next(encoding.cut(held.peek(start) or none, held.spec), none)
    ended = {"ended": held.end_reason} if held.end_reason is not None and outputs.end == held.progress else {}
    return _answer(request, {**describe_outputs(held, outputs), **ended})


@router.get("/sessions/{session:path}", response_model=SessionBody)
async def show_session(request: Request, session: str) -> Response:
    """Who has a session; and how far it is, if its way in can be asked."""
    hub = _hub(request)
    held = await _find(request, session, take_over=False)
    if held is None:
        return _answer(request, (await hub.describe(session))._asdict())
    described = Described(held.name, held.spec.name, held.owner, hub.sender, held.epoch, held.stays)
    ended = {} if held.end_reason is None else {"ended": held.end_reason}
    return _answer(request, {**described._asdict(), **describe_numbers(held), **ended})


@router.get("/models", response_model=ModelsBody)
async def list_models(request: Request) -> Response:
    """The models that are served."""
    models = await _hub(request).models()
    return _answer(request, {"models": [describe_model(models[name]) for name in sorted(models)]})


@router.get("/health/live")
async def live(request: Request) -> Response:
    """Whether this process answers."""
    return _answer(request, {"status": "alive"})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Whether a model can be asked."""
    inference: InferenceServer = request.app.state.inference
    models = [*dict.fromkeys(model["name"] for model in await inference.index(only_ready=False))]
    if not models:
        raise Unavailable("no replica is ready: try again in a moment")
    return _answer(request, {"status": "ready", "models": models})


@router.websocket("/session")
async def session_websocket(websocket: WebSocket) -> None:
    """A session as a conversation."""
    await converse(websocket, _hub(websocket))


def _peers(request: Request) -> Peers:
    peers: Peers = request.app.state.peers
    return peers


def _hub(connection: HTTPConnection) -> Hub:
    hub: Hub = connection.app.state.hub
    return hub


async def _get(request: Request, name: str) -> Session:
    """See `_find`. Raises UnknownSession, SessionEnded."""
    return await _find(request, name, take_over=True) or _hub(request).get(name)


async def _find(request: Request, name: str, *, take_over: bool) -> Session | None:
    """The session, where this is its way in, or is from now on: the one that was is gone. None: it has another.

    Raises Answered when another ingress has it, and has done all that there is to do; SessionEnded.
    """
    hub, peers = _hub(request), _peers(request)
    held = hub.find(name)
    if held is not None or FROM_PEER in request.scope:
        return held
    try:
        await peers.sender_of(name)  # before the body is read
        request.scope[BODY] = await _read_body(request, oip_http.MAX_BODY)
        target = f"{request.url.path}?{request.url.query}"
        headers = {header: request.headers[header] for header in CARRIED if header in request.headers}
        raise Answered(await peers.ask(name, HttpCall(name, request.method, target, headers, request.scope[BODY])))
    except UnknownSession:
        return None
    except Gone:
        if not take_over:
            return None
    session = await hub.resume(name, UNKNOWN, keep=False)
    session.must_number()
    return session


async def _answer_peer(app: FastAPI, call: HttpCall, asker_lost: asyncio.Event) -> HttpReply | NotHere:
    """Do what another ingress was asked to do with a session that is here."""
    with suppress(SessionEnded):  # which the answer will say
        if app.state.hub.find(call.session) is None:
            return NOT_HERE

    async def from_peer(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, FROM_PEER: True}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(from_peer), base_url="http://peer") as client:
        response = await client.request(call.method, call.target, headers=call.headers, content=call.body)
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    return HttpReply(response.status_code, headers, response.content)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", JSON.media_type).partition(";")[0].strip().lower()


def _accepted(request: Request) -> Encoding:
    return MSGPACK if "msgpack" in request.headers.get("accept", "") else JSON


async def _read_message(request: Request, limit: int, *, empty: bool = False) -> Message:
    """The body as a message; `empty`: none at all is one without keys."""
    kind = _content_type(request)
    if kind not in MSGPACK_TYPES | {JSON.media_type}:
        raise HTTPException(415, f"the body is {kind}, expected {JSON.media_type} or {MSGPACK.media_type}")
    body = await _read_body(request, limit)
    if empty and not body:
        return Message({})
    return (MSGPACK if kind in MSGPACK_TYPES else JSON).decode(body)


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, of which no more than `limit` bytes are ever held."""
    parts, size = [], 0
    if BODY in request.scope and len(body := request.scope[BODY]) <= limit:
        return bytes(body)
    if int(request.headers.get("content-length", 0)) <= limit:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                break
        else:
            return b"".join(parts)
    raise HTTPException(413, f"the body is longer than {limit} bytes, all that the limits allow for: send it in parts")


def _answer(
    request: Request, values: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    encoding = _accepted(request)
    return Response(encoding.encode(values), status, headers, encoding.media_type)


async def _on_error(request: Request, error: Exception, status: int | None = None) -> Response:
    assert isinstance(error, LockstepError)
    status = status or error.http
    headers = {"Retry-After": str(error.retry_after_s)} if status in (429, 503, 504) else None
    return _answer(request, {"error": error.to_wire()}, status, headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What HTTP itself refuses: an unknown route, a method, a body too long."""
    assert isinstance(error, HTTPException)
    told = InvalidInput(f"{request.method} {request.url.path}: {error.detail}")
    response = await _on_error(request, told, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _on_invalid_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}, not {problem['input']!r}" for problem in error.errors())
    return await _on_error(request, InvalidInput(wrong))
