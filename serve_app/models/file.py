"""Models out of files (see serve_app.models.program): what a file has is matched with what the configuration says."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from serve_app.errors import ConfigError
from serve_app.models.interface import State
from serve_app.models.options import FILE_DTYPES, FileInput, FileOptions, FileState
from serve_app.models.packages import package_file
from serve_app.models.program import Tensors, first_line, open_program
from serve_app.rows import ANY
from serve_app.spec import TensorSpec

TRIALS: Sequence[Mapping[str, int]] = ({"B": 1, "T": 1, "L": 2}, {"B": 3, "T": 2, "L": 3})
"""Sizes of the axes when a file is tried: no two axes go from the same size to the same."""


class _Form(NamedTuple):
    """A tensor of the file: its sizes, numbers and axes (options.AXES), and its dtype."""

    shape: tuple[int | str, ...]
    dtype: str

    def zeros(self, sizes: Mapping[str, int]) -> torch.Tensor:
        shape = [n if isinstance(n, int) else sizes[n] for n in self.shape]
        return torch.zeros(shape, dtype=getattr(torch, self.dtype))

    @property
    def features(self) -> tuple[int, ...]:
        """Sizes without time and batch."""
        return tuple(ANY if n == "L" else int(n) for n in self.shape if n not in ("T", "B"))


class _File(torch.nn.Module):
    """A file, its tensors named and of known form. It has been run in two sizes, so outputs are known too."""

    def __init__(self, options: FileOptions) -> None:
        """Raises ConfigError, naming the file, what it has, and what is configured."""
        super().__init__()
        path = _found(options.path)
        self._path = path
        self._options = options
        self._program = open_program(path)
        self.cpu_only = self._program.cpu_only
        about = repr(replace(options, path="", max_length=0)).encode()
        content = hashlib.blake2b(about, digest_size=16)
        for file in (path, *_external_data(path)):
            content.update(file.read_bytes())
        self.identity = content.hexdigest()
        declared = self._program.inputs
        states = {state.name: state for state in options.state}
        given = {each.name: each for each in options.inputs} or {
            name: FileInput(name) for name in declared if name not in states and name not in options.constants
        }
        for section, names in (("inputs", given), ("state", states), ("constants", options.constants)):
            for name in names:
                if name not in declared:
                    raise ConfigError(f"model.{section} names {name}, {path} has the inputs {', '.join(declared)}")
        for name in declared:
            if name not in {*given, *states, *options.constants}:
                raise ConfigError(f"{path} has the input {name}: say in model.inputs, state or constants what it gets")
        self._inputs = {name: self._form("inputs", tensor) for name, tensor in given.items()}
        self._state = {name: self._form("state", tensor) for name, tensor in states.items()}
        self._constants = {name: self._constant(name, value) for name, value in options.constants.items()}
        self._outputs = self._tried()

    def run(self, values: Tensors) -> Tensors:
        """All outputs, for inputs and states."""
        return self._program.run({**values, **self._constants})

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "_File":
        self._program.apply(fn)
        self._constants = {
            name: fn(value) if isinstance(value, torch.Tensor) else value for name, value in self._constants.items()
        }
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def _constant(self, name: str, value: Any) -> Any:
        try:
            return self._program.constant(name, value)
        except (ValueError, TypeError, OverflowError, RuntimeError) as error:
            raise ConfigError(f"model.constants.{name} is {value!r}, {self._path} cannot take it: {error}") from error

    def _form(self, section: str, tensor: FileInput | FileState) -> _Form:
        """What is configured, and where that says nothing what the file says."""
        key, (shape, dtype) = f"model.{section}[{tensor.name}]", self._program.inputs[tensor.name]
        form = _Form(tensor.shape or self._open_shape(key, shape), tensor.dtype or dtype or "float32")
        if form.dtype not in FILE_DTYPES:
            raise ConfigError(f"{tensor.name} in {self._path} is {form.dtype}, expected {', '.join(FILE_DTYPES[1:])}")
        if dtype not in (None, form.dtype):
            raise ConfigError(f"{key}.dtype is {form.dtype}, {self._path} has {dtype}")
        if shape is not None and (
            len(shape) != len(form.shape)
            or any(have is not None and have != size for have, size in zip(shape, form.shape, strict=True))
        ):
            fixed = " (a size that the file fixes cannot be B or T: export it with a dynamic one)"
            raise ConfigError(f"{key}.shape is {_shown(form.shape)}, {self._path} has {_shown(shape)}{fixed}")
        return form

    def _open_shape(self, key: str, shape: Sequence[int | None] | None) -> tuple[int | str, ...]:
        if shape is None or [*shape].count(None) != 1:
            has = "says nothing of it" if shape is None else f"has {_shown(shape)}"
            raise ConfigError(f"{key}.shape is missing, {self._path} {has}: say it, as [T, B, 80], with B for sessions")
        return tuple("B" if n is None else n for n in shape)

    def _tried(self) -> dict[str, _Form]:
        """The outputs of the file, by what comes out of two runs. Checks states, too."""
        found = [self._try(sizes) for sizes in TRIALS]
        for state in self._options.state:
            if state.next not in found[0]:
                raise ConfigError(
                    f"model.state[{state.name}].next is {state.next}, {self._path} has the outputs "
                    f"{', '.join(found[0])}"
                )
            form = self._form_of(state.next, found)
            if form != (due := self._state[state.name]):
                raise ConfigError(
                    f"the state {state.name} in {self._path} is {due.dtype} {_shown(due.shape)}, and goes on as "
                    f"{state.next}, which is {form.dtype} {_shown(form.shape)}"
                )
        nexts = {state.next for state in self._options.state}
        names = self._options.outputs or {name: name for name in found[0] if name not in nexts}
        if not names:
            raise ConfigError(f"{self._path} has no output beside its state: name one in model.outputs")
        for served, name in names.items():
            if name not in found[0]:
                raise ConfigError(
                    f"model.outputs.{served} is {name}, {self._path} has the outputs {', '.join(found[0])}"
                )
        self._names = dict(names)
        return {served: self._form_of(name, found) for served, name in names.items()}

    def _try(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        values = {name: form.zeros(sizes) for name, form in {**self._inputs, **self._state}.items()}
        try:
            with torch.inference_mode():
                found = dict(self.run(values))
        except Exception as error:
            shapes = ", ".join(f"{name} {_dtype(value)} {list(value.shape)}" for name, value in values.items())
            other = f" (it runs with B={TRIALS[0]['B']}: was it exported for that only?)" if sizes != TRIALS[0] else ""
            raise ConfigError(f"{self._path} does not run with {shapes}{other}: {first_line(error)}") from error
        for name, value in found.items():
            if not isinstance(value, torch.Tensor):
                raise ConfigError(f"the output {name} of {self._path} is {type(value).__name__}, expected a tensor")
        return found

    def _form_of(self, name: str, found: Sequence[Mapping[str, torch.Tensor]]) -> _Form:
        """Sizes and axes of an output, by how they differ between the runs."""
        one, two = (values[name] for values in found)
        axes: dict[tuple[int, int], str] = {(TRIALS[0][axis], TRIALS[1][axis]): axis for axis in ("B", "T", "L")}
        shape: list[int | str] = []
        for a, b in zip(one.shape, two.shape, strict=False):
            shape.append(a if a == b else axes.get((a, b), "?"))
        dtype = _dtype(one)
        if one.ndim != two.ndim or shape.count("B") != 1 or "?" in shape or dtype not in FILE_DTYPES:
            raise ConfigError(
                f"the output {name} of {self._path} is {dtype}, with sizes {list(one.shape)} for B={TRIALS[0]['B']}, "
                f"and {list(two.shape)} for B={TRIALS[1]['B']}: expected one axis of B, others of its own size"
            )
        return _Form(tuple(shape), dtype)


class FileModel(_File):
    """A recurrent model in a file (see RecurrentModel). Its state starts as zeros.

    A file without an axis T is called once a timestep. Where an input has a context, a timestep is what comes after it.
    """

    def __init__(self, options: FileOptions) -> None:
        """Raises ConfigError."""
        super().__init__(options)
        if len(self._inputs) != 1:
            raise ConfigError(
                f"{self._path} has the inputs {', '.join(self._inputs)}: a model with sessions takes one, put the "
                "others into model.state or model.constants"
            )
        ((self._name, form),) = self._inputs.items()
        self._has_time = "T" in form.shape
        for name, tensor in {self._name: form, **self._outputs}.items():
            if ("T" in tensor.shape) != self._has_time or "L" in tensor.shape:
                raise ConfigError(
                    f"{name} in {self._path} is {_shown(tensor.shape)}, the input is {_shown(form.shape)}: with "
                    "sessions all have an axis T or none, and none has L"
                )
        features = form.features
        self._context = next((each.context for each in options.inputs), 0)
        if self._context:
            if len(features) != 1 or self._context >= features[0]:
                raise ConfigError(
                    f"model.inputs[{self._name}].context is {self._context}, the input is {_shown(form.shape)}: a "
                    "context needs one axis beside T and B, and is shorter than that"
                )
            features = (features[0] - self._context,)
        self._form_in = form
        self.input = TensorSpec(features, form.dtype)
        self.input_name = self._name
        self.outputs: Mapping[str, TensorSpec] = {
            name: TensorSpec(form.features, form.dtype) for name, form in self._outputs.items()
        }
        if options.sample_rate is not None:
            self.sample_rate = options.sample_rate
        self._here: torch.Tensor
        self.register_buffer("_here", torch.zeros(()), persistent=False)  # follows the model to its device

    def initial_state(self, batch: int) -> State:
        """Zeros: the tensors of `state` in their order, then the context [batch, n]."""
        forms = [*self._state.values()]
        if self._context:
            forms.append(_Form(("B", self._context), self.input.dtype))
        return tuple(form.zeros({"B": batch}).to(self._here.device) for form in forms)

    def forward(self, x: torch.Tensor, state: State) -> tuple[Mapping[str, torch.Tensor], State]:
        """See RecurrentModel."""
        states, context = dict(zip(self._state, state, strict=False)), state[len(self._state) :]
        if self._context:
            x, last = _windows(x, state[-1], self._form_in.features[0])
            context = (last,)
        if self._has_time:
            values = self.run({self._name: _laid(x, ("T", "B"), self._form_in.shape), **states})
            states = self._next(values)
            y = {name: _restored(values[self._names[name]], form.shape) for name, form in self._outputs.items()}
        else:
            steps = []
            for timestep in x:
                values = self.run({self._name: _laid(timestep, ("B",), self._form_in.shape), **states})
                states = self._next(values)
                steps.append(values)
            y = {
                name: torch.stack([_restored(values[self._names[name]], form.shape) for values in steps])
                for name, form in self._outputs.items()
            }
        return y, (*states.values(), *context)

    def _next(self, values: Tensors) -> dict[str, torch.Tensor]:
        return {state.name: values[state.next] for state in self._options.state}


class FileRows(_File):
    """A stateless model in a file (see StatelessModel). The first axis of its tensors is B; L is of any length."""

    def __init__(self, options: FileOptions) -> None:
        """Raises ConfigError."""
        super().__init__(options)
        if options.state:
            raise ConfigError("model.state is given beside batching: leave one out")
        for name, form in {**self._inputs, **self._outputs}.items():
            if form.shape[0] != "B" or "T" in form.shape:
                raise ConfigError(
                    f"{name} in {self._path} is {_shown(form.shape)}: without sessions B is the first axis, and there "
                    "is no T"
                )
        for tensor in options.inputs:
            if tensor.context:
                raise ConfigError(f"model.inputs[{tensor.name}].context is {tensor.context}, which only sessions have")
        self.inputs = {name: TensorSpec(form.features, form.dtype) for name, form in self._inputs.items()}
        self.outputs = {name: TensorSpec(form.features, form.dtype) for name, form in self._outputs.items()}
        self.max_length = options.max_length

    def forward(self, inputs: Tensors) -> Mapping[str, torch.Tensor]:
        """See StatelessModel."""
        values = self.run(inputs)
        return {served: values[name] for served, name in self._names.items()}


def _found(path: str) -> Path:
    """Where the file lies."""
    package, colon, inside = path.partition(":")
    if not colon or not all(part.isidentifier() for part in package.split(".")):
        return Path(path)
    if (file := package_file(package, inside)) is None:
        raise ConfigError(f"model.path={path}: there is no package {package} with this file")
    return file


def _external_data(path: Path) -> list[Path]:
    """Files beside an ONNX file that may have its weights: model.onnx.data, model.onnx_data."""
    if path.suffix != ".onnx":
        return []
    prefixes = (f"{path.name}.", f"{path.name}_")
    return sorted(file for file in path.parent.iterdir() if file.name.startswith(prefixes) and file.is_file())


def _windows(x: torch.Tensor, context: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps x [T, B, n] with `context` [B, m] before them: windows [T, B, size] that end with each; the last m."""
    heard = torch.cat([context, x.transpose(0, 1).flatten(1)], 1)  # [B, m + T * n]
    return heard.unfold(1, size, x.shape[2]).transpose(0, 1), heard[:, -context.shape[1] :]


def _laid(x: torch.Tensor, axes: Sequence[str], shape: Sequence[int | str]) -> torch.Tensor:
    """x [*axes, *features] with its axes as they are in `shape`, in one piece."""
    features = iter(range(len(axes), x.ndim))
    return x.permute([axes.index(n) if n in axes else next(features) for n in map(str, shape)]).contiguous()


def _restored(y: torch.Tensor, shape: Sequence[int | str]) -> torch.Tensor:
    """The inverse: y laid out as `shape`, with time and batch first."""
    first = [shape.index(axis) for axis in ("T", "B") if axis in shape]
    return y.permute(first + [i for i in range(y.ndim) if i not in first])


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shown(shape: Sequence[Any]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in shape)}]"
