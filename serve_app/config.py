"""The configuration: one tree of frozen dataclasses, built once and checked where it is built.

`serve run configs/vad.yaml` hands over nested values, `serve run serve_app.app:build model=silero_vad engine.slots=64`
flat keys and strings; both become the same tree. Precedence: what is given, then the defaults below. Where `models` are
several, each has a tree of its own: what it is given, then what is at the top, then the defaults.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from serve_app.coerce import build_dataclass, unflatten
from serve_app.errors import ConfigError
from serve_app.session import MAX_RETAINED


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`name`: a model of serve_app.models.registry, or `package.module:Class` of your own. The rest are its options.

    `served_as`: what clients call it, where that is not its name: the key of its section in `models`, and behind an @
    its version, where it has several.
    """

    name: str = "silero_vad"
    options: Mapping[str, Any] = field(default_factory=dict)
    served_as: str = ""

    @property
    def served_name(self) -> str:
        """What clients call it."""
        return self.served_as or self.name


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Where and how steps run.

    `slots`: sessions whose state is on the device. `max_batch_size`: sessions of a step, never more than slots.
    `max_step_timesteps`: timesteps that a step takes of a session at most; `step_timesteps`: instead, the numbers that
    it may take, rising from 1 (none: any; on a GPU the powers of two, since each needs graphs of its own).
    `delay_target_s`: steps are kept so short that a segment of few timesteps runs within that, even beside sessions
    with many (0: steps are as long as they may be, which is the best rate).
    `threads`: torch threads of a replica; `pin_threads`: each replica's on cores of its own.
    `calibration_file`: where a GPU's fastest ways to run steps are remembered (empty: nowhere).
    `max_pending_bytes`, `max_retained_bytes`: bounds on accepted inputs and on outputs kept until acknowledged, of all
    sessions of a replica.
    """

    device: str = "auto"
    slots: int = 512
    max_batch_size: int = 256
    max_step_timesteps: int = 16
    step_timesteps: tuple[int, ...] = ()
    delay_target_s: float = 0.0
    threads: int = 1
    pin_threads: bool = False
    calibration_file: str = "~/.cache/lockstep/calibration.json"
    max_pending_bytes: int = 256 * 2**20
    max_retained_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        _at_least("engine", self, 1, "slots", "max_batch_size", "max_step_timesteps", "threads")
        _at_least("engine", self, 1, "max_pending_bytes", "max_retained_bytes")
        _at_least("engine", self, 0, "delay_target_s")
        rising = all(a < b for a, b in pairwise(self.step_timesteps))
        if self.step_timesteps and (self.step_timesteps[0] != 1 or not rising):
            raise ConfigError(f"engine.step_timesteps is {list(self.step_timesteps)}, it must rise from 1: [1, 10]")


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Bounds of a session, and of their number in a replica.

    `max_window_timesteps`: timesteps accepted and not yet acknowledged. `nan`: what becomes of a segment with NaN or
    infinity in it. `checkpoint_timesteps`: after so many timesteps a session's state goes to where it comes from, with
    the outputs, so that it can go on elsewhere if its replica dies (0: never); not sooner than `checkpoint_apart_s`
    after the last, or the states of sessions that run fast would be more than all their inputs and outputs.
    `moves_per_s`: where a replica has a tenth more sessions, or less, than the model's have on the average, so many of
    them go on elsewhere per second, live (0: none do).
    `max_wait_s`: a new session for which all replicas of the model are full waits so long (0: it is refused at once),
    with `max_waiting` of the model at most; those of the highest priority, which is 1, go first. `default_priority`: of
    those that say none.
    """

    max_sessions: int = 16384
    max_wait_s: float = 0.0
    max_waiting: int = 1024
    default_priority: int = 1
    max_segment_timesteps: int = 1024
    max_window_timesteps: int = 4096
    idle_timeout_s: float = 300.0
    nan: Literal["refuse", "pass"] = "refuse"
    checkpoint_timesteps: int = 100
    checkpoint_apart_s: float = 1.0
    moves_per_s: int = 200

    def __post_init__(self) -> None:
        _at_least("session", self, 0, "checkpoint_timesteps", "checkpoint_apart_s", "max_wait_s", "moves_per_s")
        _at_least("session", self, 1, "max_sessions", "max_segment_timesteps", "max_window_timesteps")
        _at_least("session", self, 1, "max_waiting", "default_priority")
        if self.idle_timeout_s <= 0:
            raise ConfigError(f"session.idle_timeout_s is {self.idle_timeout_s}, it must be more than 0")
        if self.max_segment_timesteps > self.max_window_timesteps:
            raise ConfigError(
                f"session.max_segment_timesteps={self.max_segment_timesteps} does not fit into "
                f"session.max_window_timesteps={self.max_window_timesteps}"
            )
        most = MAX_RETAINED - min(self.max_window_timesteps, MAX_RETAINED // 2)
        if self.checkpoint_timesteps > most:
            raise ConfigError(
                f"session.checkpoint_timesteps is {self.checkpoint_timesteps}, the most is {most}: senders keep "
                f"{MAX_RETAINED} timesteps, and session.max_window_timesteps={self.max_window_timesteps} may be on "
                "their way; 0 is never"
            )


@dataclass(frozen=True, slots=True)
class FrameConfig:
    """How segments travel between senders and replicas.

    `max_bytes`: a frame or answer is cut there. `answer_within_s`: a call with nothing to tell is answered after that.
    """

    max_bytes: int = 3 * 2**20
    answer_within_s: float = 1.0

    def __post_init__(self) -> None:
        _at_least("frame", self, 65536, "max_bytes")
        if self.answer_within_s <= 0:
            raise ConfigError(f"frame.answer_within_s is {self.answer_within_s}, it must be more than 0")


@dataclass(frozen=True, slots=True)
class GrpcConfig:
    """Where each ingress replica of a machine listens for gRPC, beside the ways through Serve (port 0: nowhere)."""

    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"grpc.port is {self.port}, a port is from 1 to 65535, 0 is none")


