"""The Open Inference Protocol over a hub, in plain values. oip_grpc and oip_http put these into their messages.

The input of a model with sequences is [T, *features]: any number of timesteps. A leading dimension of 1, as clients of
batched models send it, is taken as well, and given back. The inputs of a stateless model are [rows, *shape].
"""

import asyncio
import hashlib
import logging
import math
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, NoReturn, TypeVar
from uuid import uuid4

import numpy as np

from serve_app.errors import InvalidInput, LockstepError, Unavailable, UnknownModel, UnknownRegion
from serve_app.ingress.batched import BatchedModels, NoModels
from serve_app.ingress.catalog import Catalog, Spec
from serve_app.ingress.codec import MAX_NAME, is_unicode
from serve_app.ingress.hub import Hub
from serve_app.ingress.model_control import WATCH_S, Marks, ModelControl
from serve_app.ingress.peers import Peers
from serve_app.ingress.sequences import Forwarded, LetGo, Request, Result, SequenceId, Space
from serve_app.ingress.shared_memory import Part, SharedMemory
from serve_app.ingress.siblings import CountsOf, NoSiblings, Question, Regions, Siblings, Unregister
from serve_app.rows import BatchedSpec, RowsRequest, RowsResult, check_rows
from serve_app.spec import ModelSpec, TensorSpec, split_name

logger = logging.getLogger(__name__)

NAME, SERVER_VERSION = "lockstep", "2"
EXTENSIONS = (
    "binary_tensor_data",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "sequence",
    "sequence(string_id)",
    "statistics",
    "system_shared_memory",
    "trace",
)
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8",
    "int16": "INT16", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
    "object": "BYTES",
}  # fmt: skip
DTYPES = {datatype: np.dtype(name).newbyteorder("<") for name, datatype in DATATYPES.items()}
DATATYPE_OF = {np.dtype(name): datatype for name, datatype in DATATYPES.items()}
LENGTH_BYTES = 4
"""Before each element of BYTES, where they come as one after the other: its length, little-endian."""
LITTLE_ENDIAN = sys.byteorder == "little"
FRESH_S = 0.2
"""What was seen of the models not longer ago is as they are."""
MAX_DIMS = 32
MIN_NAMED = 64
"""Clients with a name that are remembered, though they use nothing; of more it is looked who does."""
MAX_FORMS = 256
"""Requests have others where sequences start and end, and for each number of timesteps."""
NOT_KNOWN = UnknownModel, Unavailable, UnknownRegion
"""What `InferenceServer.know` knows a way out of."""
T = TypeVar("T")
Parameter = bool | int | str | float
Parameters = Mapping[str, Parameter]
NOWHERE: Mapping[str, Part] = {}


class Input(NamedTuple):
    """A tensor as it came: its values are `data`, bytes or numbers one after the other."""

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes | memoryview | Sequence[Any]


class Call(NamedTuple):
    """An inference request that has been read, and what its answer needs."""

    request: Request | RowsRequest
    spec: Spec
    id: str
    outputs: Sequence[str]
    #: Its input came with a leading dimension of 1.
    batched: bool
    #: The client asked to be told with each response whether it is the last.
    tells_final: bool
    began_ns: int
    #: Where outputs go that are not to be in the answer.
    places: Mapping[str, Part] = NOWHERE

    @property
    def nbytes(self) -> int:
        """Bytes of its inputs."""
        request = self.request
        if isinstance(request, RowsRequest):
            return sum(x.nbytes for x in request.inputs.values())
        return request.x.nbytes


@dataclass(slots=True)
class Form:
    """What calls have in common that differ only in their ids, sequences and values.

    call: one of them, without these. model, version: as they say them. template: what whoever writes their answers
    wants to have at hand.
    """

    call: Call
    model: str
    version: str
    dtype: np.dtype
    shape: Sequence[int]
    template: Any = None


class Answer(NamedTuple):
    """What a call comes back with, and from which version of its model."""

    call: Call
    version: str
    outputs: Mapping[str, np.ndarray]
    parameters: Parameters


