"""From a model's name in the configuration to the model. Imports torch only when a model is loaded."""

import difflib
import importlib
import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from serve_app.coerce import build_dataclass
from serve_app.config import ModelConfig
from serve_app.errors import ConfigError
from serve_app.models.options import (
    BertOptions,
    DtlnOptions,
    FileOptions,
    PartOptions,
    PipelineOptions,
    RnnOptions,
    SileroOptions,
    SpeakerOptions,
)

if TYPE_CHECKING:
    from serve_app.models.interface import RecurrentModel
    from serve_app.models.stateless import StatelessModel

RECURRENT: Mapping[str, tuple[type[Any], str]] = {
    "rnn": (RnnOptions, "serve_app.models.rnn:Rnn"),
    "silero_vad": (SileroOptions, "serve_app.models.silero_vad:SileroVad"),
    "dtln": (DtlnOptions, "serve_app.models.dtln:Dtln"),
    "speaker": (SpeakerOptions, "serve_app.models.speaker:SpeakerEncoder"),
    "file": (FileOptions, "serve_app.models.file:FileModel"),
    "pipeline": (PipelineOptions, "serve_app.models.pipeline:Pipeline"),
}
STATELESS: Mapping[str, tuple[type[Any], str]] = {
    "bert": (BertOptions, "serve_app.models.bert:bert"),
    "file": (FileOptions, "serve_app.models.file:FileRows"),
}
BUILT_IN = {**RECURRENT, **STATELESS}


def is_recurrent(name: str) -> bool:
    """Whether it is a model with a state that comes along. A file, or one of your own, is what it is configured as."""
    return name in RECURRENT and name not in STATELESS


def is_stateless(name: str) -> bool:
    """Whether it is a model without a state that comes along."""
    return name in STATELESS and name not in RECURRENT


def check(config: ModelConfig) -> ModelConfig:
    """The configuration with all options of a built-in model, as their types; raises ConfigError.

    Imports neither torch nor a class of your own; the options of such a class are checked when it is loaded.
    """
    if ":" in config.name:
        _split(config.name)
        return config
    options = _options(config)
    if isinstance(options, PipelineOptions):
        options = replace(options, parts=tuple(_checked_part(part) for part in options.parts))
    return replace(config, options=asdict(options))


def part_config(part: PartOptions) -> ModelConfig:
    """The configuration of a part of a pipeline."""
    if isinstance(part.model, str):
        return ModelConfig(part.model)
    return ModelConfig(part.model["name"], {key: value for key, value in part.model.items() if key != "name"})


def _checked_part(part: PartOptions) -> PartOptions:
    try:
        config = check(part_config(part))
    except ConfigError as error:
        raise ConfigError(f"part {part.name}: {error.message}", **error.details) from None
    return replace(part, model={"name": config.name, **config.options})


def load(config: ModelConfig) -> "RecurrentModel":
    """The model, on the CPU; raises ConfigError. A class of your own gets the options as keyword arguments."""
    from serve_app.models.interface import RecurrentModel

    return _checked(_made(config, RECURRENT), config.name, RecurrentModel)  # type: ignore[no-any-return]


def load_stateless(config: ModelConfig) -> "StatelessModel":
    """See `load`: of a model without a state."""
    from serve_app.models.stateless import StatelessModel

    return _checked(_made(config, STATELESS), config.name, StatelessModel)  # type: ignore[no-any-return]


def load_any(config: ModelConfig) -> "RecurrentModel | StatelessModel":
    """See `load`: of a model with a state or without."""
    from serve_app.models.interface import RecurrentModel
    from serve_app.models.stateless import StatelessModel

    model = _made(config, RECURRENT)
    without_state = hasattr(model, "inputs") and not hasattr(model, "initial_state")
    return _checked(model, config.name, StatelessModel if without_state else RecurrentModel)  # type: ignore[no-any-return]


def _made(config: ModelConfig, wanted: Mapping[str, tuple[type[Any], str]]) -> Any:
    if ":" in config.name:
        return _own(config.name, dict(config.options))
    options = _options(config)
    return _import(wanted.get(config.name, BUILT_IN[config.name])[1])(options)


def _own(path: str, options: dict[str, Any]) -> Any:
    """A class of your own, with its options; of a torch module `weights` is a file, unless it takes that itself."""
    make = _import(path)
    takes = inspect.signature(make).parameters.values()
    if "weights" not in options or any(p.name == "weights" or p.kind is p.VAR_KEYWORD for p in takes):
        return make(**_arguments(make, options))
    import torch

    from serve_app.models.weights import load_weights

    weights = options.pop("weights")
    model = make(**_arguments(make, options))
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"model.weights={weights} is given, and model={path} is no torch module: it has no place for them"
        )
    if weights is not None:
        load_weights(model, Path(weights))
    return model


def _options(config: ModelConfig) -> Any:
    if config.name not in BUILT_IN:
        raise ConfigError(
            f"model={config.name} is not known{_nearest(config.name, BUILT_IN)} Known: {', '.join(BUILT_IN)}, "
            "or package.module:Class of your own"
        )
    return build_dataclass(BUILT_IN[config.name][0], config.options, "model")


def _arguments(make: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the callable's annotations read them ("0.5" is 0.5); raises ConfigError if it takes them not."""
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    parameters = inspect.signature(make).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    fields: list[tuple[str, Any, Any]] = []
    for p in (p for p in parameters if p.kind is not p.VAR_POSITIONAL):
        kind = hints[p.name] if _is_plain(hints.get(p.name)) else Any
        fields.append((p.name, kind, field() if p.default is p.empty else field(default=None)))
    built: Any = build_dataclass(make_dataclass("Options", fields, kw_only=True), options, "model")
    return {name: getattr(built, name) for name in options}


def _is_plain(hint: Any) -> bool:
    """Whether the type is one that a command line's text can be read as."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(member is types.NoneType or _is_plain(member) for member in get_args(hint))
    return hint in (bool, int, float, str) or get_origin(hint) is Literal


def _split(path: str) -> tuple[str, str]:
    module, _, name = path.partition(":")
    if not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise ConfigError(f"model={path} is not a Python path: write it as package.module:Class")
    return module, name


def _import(path: str) -> Any:
    module_name, name = _split(path)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"model={path} cannot be imported: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"model={path}: {module.__name__} has no {name}{_nearest(name, vars(module))}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"model={path} is not a class but {found!r:.60}")
    return found


def _checked(model: Any, name: str, interface: type[Any]) -> Any:
    import torch

    members = [member for member in vars(interface) if not member.startswith("_")]
    for member in members:
        inherited = member == "forward" and getattr(type(model), member, None) is torch.nn.Module.forward
        if inherited or not hasattr(model, member):
            file = interface.__module__.replace(".", "/")
            other = "" if "initial_state" in members else "; without a section batching it is a recurrent one"
            raise ConfigError(
                f"model={name} has no {member}: a model needs {', '.join(members[:-1])} and {members[-1]}, "
                f"see {file}.py{other}"
            )
    return model


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "."