@dataclass(frozen=True, slots=True)
class DurabilityConfig:
    """Where checkpoints of resumable sessions are kept, beside the ingress that has the last.

    `store`: a folder or a URL of any file system that fsspec knows; it outlives the cluster (empty: the memory of the
    session directory, which does not). An application has a folder of its own in it. `max_bytes`: of all checkpoints
    there. `keep_s`: a checkpoint that no running session has is kept for so long.
    """

    store: str = ""
    max_bytes: int = 512 * 2**20
    keep_s: float = 3600.0

    def __post_init__(self) -> None:
        _at_least("durability", self, 0, "max_bytes")
        if self.keep_s <= 0:
            raise ConfigError(f"durability.keep_s is {self.keep_s}, it must be more than 0")


@dataclass(frozen=True, slots=True)
class PriorityConfig:
    """Of requests of one priority. `max_queue_size`: rows that wait (0: any number); one more is refused.

    `timeout_s`: how long a request may wait (0: any time). `on_timeout`: then it is refused, or stands behind all
    others of its priority.
    """

    max_queue_size: int = 4096
    timeout_s: float = 0.0
    on_timeout: Literal["reject", "delay"] = "reject"

    def __post_init__(self) -> None:
        _at_least("batching.priorities[]", self, 0, "max_queue_size", "timeout_s")


@dataclass(frozen=True, slots=True)
class BatchingConfig:
    """How requests to a stateless model become batches. A model with this section is one.

    `max_batch_size`: rows of a batch. A full one, or one of `preferred_batch_sizes`, runs as soon as an instance of the
    model is free; any other when its longest waiting row has waited `max_queue_delay_s`. `max_padding`: share of a
    batch that may be padding, where rows differ in length. `priorities`: 1 is the first of them, and the highest.
    `instances`: batches that a replica runs at the same time, on the same weights. `dtype`: of weights and products.
    `graph_lengths`: on a GPU, the lengths that rows are padded to, rising, since each needs CUDA graphs of its own
    (none: a quarter, half, three quarters and all of the longest that the model takes). `pack`: rows of a model that
    takes them so lie one behind the other; then their lengths do not matter, nor what `max_padding` and `graph_lengths`
    say.
    """

    max_batch_size: int = 64
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_s: float = 0.0
    max_padding: float = 0.25
    priorities: tuple[PriorityConfig, ...] = field(default_factory=lambda: (PriorityConfig(),))
    default_priority: int = 1
    instances: int = 1
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    graph_lengths: tuple[int, ...] = ()
    pack: bool = True

    def __post_init__(self) -> None:
        if any(a >= b for a, b in pairwise((0, *self.graph_lengths))):
            raise ConfigError(f"batching.graph_lengths is {list(self.graph_lengths)}, it must rise from 1 or more")
        _at_least("batching", self, 1, "max_batch_size", "default_priority", "instances")
        _at_least("batching", self, 0, "max_queue_delay_s", "max_padding")
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise ConfigError(
                    f"batching.preferred_batch_sizes has {size}, it must be from 1 to "
                    f"batching.max_batch_size={self.max_batch_size}"
                )
        if self.max_padding >= 1:
            raise ConfigError(f"batching.max_padding is {self.max_padding}, it must be less than 1")
        if self.default_priority > len(self.priorities):
            raise ConfigError(
                f"batching.default_priority is {self.default_priority}, batching.priorities has {len(self.priorities)}"
            )