class InferenceServer:
    """The models behind a hub, as the protocol sees them."""

    def __init__(
        self,
        hub: Hub,
        batched: BatchedModels | None = None,
        control: ModelControl | None = None,
        peers: Peers | None = None,
        siblings: Siblings | None = None,
    ) -> None:
        """peers, siblings: the other ingresses (None: there are none)."""
        self.peers = peers or Peers(hub)
        self.peers.on(Forwarded, self._run_forwarded)
        self.peers.on(LetGo, self._let_go)
        self.memory = SharedMemory()
        #: Settings that clients may read and write, with the values they have here. Nothing is traced.
        self.trace: dict[str, list[str]] = {"trace_level": ["OFF"], "trace_rate": ["1000"], "trace_count": ["-1"]}
        self.log: dict[str, bool | int | str] = {"log_info": True, "log_warning": True, "log_error": True}
        self._siblings = siblings or NoSiblings()
        self._hub = hub
        self._batched = batched or NoModels()
        self._looked_at, self._refreshing = -math.inf, asyncio.Lock()
        #: Of calls that have been read, by the bytes by which it is known; forgotten when models change.
        self.forms: dict[bytes, Form] = {}
        self._control = control or Marks()
        self._catalog = Catalog(hub, self._batched, self._control)
        self._shared = Space(hub, "", None, self.peers)
        self._named: dict[str, Space] = {}
        self._max_named = MIN_NAMED
        self._statistics: dict[str, Statistics] = {}

    # Health and description.

    async def ready(self) -> bool:
        """Whether every model that is not unloaded can be asked."""
        await self.look()
        return bool(self._catalog.specs)

    async def model_ready(self, name: str, version: str) -> bool:
        """Whether the model can be asked."""
        await self.look()
        spec, catalog = self._catalog.find(name, version), self._catalog
        return spec is not None and spec.name in catalog.specs and spec.name not in catalog.unloaded

    def server_metadata(self) -> dict[str, Any]:
        """ServerMetadataResponse."""
        return {"name": NAME, "version": SERVER_VERSION, "extensions": list(EXTENSIONS)}

    async def metadata(self, name: str, version: str) -> dict[str, Any]:
        """ModelMetadataResponse. Raises UnknownModel."""
        spec = await self._spec(name, version)
        return {
            "name": split_name(spec.name)[0],
            "versions": [split_name(each)[1] for each in reversed(self._catalog.names(name))],
            "platform": _platform(spec),
            "inputs": [_describe(each, tensor) for each, tensor in _inputs(spec).items()],
            "outputs": [_describe(output, tensor) for output, tensor in spec.outputs.items()],
        }

    async def config(self, name: str, version: str) -> dict[str, Any]:
        """ModelConfig. Raises UnknownModel."""
        spec = await self._spec(name, version)
        optional = spec.optional if isinstance(spec, BatchedSpec) else ()
        timesteps = () if isinstance(spec, BatchedSpec) else (-1,)
        rate = None if isinstance(spec, BatchedSpec) else spec.sample_rate
        return {
            "name": split_name(spec.name)[0],
            "platform": _platform(spec),
            "backend": NAME,
            "input": [
                {**_configured(each, tensor, timesteps), "optional": each in optional, "is_shape_tensor": False}
                for each, tensor in _inputs(spec).items()
            ],
            "output": [_configured(output, tensor, timesteps) for output, tensor in spec.outputs.items()],
            **_batching(spec),
            "parameters": {} if rate is None else {"sample_rate": {"string_value": str(rate)}},
            "model_transaction_policy": {"decoupled": False},
        }

    async def statistics(self, name: str, version: str) -> list[dict[str, Any]]:
        """ModelStatistics of one model, or of all where no name is given; of all versions, or one.

        Of all ingresses together. Raises UnknownModel.
        """
        await self.look()
        names = self._catalog.names(name, version) if name else sorted(self._catalog.specs)
        sessions = {each: found._asdict() for each, found in (await self._hub.statistics()).items()}
        elsewhere = await self._siblings.ask(CountsOf(names))
        found = {each: self._of(each).with_others(counted[each] for counted in elsewhere) for each in names}
        return [{**counts.described(each), "session_stats": sessions.get(each, {})} for each, counts in found.items()]

    async def index(self, *, only_ready: bool) -> list[dict[str, str]]:
        """The models that are configured, each of their versions."""
        await self.look()
        found, unloaded = [], self._catalog.unloaded
        for served_as in sorted({*self._catalog.specs, *unloaded}):
            state, reason = "READY", ""
            if served_as in unloaded:
                state, reason = ("UNAVAILABLE", "unloaded") if unloaded[served_as] else ("UNLOADING", "")
            if state == "READY" or not only_ready:
                name, version = split_name(served_as)
                found.append({"name": name, "version": version, "state": state, "reason": reason})
        return found

    async def load(self, name: str) -> None:
        """Serve a configured model (again), all of its versions, or one: NAME@VERSION.

        Raises UnknownModel, Unavailable where it cannot start.
        """
        await self.look()
        loading = [self._control.load(each) for each in self._catalog.names(name)]
        found = await asyncio.gather(*loading, return_exceptions=True)
        await self.look()
        for error in filter(None, found):
            raise error

    async def unload(self, name: str) -> None:
        """Open no new sequences of a model, or one version; those that are open go on. Raises UnknownModel."""
        await self.look()
        for each in self._catalog.names(name):
            await self._control.unload(each)
        await self.look()

    def tell(self, question: Question) -> Any:
        """What another ingress asks."""
        match question:
            case CountsOf(models):
                return {name: self._of(name) for name in models}
            case Regions(memory):
                return self.memory.status("") if memory == self.memory.identity else {}
            case Unregister(memory, name):
                return self.memory.unregister(name) if memory == self.memory.identity else None

    # System shared memory. A client registers a region at one ingress, and names it to any on that machine.

    async def regions(self, name: str) -> dict[str, dict[str, str | int]]:
        """SystemSharedMemoryStatus of one region, or of all where no name is given. Raises UnknownRegion."""
        await self._find_regions()
        return self.memory.status(name)

    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map a region. Raises RegionExists, InvalidInput."""
        await self._find_regions()
        self.memory.register(name, key, offset, byte_size)

    async def unregister_region(self, name: str) -> None:
        """Forget a region, or all where no name is given. One that is not there is no error."""
        self.memory.unregister(name)
        await self._siblings.ask(Unregister(self.memory.identity, name))

    async def _find_regions(self) -> None:
        """Map what was registered at other ingresses with the same memory, too."""
        for regions in await self._siblings.ask(Regions(self.memory.identity)):
            for name in regions.keys() - self.memory.status("").keys():
                with suppress(InvalidInput):  # its client has removed it since
                    self.memory.register(**regions[name])

    # Inference.

    def space(self, client: str | None) -> Space:
        """The sequences of a client who has a name, or those that all others share."""
        if client is None:
            return self._shared
        found = self._named.get(client)
        if found is None:
            if len(self._named) >= self._max_named:
                self._named = {name: space for name, space in self._named.items() if space.is_in_use}
                self._max_named = max(MIN_NAMED, 2 * len(self._named))
            found = self._named[client] = Space(self._hub, f"client {client}", client, self.peers)
        return found

    def own_space(self) -> Space:
        """Sequences that nobody else can name."""
        return Space(self._hub, f"stream {uuid4().hex}")

    def read(
        self,
        model: str,
        version: str,
        identity: str,
        parameters: Parameters,
        inputs: Sequence[Input],
        outputs: Mapping[str, Mapping[str, Any]],
    ) -> Call:
        """What a request asks for. Raises InvalidInput, and what `know` knows a way out of.

        outputs: the parameters of those that it names; of none, all are meant.
        """
        began_ns = time.monotonic_ns()
        spec, unloaded = self._catalog.get(model, version), self._catalog.unloaded
        for name in outputs:
            if name not in spec.outputs:
                raise InvalidInput(
                    f"unexpected inference output '{name}' for model '{model}', it has {', '.join(spec.outputs)}"
                )
        final, wanted = _flag(parameters, "triton_enable_empty_final_response"), [*(outputs or spec.outputs)]
        if isinstance(spec, BatchedSpec):
            if spec.name in unloaded:
                raise Unavailable(f"model '{model}' is unloaded: load it first")
            rows = _rows(parameters, inputs, spec)
            places = self._places(outputs, spec, len(next(iter(rows.inputs.values()))))
            return Call(rows, spec, identity, wanted, False, final, began_ns, places)
        sequence, start = _sequence_id(parameters, model), _flag(parameters, "sequence_start")
        if start and spec.name in unloaded:
            raise Unavailable(f"model '{model}' is unloaded: load it before a sequence starts")
        if len(inputs) != 1:
            raise InvalidInput(f"expected 1 inputs but got {len(inputs)} inputs for model '{model}'")
        if inputs[0].name != spec.input_name:
            raise InvalidInput(
                f"unexpected inference input '{inputs[0].name}' for model '{model}', it takes '{spec.input_name}'"
            )
        x, batched = _timesteps(inputs[0], spec)
        end = _flag(parameters, "sequence_end")
        priority, timeout_s = _priority_and_timeout(parameters)
        deadline = began_ns / 1e9 + timeout_s if timeout_s else math.inf
        notice, timestep = _flag(parameters, "sequence_notice"), _timestep(parameters)
        asked = spec.name if version or "@" in model else model  # who says no version keeps that which it began with
        request = Request(asked, sequence, start, end, x, priority, deadline, notice, timestep)
        places = self._places(outputs, spec, len(x))
        return Call(request, spec, identity, wanted, batched, final, began_ns, places)

    def _places(self, outputs: Mapping[str, Mapping[str, Any]], spec: Spec, count: int) -> Mapping[str, Part]:
        """Where outputs of so many rows or timesteps go: they fit, as far as is known before. Raises InvalidInput."""
        parts = {name: self.memory.part(parameters) for name, parameters in outputs.items() if parameters}
        places = {name: part for name, part in parts.items() if part is not None}
        for name, part in places.items():
            tensor = spec.outputs[name]
            if tensor.dtype != "object" and min(tensor.shape, default=0) >= 0:
                part.check_room(name, count * tensor.nbytes)
        return places

    def learn(self, key: bytes, call: Call, model: str, version: str, datatype: str) -> None:
        """Remember the form of a call, if others may have it. Its input came as bytes."""
        request = call.request
        if not isinstance(request, Request) or datatype in ("BOOL", "BYTES"):
            return
        if request.deadline < math.inf or request.timestep is not None:
            return
        if len(self.forms) == MAX_FORMS:
            self.forms.clear()
        without = call._replace(request=request._replace(x=np.empty(0)), id="")
        self.forms[key] = Form(without, model, version, request.x.dtype, request.x.shape)

    def fill(self, form: Form, identity: str, sequence: SequenceId, data: bytes) -> Call | None:
        """A call of that form; None where it is not, since there is more or less data. sequence: 0 for the form's."""
        try:
            x: np.ndarray = np.ndarray(form.shape, form.dtype, data)
        except TypeError:  # less
            return None
        if x.nbytes != len(data):
            return None
        call, of = form.call, form.call.request
        assert isinstance(of, Request)
        request = Request(of.model, sequence or of.sequence, of.start, of.end, x, of.priority, notice=of.notice)
        return Call(request, call.spec, identity, call.outputs, call.batched, call.tells_final, time.monotonic_ns())

    async def look(self) -> None:
        """See which models there are now. Raises Unavailable while the directory starts."""
        if await self._catalog.look():
            self.forms.clear()
        self._looked_at = time.monotonic()

    async def know(self, read: Callable[[], T]) -> T:
        """What `read` returns, which calls that; what is not known here is looked for before it is refused."""
        looked: list[Callable[[], Awaitable[None]]] = []
        while True:
            try:
                return read()
            except NOT_KNOWN as error:
                look = self._find_regions if isinstance(error, UnknownRegion) else self.refresh
                if look in looked:
                    raise
            looked.append(look)
            await look()

    async def refresh(self) -> None:
        """`look`, unless somebody has just done that."""
        async with self._refreshing:
            if time.monotonic() > self._looked_at + FRESH_S:
                await self.look()

    async def watch(self) -> NoReturn:
        """Look again and again, since other ways in load and unload models too."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.refresh()
            except Unavailable:
                pass  # the directory is starting again
            except Exception:
                logger.exception("what others have loaded and unloaded cannot be seen, trying again")

    def answer(self, call: Call, result: Result | RowsResult | LockstepError) -> Answer | LockstepError:
        """What is to be sent; the statistics have it."""
        took_ns = time.monotonic_ns() - call.began_ns
        if isinstance(result, LockstepError):
            self._of(call.spec.name).add_failed(took_ns)
            return result
        timing, values = result.timing, result.values
        if isinstance(result, Result):
            served_as, rows, executions = result.model, 1, 1.0
        else:
            served_as, rows = call.spec.name, len(next(iter(values.values())))
            executions = rows / timing.batch_size
        self._of(served_as).add(rows, executions, took_ns, timing.queue_us * 1000, timing.compute_us * 1000)
        parameters: dict[str, Parameter] = {
            "queue_us": timing.queue_us,
            "compute_us": timing.compute_us,
            "batch_size": timing.batch_size,
            "total_us": took_ns // 1000,
        }
        if not isinstance(result, Result):
            parameters |= {"began_us": call.began_ns // 1000, "queued_us": result.queued_us}
        if call.tells_final:
            parameters["triton_final_response"] = True
        version = split_name(served_as)[1]
        try:
            outputs = {name: values[name][None] if call.batched else values[name] for name in call.outputs}
        except KeyError as error:
            return InvalidInput(
                f"version {version} has no output {error}, the newest has: ask for the version you mean"
            )
        return Answer(call, version, outputs, parameters)

    async def infer(self, call: Call, client: str | None) -> Answer:
        """Run one call of a client. Raises what it fails with."""
        if isinstance(call.request, RowsRequest):
            answer = self.answer(call, await self.run(call))
            if isinstance(answer, LockstepError):
                raise answer
            return answer
        if call.request.notice:
            raise InvalidInput("sequence_notice is set, and this call has one answer: leave it out, or use a stream")
        result: Result | LockstepError
        space = self.space(client)
        try:
            result = await space.run(call.request)
        except LockstepError as error:
            result = error
        except asyncio.CancelledError:
            space.give_up(call.request)
            raise
        answer = self.answer(call, result)
        if isinstance(answer, LockstepError):
            raise answer
        return answer

    async def run(self, call: Call) -> RowsResult | LockstepError:
        """What comes of a call to a stateless model."""
        assert isinstance(call.request, RowsRequest)
        try:
            return await self._batched.infer(call.spec.name, call.request)
        except LockstepError as error:
            return error

    async def _run_forwarded(self, asked: Forwarded, asker_lost: asyncio.Event) -> Any:
        return await self.space(asked.client).run_forwarded(asked.request._replace(asker_lost=asker_lost))

    async def _let_go(self, ask: LetGo, asker_lost: asyncio.Event) -> Any:
        return await self.space(ask.client).let_go(ask)

    async def _spec(self, name: str, version: str) -> Spec:
        if self._catalog.find(name, version) is None:
            await self.look()
        return self._catalog.get(name, version)

    def _of(self, model: str) -> "Statistics":
        found = self._statistics.get(model)
        if found is None:
            found = self._statistics[model] = Statistics()
        return found


@dataclass(slots=True)
class Statistics:
    """Of one model, since this process has started."""

    rows: int = 0
    executions: float = 0.0
    last_ns: int = 0
    answered: int = 0
    answered_ns: int = 0
    queue_ns: int = 0
    compute_ns: int = 0
    output_ns: int = 0
    failed: int = 0
    failed_ns: int = 0

    def add(self, rows: int, executions: float, took_ns: int, queue_ns: int, compute_ns: int) -> None:
        """A request has been answered. executions: its share of the batches that it was in."""
        self.rows += rows
        self.executions += executions
        self.last_ns = time.time_ns()
        self.answered += 1
        self.answered_ns += took_ns
        self.queue_ns += queue_ns
        self.compute_ns += compute_ns
        self.output_ns += max(0, took_ns - queue_ns - compute_ns)

    def add_failed(self, took_ns: int) -> None:
        """A request has failed."""
        self.failed += 1
        self.failed_ns += took_ns

    def with_others(self, others: "Iterable[Statistics]") -> "Statistics":
        """Of this process and others together."""
        total = replace(self)
        for other in others:
            for each in fields(self):
                both = getattr(total, each.name), getattr(other, each.name)
                setattr(total, each.name, max(both) if each.name == "last_ns" else sum(both))
        return total

    def described(self, served_as: str) -> dict[str, Any]:
        """ModelStatistics. What is neither queue nor step is the way there and back: compute_output."""
        name, version = split_name(served_as)
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ns // 10**6,
            "inference_count": self.rows,
            "execution_count": round(self.executions),
            "inference_stats": {
                "success": {"count": self.answered, "ns": self.answered_ns},
                "fail": {"count": self.failed, "ns": self.failed_ns},
                "queue": {"count": self.answered, "ns": self.queue_ns},
                "compute_input": {"count": self.answered, "ns": 0},
                "compute_infer": {"count": self.answered, "ns": self.compute_ns},
                "compute_output": {"count": self.answered, "ns": self.output_ns},
                "cache_hit": {"count": 0, "ns": 0},
                "cache_miss": {"count": 0, "ns": 0},
            },
            "batch_stats": [],
            "memory_usage": [],
            "response_stats": {},
        }


def client_name(headers: Mapping[str, str]) -> str | None:
    """Who sends, as headers or metadata say; None: nobody in particular."""
    name = headers.get("lockstep-client")
    if name and len(name) <= MAX_NAME:
        return name
    token = name or headers.get("authorization")
    return hashlib.sha256(token.encode()).hexdigest() if token else None


def _describe(name: str, spec: TensorSpec) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[spec.dtype], "shape": [-1, *spec.shape]}


def _configured(name: str, spec: TensorSpec, timesteps: tuple[int, ...]) -> dict[str, Any]:
    datatype = DATATYPES[spec.dtype].replace("BYTES", "STRING")
    return {"name": name, "data_type": f"TYPE_{datatype}", "dims": [*timesteps, *spec.shape] or [1]}


def _platform(spec: Spec) -> str:
    return "lockstep_batched" if isinstance(spec, BatchedSpec) else "lockstep_recurrent"


def _inputs(spec: Spec) -> Mapping[str, TensorSpec]:
    return spec.inputs if isinstance(spec, BatchedSpec) else {spec.input_name: spec.input}


def _batching(spec: Spec) -> dict[str, Any]:
    """How requests become batches, as ModelConfig has it."""
    if not isinstance(spec, BatchedSpec):
        return {"max_batch_size": 0, "sequence_batching": {"oldest": {}}}
    return {
        "max_batch_size": spec.max_batch_size,
        "dynamic_batching": {
            "preferred_batch_size": list(spec.preferred_batch_sizes),
            "max_queue_delay_microseconds": round(spec.max_queue_delay_s * 1e6),
        },
    }


def _rows(parameters: Parameters, tensors: Sequence[Input], spec: BatchedSpec) -> RowsRequest:
    """What is asked of a stateless model, checked but for its values."""
    inputs: dict[str, np.ndarray] = {}
    for tensor in tensors:
        if tensor.name in inputs:
            raise InvalidInput(f"input '{tensor.name}' is given twice for model '{spec.name}': keep one")
        if tensor.name in spec.inputs:
            _check_datatype(tensor, spec.inputs[tensor.name], spec.name)
        inputs[tensor.name] = read_tensor(tensor, f"input '{tensor.name}'")
    priority, timeout_s = _priority_and_timeout(parameters)
    request = RowsRequest(inputs, priority or None, timeout_s)
    check_rows(request, spec)
    return request


def _priority_and_timeout(parameters: Parameters) -> tuple[int, float]:
    """What a request says of them, 0 where it says nothing; the timeout in seconds."""
    priority, timeout = _whole(parameters, "priority"), _whole(parameters, "timeout")
    return priority, timeout / 1e6  # it is in microseconds


def _sequence_id(parameters: Parameters, model: str) -> SequenceId:
    sequence = parameters.get("sequence_id", 0)
    if type(sequence) is int and -(2**63) <= sequence < 2**64:
        if sequence:
            return sequence
    elif not (isinstance(sequence, str) and len(sequence) <= MAX_NAME and is_unicode(sequence)):
        raise InvalidInput(
            f"sequence_id is {sequence!r:.80}, expected an integer of 64 bits, or a string of at most {MAX_NAME} "
            "characters"
        )
    if not sequence:
        raise InvalidInput(f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID")
    return sequence


def _timestep(parameters: Parameters) -> int | None:
    name = "sequence_timestep"
    return _whole(parameters, name) if name in parameters else None


def _whole(parameters: Parameters, name: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidInput(f"{name} is {value!r:.80}, expected a whole number from 0 to 2**63 - 1")
    return value


def _flag(parameters: Parameters, name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} is {value!r}, expected a bool parameter")
    return value


def read_tensor(tensor: Input, where: str) -> np.ndarray:
    """The values of a tensor, in its shape. Raises InvalidInput."""
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None:
        raise InvalidInput(f"{where} has the datatype '{tensor.datatype}', expected one of {', '.join(DTYPES)}")
    shape = list(tensor.shape)
    if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise InvalidInput(f"{where} has the shape {shape[:MAX_DIMS]}, expected whole numbers from 0 on")
    count = math.prod(shape)
    values = _read_bytes(tensor, where, count) if tensor.datatype == "BYTES" else _read_numbers(tensor, where, count)
    try:
        return values.reshape(shape)
    except ValueError as error:  # no values, but axes of billions
        raise InvalidInput(f"{where} has the shape {shape}: {error}") from error


def _read_numbers(tensor: Input, where: str, count: int) -> np.ndarray:
    """Numbers, or truth values, [count]. Raises InvalidInput."""
    dtype = DTYPES[tensor.datatype]
    if isinstance(tensor.data, bytes | memoryview):
        if len(tensor.data) != count * dtype.itemsize:
            raise InvalidInput(
                f"unexpected total byte size {len(tensor.data)} for {where}, expecting {count * dtype.itemsize}"
            )
        array: np.ndarray = np.frombuffer(tensor.data, dtype)
        return array.view(np.uint8) != 0 if tensor.datatype == "BOOL" else array
    kinds: dict[str, set[type]] = {"f": {int, float}, "b": {bool}}
    if unknown := {*map(type, tensor.data)} - kinds.get(dtype.kind, {int}):
        raise InvalidInput(f"{where} holds what is no {tensor.datatype}: {', '.join(sorted(map(str, unknown)))}")
    try:
        array = np.array(tensor.data, dtype)
    except OverflowError as error:
        raise InvalidInput(f"{where} holds what is no {tensor.datatype}: {error}") from error
    if len(array) != count:
        raise InvalidInput(f"{where} has {len(array)} elements, its shape {list(tensor.shape)} takes {count}")
    return array


def _read_bytes(tensor: Input, where: str, count: int) -> np.ndarray:
    """Elements of any length, [count] of dtype object. Raises InvalidInput."""
    data, values = tensor.data, list[bytes]()
    if isinstance(data, bytes | memoryview):
        data, at = bytes(data), 0
        while at < len(data):
            begin = at + LENGTH_BYTES
            at = begin + int.from_bytes(data[at:begin], "little")
            if begin > len(data) or at > len(data):
                raise InvalidInput(f"{where} is cut off: its elements are longer than its {len(data)} bytes")
            values.append(data[begin:at])
    else:
        for value in data:
            if not isinstance(value, bytes) and not (isinstance(value, str) and is_unicode(value)):
                raise InvalidInput(f"{where} holds what is no BYTES: {value!r:.80}, expected a text")
            values.append(value.encode() if isinstance(value, str) else value)
    if len(values) != count:
        raise InvalidInput(f"{where} has {len(values)} elements, its shape {list(tensor.shape)} takes {count}")
    array = np.empty(count, object)
    array[:] = values
    return array


def write_tensor(value: np.ndarray) -> bytes:
    """The values of an output one after the other, as `read_tensor` takes them."""
    if value.dtype == object:
        return b"".join(len(each).to_bytes(LENGTH_BYTES, "little") + each for each in value.reshape(-1))
    return (value if LITTLE_ENDIAN else value.astype(value.dtype.newbyteorder("<"))).tobytes()


def _check_datatype(tensor: Input, spec: TensorSpec, model: str) -> None:
    if tensor.datatype != DATATYPES[spec.dtype]:
        raise InvalidInput(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{model}' expects "
            f"'{DATATYPES[spec.dtype]}'"
        )


def _timesteps(tensor: Input, spec: ModelSpec) -> tuple[np.ndarray, bool]:
    where = f"input '{tensor.name}'"
    _check_datatype(tensor, spec.input, spec.name)
    x = read_tensor(tensor, where)
    batched = x.ndim == len(spec.input.shape) + 2 and x.shape[0] == 1
    if batched:
        x = x[0]
    if x.ndim == 0 or x.shape[1:] != spec.input.shape:
        expected = ",".join(map(str, [-1, *spec.input.shape]))
        got = ",".join(map(str, tensor.shape))
        raise InvalidInput(f"unexpected shape for {where} for model '{spec.name}'. Expected [{expected}], got [{got}]")
    return x, batched
