"""A model in a file, as a function of named tensors: ONNX through onnxruntime, TorchScript, torch.export.

A file is a program, and is trusted as far as its runtime keeps it in. Pickles, compiled libraries and expressions that
are none of these formats' own are not loaded.
"""

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils import _pytree as pytree

from serve_app.errors import ConfigError

INSTALL_ONNX = "pip install 'lockstep[onnx]'"
Tensors = Mapping[str, torch.Tensor]


class Declared(NamedTuple):
    """What a file says of a tensor: None where it says nothing, in a shape for a dimension of any size."""

    shape: tuple[int | None, ...] | None = None
    dtype: str | None = None


class Program(Protocol):
    """A file that has been opened."""

    @property
    def inputs(self) -> Mapping[str, Declared]:
        """What it takes, in order."""
        ...

    @property
    def cpu_only(self) -> bool:
        """Whether tensors must be in host memory."""
        ...

    def constant(self, name: str, value: Any) -> Any:
        """What `run` takes for an input that the configuration gives. Raises ValueError, TypeError, OverflowError."""
        ...

    def run(self, values: Mapping[str, Any]) -> Tensors:
        """All outputs by name, for all inputs by name."""
        ...

    def apply(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move or cast what it is made of, as torch.nn.Module._apply does."""
        ...


def open_program(path: Path) -> Program:
    """The model in a file. Raises ConfigError, naming the file and what is wrong with it."""
    kinds: Mapping[str, tuple[str, Callable[[Path], Program]]] = {
        ".onnx": ("ONNX, as torch.onnx.export writes it", OnnxProgram),
        ".pt": ("TorchScript, as torch.jit.save writes it", ScriptProgram),
        ".pt2": ("torch.export, as torch.export.save writes it", ExportedProgram),
    }
    if path.suffix not in kinds:
        raise ConfigError(f"model.path={path} ends in {path.suffix!r}: {', '.join(kinds)} can be read")
    if not path.is_file():
        raise ConfigError(f"model.path={path} is not a file (looked in {Path.cwd()})")
    what, kind = kinds[path.suffix]
    try:
        return kind(path)
    except ConfigError:
        raise
    except Exception as error:  # a broken file fails in zip, json, protobuf or the runtime, each with its own
        raise ConfigError(f"model.path={path} is not {what}, or is damaged: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What went wrong, without the stack that some runtimes put into their messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["nothing said"]
    in_script = "TorchScript interpreter" in lines[0]  # and after its stack comes what happened
    return f"{type(error).__name__}: {lines[-1 if in_script else 0]:.300}"


class OnnxProgram:
    """See Program: on the CPU, with as many threads as torch has now. Tensors are not copied on their way."""

    cpu_only = True

    def __init__(self, path: Path) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            raise ConfigError(f"model.path={path} needs the package onnxruntime: {INSTALL_ONNX}")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: _of_onnx(each) for each in self._session.get_inputs()}
        self._names = [each.name for each in self._session.get_outputs()]

    def constant(self, name: str, value: Any) -> torch.Tensor:
        """See Program."""
        return torch.tensor(_number(value), dtype=getattr(torch, self.inputs[name].dtype or "float32"))

    def run(self, values: Mapping[str, Any]) -> Tensors:
        """See Program."""
        found = self._session.run(self._names, {name: value.numpy() for name, value in values.items()})
        return {name: torch.from_numpy(value) for name, value in zip(self._names, found, strict=True)}

    def apply(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See Program: nothing to move."""


def _of_onnx(tensor: Any) -> Declared:
    kinds = {"float": "float32", "double": "float64"}
    kind = tensor.type.removeprefix("tensor(").removesuffix(")")
    return Declared(tuple(n if isinstance(n, int) else None for n in tensor.shape), kinds.get(kind, kind))


class ScriptProgram:
    """See Program. Inputs are named as the arguments of forward, those in a tuple argument `state` state.0, state.1."""

    cpu_only = False

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is
            self._module: Any = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        self._module.eval()
        for weight in self._module.parameters():
            weight.requires_grad_(False)
        self._kinds: dict[str, type[Any]] = {}  # of arguments that are numbers
        self._arguments: list[tuple[str, ...] | str] = []
        for argument in self._module.forward.schema.arguments[1:]:
            self._add(path, argument)
        names = [name for each in self._arguments for name in ([each] if isinstance(each, str) else each)]
        self.inputs = {name: Declared() for name in names}

    def _add(self, path: Path, argument: Any) -> None:
        name, kind = argument.name, argument.type.kind()
        numbers = {"IntType": int, "FloatType": float, "BoolType": bool}
        if kind in numbers and not argument.has_default_value():
            self._kinds[name] = numbers[kind]
            self._arguments.append(name)
        elif kind == "TensorType":
            self._arguments.append(name)
        elif kind == "TupleType" and all(each.kind() == "TensorType" for each in argument.type.elements()):
            self._arguments.append(tuple(f"{name}.{i}" for i in range(len(argument.type.elements()))))
        elif not argument.has_default_value():
            raise ConfigError(
                f"model.path={path}: the argument {name} of its forward is {argument.type}, expected a Tensor, a tuple "
                "of these, an int, float or bool"
            )

    def constant(self, name: str, value: Any) -> Any:
        """See Program."""
        return self._kinds[name](value) if name in self._kinds else torch.tensor(_number(value))

    def run(self, values: Mapping[str, Any]) -> Tensors:
        """See Program."""
        arguments = [
            values[each] if isinstance(each, str) else tuple(values[name] for name in each) for each in self._arguments
        ]
        return _named(self._module(*arguments))

    def apply(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See Program."""
        self._module._apply(move)


class ExportedProgram:
    """See Program. Inputs are named as torch.export names them: arguments of forward, those within state_0, state_1."""

    cpu_only = False

    def __init__(self, path: Path) -> None:
        from torch.export.pt2_archive._package import load_pt2

        check_archive(path)
        with _no_pickles():
            found = load_pt2(path).exported_programs
        if len(found) != 1:
            raise ConfigError(f"model.path={path} has {len(found)} exported programs, expected 1")
        (program,) = found.values()
        self._module = program.module(check_guards=False)  # they would be text to compile; the engine checks shapes
        self._module.requires_grad_(False)
        self._structure = program.call_spec.in_spec
        users = program.graph_signature.user_inputs
        nodes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
        for name in users:
            if not isinstance(nodes.get(name), torch.Tensor):
                raise ConfigError(f"model.path={path}: its input {name} is no tensor")
        self.inputs: Mapping[str, Declared] = {name: _of_fake(nodes[name]) for name in users}

    def constant(self, name: str, value: Any) -> torch.Tensor:
        """See Program."""
        return torch.tensor(_number(value), dtype=getattr(torch, self.inputs[name].dtype or "float32"))

    def run(self, values: Mapping[str, Any]) -> Tensors:
        """See Program."""
        arguments, named = pytree.tree_unflatten([values[name] for name in self.inputs], self._structure)
        return _named(self._module(*arguments, **named))

    def apply(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See Program."""
        self._module._apply(move)  # type: ignore[no-untyped-call]


_PICKLED = ("custom_obj", "opaque_obj")
_SYMBOL = re.compile(r"(zs|zf|s|u|f)\d+")
_EXPRESSION = re.compile(r"[\w\s'\"=,.()*/+<>-]*")
_WORDS = {
    *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod", "FloorDiv"),
    *("CleanDiv", "CeilDiv", "ModularIndexing", "TruncToInt", "FloatTrueDiv", "IntTrueDiv", "ToFloat", "Where"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality", "Unequality", "StrictLessThan", "LessThan"),
    *("StrictGreaterThan", "GreaterThan", "true", "false", "True", "False", "precision", "evaluate"),
    *("positive", "integer", "nonnegative", "negative", "real", "finite"),
}


def check_archive(path: Path) -> None:
    """Raise ConfigError for an archive of torch.export with anything in it that would be unpickled, or run as it is.

    torch reads sizes by sympy, which hands their text to `eval`: only numbers, symbols and what torch writes may be
    there. That a graph calls nothing but operators torch checks itself.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    with PT2ArchiveReader(os.fspath(path)) as archive:
        for name in archive.get_file_names():
            file = name.rpartition("/")[2]
            if name.startswith("data/aotinductor/") or file.startswith(_PICKLED) or file.endswith((".so", ".py")):
                raise ConfigError(
                    f"model.path={path} has {name} in it, a compiled library or a pickle: export it without, by "
                    "torch.export.save"
                )
            if not name.startswith("models/") and not name.endswith(".json"):
                continue
            for key, value in _leaves(json.loads(archive.read_string(name))):
                if key == "use_pickle" and value:
                    raise ConfigError(f"model.path={path} has pickled tensors in it: export it with plain ones")
                if key == "expr_str" and not _is_size(value):
                    raise ConfigError(f"model.path={path} has {value!r:.100} for a size, which is none")


def _is_size(text: Any) -> bool:
    words = re.findall(r"[A-Za-z_]\w*", str(text))
    return bool(_EXPRESSION.fullmatch(str(text))) and all(w in _WORDS or _SYMBOL.fullmatch(w) for w in words)


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What stands in a JSON tree, and under which key."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, key)
    else:
        yield key, tree


@contextmanager
def _no_pickles() -> Iterator[None]:
    """Within, torch.load takes tensors only, whatever its caller says; torch.export would else fall back to pickle."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _of_fake(tensor: torch.Tensor) -> Declared:
    sizes: Sequence[Any] = tensor.shape  # or symbols
    return Declared(tuple(n if isinstance(n, int) else None for n in sizes), str(tensor.dtype).removeprefix("torch."))


def _named(found: Any) -> Tensors:
    """What a forward returned: a dict by its keys, else all tensors by their number."""
    if isinstance(found, Mapping):
        return found
    leaves: Sequence[torch.Tensor] = pytree.tree_leaves(found)
    return {str(i): leaf for i, leaf in enumerate(leaves)}


def _number(value: Any) -> Any:
    """A number as text, from a command line, as a number."""
    return float(value) if isinstance(value, str) else value