@dataclass(frozen=True, slots=True)
class AutoscalingConfig:
    """Between how many replicas a model has as many as it needs, in place of `replicas`.

    There are more where those that run have had, for `upscale_delay_s`, more than `target_sessions` of their
    session.max_sessions, more than `target_load` of their highest rate, or a session that waits longer for its step
    than `max_queue_delay_s` (0: that is not looked at); or where sessions find no place. There are less when all has
    fitted into less, at four fifths of these targets, for `downscale_delay_s`; sessions go on at the others.
    """

    max_replicas: int
    min_replicas: int = 1
    target_sessions: float = 0.8
    target_load: float = 0.7
    max_queue_delay_s: float = 0.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 300.0

    def __post_init__(self) -> None:
        _at_least("autoscaling", self, 1, "min_replicas")
        _at_least("autoscaling", self, 0, "max_queue_delay_s", "upscale_delay_s", "downscale_delay_s")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"autoscaling.max_replicas is {self.max_replicas}, less than autoscaling.min_replicas="
                f"{self.min_replicas}"
            )
        for name in ("target_sessions", "target_load"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"autoscaling.{name} is {getattr(self, name)}, a share is more than 0 and at most 1")


@dataclass(frozen=True, slots=True)
class AppConfig:
    """The tree of one model. `replicas`: replicas of the model; `num_gpus`: GPUs that each gets from Ray.

    `accelerator_type`: what kind of GPU that has to be, as Ray calls it: L4, A10G, H100 (empty: any).
    `autoscaling`: as many replicas as are needed, in place of `replicas`; of models with a state only.
    `ingress_replicas`: ways in, for clients without Ray; they, `grpc` and `durability` are common to all models.

    `batching`: of a stateless model only; it has no use for session, frame and durability.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    frame: FrameConfig = field(default_factory=FrameConfig)
    durability: DurabilityConfig = field(default_factory=DurabilityConfig)
    grpc: GrpcConfig = field(default_factory=GrpcConfig)
    batching: BatchingConfig | None = None
    autoscaling: AutoscalingConfig | None = None
    replicas: int = 1
    num_gpus: float = 0.0
    accelerator_type: str = ""
    ingress_replicas: int = 1

    def __post_init__(self) -> None:
        _at_least("", self, 1, "replicas", "ingress_replicas")
        if self.accelerator_type and not self.num_gpus:
            raise ConfigError(
                f"accelerator_type is {self.accelerator_type!r} and num_gpus is 0: a replica would have no GPU of it, "
                "give num_gpus: 1"
            )
        if self.autoscaling is not None and self.replicas != 1:
            raise ConfigError(
                f"replicas is {self.replicas} beside autoscaling: say autoscaling.min_replicas={self.replicas} instead"
            )


def load_config(args: Mapping[str, Any]) -> AppConfig:
    """The tree of one model out of nested values, flat dotted keys with strings, or both; raises ConfigError.

    `model` is a name, or a section of `name` and the model's own options; `model.hidden` is an option in either case.
    """
    return _tree(_unflatten(args), {})


def load_models(args: Mapping[str, Any]) -> dict[str, AppConfig]:
    """The tree of each model of an application, by the name that clients call it; raises ConfigError.

    `models` has a section for each, by that name: `model` (by default what the section is called), `engine`, `session`
    and so on. Where that has `versions`, by number, each is a model with what is in its section, over what is beside
    `versions`: NAME@1, NAME@2. Without `models` there is the one that `model` says.
    """
    tree = _unflatten(args)
    if "models" not in tree:
        config = _tree(tree, {})
        return {config.model.served_name: config}
    models = tree.pop("models")
    if not isinstance(models, Mapping) or not models:
        raise ConfigError(f"models is {models!r}, expected a section for each model: models.vad.model=silero_vad")
    if "model" in tree:
        raise ConfigError("model is given beside models: move it there, as models.NAME.model", key="model")
    if "batching" in tree:
        raise ConfigError("batching is given beside models: move it to the stateless ones, as models.NAME.batching")
    return {
        config.model.served_name: config
        for name, section in models.items()
        for config in _of_models(str(name), section, tree)
    }


_MODEL_NAME = re.compile(r"[A-Za-z0-9_-]+")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_OF_ALL = ("durability", "grpc", "ingress_replicas")


def _of_models(name: str, section: Any, top: Mapping[str, Any]) -> Iterator[AppConfig]:
    """The tree of one section of `models`, or those of its versions."""
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(f"models has a model called {name!r}: a name is of letters, digits, - and _")
    where = f"models.{name}"
    common = _section(where, section)
    if "versions" not in common:
        yield _of_section(where, {"name": name, "served_as": name}, common, top)
        return
    versions = common.pop("versions")
    where += ".versions"
    if not isinstance(versions, Mapping) or not versions:
        raise ConfigError(f"{where} is {versions!r}, expected a section for each: {where}.1")
    for version, own in versions.items():
        if not _VERSION.fullmatch(version):
            raise ConfigError(f"{where} has {version!r}: a version is a whole number from 1 on")
        served = {"name": name, "served_as": f"{name}@{version}"}
        own = _section(f"{where}.{version}", own)
        yield _of_section(f"{where}.{version}", served, own, _merged(top, common))


def _section(where: str, section: Any) -> dict[str, Any]:
    """Of a model, or of one of its versions."""
    section = {} if section is None else section
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: it is {section!r}, expected a section: model, engine, session and so on")
    for key in _OF_ALL:
        if key in section:
            raise ConfigError(f"{where}: {key} is the same for all models: move it to the top")
    return dict(section)


def _of_section(
    where: str, model: Mapping[str, str], section: Mapping[str, Any], below: Mapping[str, Any]
) -> AppConfig:
    """The tree of a section, and of what it leaves out `below`. model: see `_tree`."""
    try:
        return _tree(_merged(below, section), model)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", **error.details) from None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above`, with what it leaves out from `below`."""
    return {key: _over(below.get(key), above.get(key)) for key in {**below, **above}}


