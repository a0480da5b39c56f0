"""Models one after the other as one recurrent model: its state is the states of its parts.

A part that takes runs of samples may have timesteps of another length than the part before it. A timestep of the
pipeline is then the shortest that is a whole number of timesteps of every part.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import torch

from serve_app.errors import ConfigError
from serve_app.models import registry
from serve_app.models.fingerprint import fingerprint
from serve_app.models.interface import RecurrentModel, State
from serve_app.models.options import INPUT, PipelineOptions
from serve_app.models.stateless import StatelessModel
from serve_app.rows import ANY
from serve_app.spec import TensorSpec


class Part(NamedTuple):
    """A model of a pipeline: it takes the output `of` ("" is the only one) of the part `source`, or INPUT.

    `steps`: its timesteps in one of the pipeline. `copies`: it may write what it takes, which others may need, or which
    may lie in a state: that of the part before it.
    """

    name: str
    model: RecurrentModel
    source: str
    of: str
    steps: int
    copies: bool


class Pipeline(torch.nn.Module):
    """See the module. Each output is called as its part, or part.output where the part has several.

    An output of a part that has several timesteps in one of the pipeline is [steps, *shape].
    """

    def __init__(self, options: PipelineOptions) -> None:
        """Raises ConfigError for parts that do not fit, naming both."""
        super().__init__()
        configs = {part.name: registry.part_config(part) for part in options.parts}
        models = {name: _recurrent(registry.load_any(config), name) for name, config in configs.items()}
        self.models = torch.nn.ModuleList(model for model in models.values() if isinstance(model, torch.nn.Module))
        sources = _sources(options, models)
        rates = _rates(models, sources)
        scale = math.lcm(*(rate.denominator for rate in rates.values()))
        self._outputs = _named(options, models, sources)
        self.parts = [
            Part(name, model, *sources[name], int(rates[name] * scale), not getattr(model, "takes_views", False))
            for name, model in models.items()
        ]
        self._by_name = {part.name: part for part in self.parts}
        first = next(part for part in self.parts if part.source == INPUT)
        shape, rate = first.model.input.shape, getattr(first.model, "sample_rate", None)
        if first.steps > 1:
            shape = (first.steps * shape[0],) if _is_run(first.model) else (first.steps, *shape)
        self.input = TensorSpec(shape, first.model.input.dtype)
        if rate is not None:
            self.sample_rate = int(rate)
        self.outputs: Mapping[str, TensorSpec] = {
            name: _several(self._by_name[part].model.outputs[output], self._by_name[part].steps)
            for name, (part, output) in self._outputs.items()
        }
        self.cpu_only = any(getattr(model, "cpu_only", False) for model in models.values())
        self.tf32 = all(getattr(model, "tf32", False) for model in models.values())
        self.takes_views = True
        self.identity = repr(
            [
                (name, sources[name], configs[name].name, fingerprint(m, configs[name].options))
                for name, m in models.items()
            ]
        )

    def initial_state(self, batch: int) -> State:
        """The state of each part, by its name."""
        return {part.name: part.model.initial_state(batch) for part in self.parts}

    def forward(self, x: torch.Tensor, state: State) -> tuple[Mapping[str, torch.Tensor], State]:
        """See RecurrentModel."""
        found: dict[tuple[str, str], torch.Tensor] = {(INPUT, ""): x}
        after = {}
        for part in self.parts:
            steps = 1 if part.source == INPUT else self._by_name[part.source].steps
            taken = _regrouped(found[part.source, part.of], steps, part.steps, part.model.input.shape)
            if part.copies:
                taken = taken.clone(memory_format=torch.contiguous_format)
            y, after[part.name] = part.model.forward(taken, state[part.name])
            values = {next(iter(part.model.outputs)): y} if isinstance(y, torch.Tensor) else y
            found |= {(part.name, output): value for output, value in values.items()}
        outputs = {}
        for name, (source, output) in self._outputs.items():
            steps = self._by_name[source].steps
            outputs[name] = found[source, output] if steps == 1 else _by_session(found[source, output], steps)
        return outputs, after

    def session_ended(self, session: str, reason: str) -> None:
        """Tell the parts that want to know."""
        for part in self.parts:
            if (tell := getattr(part.model, "session_ended", None)) is not None:
                tell(session, reason)


class _EachTimestep(torch.nn.Module):
    """A stateless model as a recurrent one: a timestep is a row."""

    def __init__(self, model: StatelessModel, name: str) -> None:
        super().__init__()
        if hasattr(model, "prepare"):
            raise ConfigError(f"part {name} prepares requests in Python, row by row: it cannot be in a pipeline")
        specs = {**model.inputs, **model.outputs}
        if len(model.inputs) != 1 or any(ANY in spec.shape for spec in specs.values()):
            raise ConfigError(f"part {name} has no state: in a pipeline it takes one input, and all sizes are fixed")
        self.model = model
        ((self._name, self.input),) = model.inputs.items()
        self.outputs = model.outputs

    def initial_state(self, batch: int) -> State:
        return ()

    def forward(self, x: torch.Tensor, state: State) -> tuple[Mapping[str, torch.Tensor], State]:
        y = self.model.forward({self._name: x.flatten(0, 1)})
        values = {next(iter(self.outputs)): y} if isinstance(y, torch.Tensor) else y
        return {name: value.view(*x.shape[:2], *value.shape[1:]) for name, value in values.items()}, ()


def _recurrent(model: RecurrentModel | StatelessModel, name: str) -> RecurrentModel:
    return model if isinstance(model, RecurrentModel) else _EachTimestep(model, name)


def _sources(options: PipelineOptions, models: Mapping[str, RecurrentModel]) -> dict[str, tuple[str, str]]:
    """What each part takes: a part and the name of its output, or INPUT."""
    found, before = dict[str, tuple[str, str]](), INPUT
    for part in options.parts:
        source, _, output = (part.input or before).partition(".")
        if source == INPUT and not output:
            found[part.name] = (INPUT, "")
        elif source in found:
            found[part.name] = (source, _output(models[source], source, output, f"part {part.name} takes"))
        else:
            raise ConfigError(f"part {part.name} takes {part.input}: before it there are {', '.join([INPUT, *found])}")
        before = part.name
    return found


def _output(model: RecurrentModel, part: str, output: str, who: str) -> str:
    """The output of that name, or the only one."""
    outputs = [*model.outputs]
    if not output and len(outputs) == 1:
        return outputs[0]
    if output not in outputs:
        known = ", ".join(f"{part}.{name}" for name in outputs)
        raise ConfigError(f"{who} {part}{'.' + output if output else ''}, part {part} has {known}: name one of these")
    return output


def _rates(models: Mapping[str, RecurrentModel], sources: Mapping[str, tuple[str, str]]) -> dict[str, Fraction]:
    """Timesteps of each part while the first takes one. Raises ConfigError where two do not fit, naming both."""
    rates = dict[str, Fraction]()
    first = next(name for name, (source, _) in sources.items() if source == INPUT)
    for name, (source, output) in sources.items():
        model = models[name]
        if name == first:
            rates[name] = Fraction(1)
            continue
        other = first if source == INPUT else source
        given = models[other].input if source == INPUT else models[source].outputs[output]
        verb = "takes" if source == INPUT else f"gives as {output}"
        hz, other_hz = (getattr(each, "sample_rate", None) for each in (model, models[other]))
        same_rate = hz is None or other_hz is None or hz == other_hz
        if same_rate and given == model.input:
            rates[name] = rates[other]
        elif same_rate and given.dtype == model.input.dtype and len(given.shape) == 1 and _is_run(model):
            rates[name] = rates[other] * given.shape[0] / model.input.shape[0]
        else:
            raise ConfigError(
                f"part {name} takes {_shown(model.input, hz)}, part {other} {verb} {_shown(given, other_hz)}: they do "
                "not fit"
            )
    return rates


def _is_run(model: RecurrentModel) -> bool:
    """Whether its timestep is a run of samples, which may be cut anywhere."""
    return getattr(model, "sample_rate", None) is not None and len(model.input.shape) == 1


def _named(
    options: PipelineOptions, models: Mapping[str, RecurrentModel], sources: Mapping[str, tuple[str, str]]
) -> dict[str, tuple[str, str]]:
    """Part and output of each output of the pipeline."""
    every = [(name, output) for name, model in models.items() for output in model.outputs]
    wanted = [each for each in every if each not in sources.values()]
    if options.outputs:
        wanted = []
        for name in options.outputs:
            source, _, output = name.partition(".")
            if source not in models:
                raise ConfigError(f"model.outputs names {name}, the parts are {', '.join(models)}")
            wanted.append((source, _output(models[source], source, output, "model.outputs names")))
    return {
        source if len(models[source].outputs) == 1 else f"{source}.{output}": (source, output)
        for source, output in wanted
    }


def _several(spec: TensorSpec, steps: int) -> TensorSpec:
    return spec if steps == 1 else TensorSpec((steps, *spec.shape), spec.dtype)


def _regrouped(x: torch.Tensor, steps: int, wanted: int, shape: tuple[int, ...]) -> torch.Tensor:
    """x [T * steps, B, ...] -> [T * wanted, B, *shape], of the same values in the same order for each session."""
    if steps == wanted:
        return x
    if x.shape[1] == 1:
        return x.reshape(-1, 1, *shape)
    by_session = _by_session(x, steps)  # [T, B, steps, ...]
    return by_session.reshape(*by_session.shape[:2], wanted, *shape).transpose(1, 2).flatten(0, 1)


def _by_session(x: torch.Tensor, steps: int) -> torch.Tensor:
    """[T * steps, B, ...] -> [T, B, steps, ...]."""
    return x.view(-1, steps, *x.shape[1:]).transpose(1, 2)


def _shown(spec: TensorSpec, sample_rate: int | None) -> str:
    return f"{spec.dtype} {list(spec.shape)}" + ("" if sample_rate is None else f" at {sample_rate} Hz")
