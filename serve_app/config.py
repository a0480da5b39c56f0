"""The configuration: one tree of frozen dataclasses, built once and checked where it is built.

`serve run configs/vad.yaml` hands over nested values, `serve run serve_app.app:build model=silero_vad engine.slots=64`
flat keys and strings; both become the same tree. Precedence: what is given, then the defaults below.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from serve_app.coerce import build_dataclass, unflatten
from serve_app.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`name`: a model of serve_app.models.registry, or `package.module:Class` of your own. The rest are its options."""

    name: str = "silero_vad"
    options: Mapping[str, Any] = field(default_factory=dict)


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
        _at_least("engine", self, 0, "delay_target_s")
        rising = all(a < b for a, b in pairwise(self.step_timesteps))
        if self.step_timesteps and (self.step_timesteps[0] != 1 or not rising):
            raise ConfigError(f"engine.step_timesteps is {list(self.step_timesteps)}, it must rise from 1: [1, 10]")


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Bounds of a session, and of their number in a replica.

    `max_window_timesteps`: timesteps accepted and not yet acknowledged. `nan`: what becomes of a segment with NaN or
    infinity in it. `checkpoint_timesteps`: after so many timesteps a session's state goes to where it comes from, with
    the outputs, so that it can go on elsewhere if its replica dies (0: never).
    """

    max_sessions: int = 16384
    max_segment_timesteps: int = 1024
    max_window_timesteps: int = 4096
    idle_timeout_s: float = 300.0
    nan: Literal["refuse", "pass"] = "refuse"
    checkpoint_timesteps: int = 100

    def __post_init__(self) -> None:
        _at_least("session", self, 0, "checkpoint_timesteps")
        _at_least("session", self, 1, "max_sessions", "max_segment_timesteps", "max_window_timesteps")
        if self.idle_timeout_s <= 0:
            raise ConfigError(f"session.idle_timeout_s is {self.idle_timeout_s}, it must be more than 0")
        if self.max_segment_timesteps > self.max_window_timesteps:
            raise ConfigError(
                f"session.max_segment_timesteps={self.max_segment_timesteps} does not fit into "
                f"session.max_window_timesteps={self.max_window_timesteps}"
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
class AppConfig:
    """The whole tree. `replicas`: replicas of the model; `num_gpus`: GPUs that each gets from Ray."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    frame: FrameConfig = field(default_factory=FrameConfig)
    durability: DurabilityConfig = field(default_factory=DurabilityConfig)
    replicas: int = 1
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        _at_least("", self, 1, "replicas")


def load_config(args: Mapping[str, Any]) -> AppConfig:
    """The tree out of nested values, flat dotted keys with strings, or both; raises ConfigError.

    `model` is a name, or a section of `name` and the model's own options; `model.hidden` is an option in either case.
    """
    from serve_app.models import registry  # which needs ModelConfig

    if not isinstance(args, Mapping):
        raise ConfigError(f"the configuration is {args!r}, expected a section with sections and values")
    model = args.get("model")
    if model is not None and not isinstance(model, Mapping):
        args = {**args, "model": {"name": model}}
    tree = unflatten(args)
    options = tree.pop("model", None) or {}
    given = {"name": options.pop("name")} if "name" in options else {}
    config = build_dataclass(AppConfig, {**tree, "model": {**given, "options": options}})
    return replace(config, model=registry.check(config.model))


def _at_least(section: str, config: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            key = f"{section}.{name}" if section else name
            raise ConfigError(f"{key} is {getattr(config, name)}, the least is {least}")