def _over(below: Any, above: Any) -> Any:
    """`above`, and where both are sections what it leaves out from `below`."""
    if isinstance(below, Mapping) and isinstance(above, Mapping):
        return {**below, **above}
    return below if above is None else above


def _tree(tree: Mapping[str, Any], model: Mapping[str, str]) -> AppConfig:
    """The checked tree. `model`: fields of its ModelConfig, where its section does not say them."""
    from serve_app.models import registry  # which needs ModelConfig

    options = dict(tree.get("model") or {})
    given = {**model, **({"name": options.pop("name")} if "name" in options else {})}
    config = build_dataclass(AppConfig, {**tree, "model": {**given, "options": options}})
    config = replace(config, model=registry.check(config.model))
    if config.autoscaling is not None and (config.batching is not None or registry.is_stateless(config.model.name)):
        raise ConfigError(
            f"autoscaling is given, and model={config.model.name} has no state: set autoscaling_config of its "
            "deployment in the file that is deployed, for which Serve counts requests"
        )
    if registry.is_stateless(config.model.name) and config.batching is None:
        return replace(config, batching=BatchingConfig())
    if config.batching is not None and registry.is_recurrent(config.model.name):
        raise ConfigError(f"batching is given, and model={config.model.name} has a state: see engine.max_batch_size")
    return config


def _unflatten(args: Any) -> dict[str, Any]:
    if not isinstance(args, Mapping):
        raise ConfigError(f"the configuration is {args!r}, expected a section with sections and values")
    return unflatten(_with_names(args, ""))


def _with_names(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`model: rnn` as `model: {name: rnn}`, at the top and in the sections of `models`."""
    found = {}
    for key, value in values.items():
        match f"{where}{key}".split("."):
            case ["model"] | ["models", _, "model"] | ["models", _, "versions", _, "model"]:
                if value is not None and not isinstance(value, Mapping):
                    value = {"name": value}
            case ["models"] | ["models", _] | ["models", _, "versions"] | ["models", _, "versions", _]:
                if isinstance(value, Mapping):
                    value = _with_names(value, f"{where}{key}.")
        found[key] = value
    return found


def _at_least(section: str, config: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            key = f"{section}.{name}" if section else name
            raise ConfigError(f"{key} is {getattr(config, name)}, the least is {least}")
