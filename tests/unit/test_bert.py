"""Sentence embeddings by BERT: a tiny one with random weights, and the trained one where its package is."""

import asyncio
import importlib.util
import random
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config import BatchingConfig, ModelConfig, load_config
from serve_app.engine.batch_runner import BatchRunner
from serve_app.engine.batcher import build_batcher
from serve_app.errors import ConfigError, InvalidInput
from serve_app.models import registry
from serve_app.models.bert import PACKAGE, BertEmbedding
from serve_app.rows import RowsRequest

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install '.[bert]'"
)
needs_weights = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")


def tiny() -> BertEmbedding:
    import transformers

    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertEmbedding(transformers.BertModel(config, add_pooling_layer=False), max_length=32)


def row(ids: list[int], mask: list[int] | None = None) -> dict[str, np.ndarray]:
    given = {"input_ids": np.array([ids], np.int64)}
    return given if mask is None else {**given, "attention_mask": np.array([mask], np.int64)}


@needs_transformers
def test_ragged_rows_together_equal_each_alone() -> None:
    runner, rng = BatchRunner(tiny(), torch.device("cpu"), torch.float32), random.Random(0)
    rows = [runner.rows(row([rng.randrange(100) for _ in range(rng.randint(1, 32))]), 1)[0] for _ in range(20)]
    together = runner.run(rows)
    for one, result in zip(rows, together, strict=True):
        (alone,) = runner.run([one])
        assert isinstance(alone, dict) and isinstance(result, dict)
        np.testing.assert_allclose(result["embedding"], alone["embedding"], atol=1e-5)
        assert np.linalg.norm(result["embedding"]) == pytest.approx(1, abs=1e-5)


@needs_transformers
def test_padding_that_a_client_sends_is_cut_off() -> None:
    runner = BatchRunner(tiny(), torch.device("cpu"), torch.float32)
    (padded,), (plain,) = runner.rows(row([5, 6, 0, 0], [1, 1, 0, 0]), 1), runner.rows(row([5, 6]), 1)
    assert (padded.length, plain.length) == (2, 2)
    (one,), (other,) = runner.run([padded]), runner.run([plain])
    assert isinstance(one, dict) and isinstance(other, dict)
    assert one["embedding"].tolist() == other["embedding"].tolist()


@needs_transformers
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (row([1, 100]), "token id 100 is out of range: the vocabulary has 0 to 99"),
        (row([-1]), "token id -1 is out of range"),
        (row([1, 2], [1, 2]), "attention_mask has 2: expected 0 or 1"),
        (row([1, 2], [0, 0]), "attention_mask leaves no token"),
        (row([1] * 33), "length 33 arrived, the model takes 1 to 32"),
    ],
)
def test_tokens_that_cannot_be_run(given: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        BatchRunner(tiny(), torch.device("cpu"), torch.float32).rows(given, 1)


def test_options() -> None:
    assert load_config({"model": "bert"}).batching == BatchingConfig()
    for args, message in (
        ({"model.size": "base"}, "model.input=text needs size=minilm, model.size is base"),
        ({"model.max_length": "0"}, "model.max_length is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config({"model": "bert", **args})


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="transformers is installed")
def test_without_transformers_it_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'lockstep\[bert\]'"):
        registry.load_stateless(ModelConfig("bert"))


@needs_transformers
@needs_weights
async def test_an_answer_is_nearer_to_its_question_than_others() -> None:
    batcher = build_batcher(load_config({"model": "bert"}))

    async def embed(*texts: str) -> Any:
        given = np.array([text.encode() for text in texts], object)
        return (await batcher.infer(RowsRequest({"text": given}))).values["embedding"]

    questions = ["What is the capital of France?", "Who wrote Hamlet?", "How do plants make food?"]
    answers = ["Shakespeare is the author of the play.", "By photosynthesis, out of light.", "It is Paris."]
    asked, told = await asyncio.gather(embed(*questions), embed(*answers))
    assert (asked @ told.T).argmax(1).tolist() == [2, 0, 1]
    for text, message in (("  ", "the text is empty"), ("word " * 200, "length 202 arrived, the model takes 1 to 128")):
        with pytest.raises(InvalidInput, match=message):
            await embed(text)
    await batcher.stop()
