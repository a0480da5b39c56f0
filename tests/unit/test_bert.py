"""Sentence embeddings by BERT: a tiny one with random weights, and the trained one where its package is."""

import asyncio
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples import ranking
from serve_app.config import BatchingConfig, ModelConfig, load_config
from serve_app.engine.batch_runner import BatchRunner
from serve_app.engine.batcher import build_batcher
from serve_app.errors import ConfigError, InvalidInput
from serve_app.models import registry
from serve_app.models.bert import PACKAGE, Bert, BertAnswer, BertEmbedding, bert
from serve_app.models.options import BertOptions
from serve_app.rows import RowsRequest

ROOT = Path(__file__).parents[2]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install '.[bert]'"
)
needs_weights = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")


def network(kind: str, **more: Any) -> Any:
    import transformers

    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    return getattr(transformers, kind)(config, **more)


def tiny(head: str = "embedding") -> Bert:
    if head == "answer":
        return BertAnswer(network("BertForQuestionAnswering"), max_length=32)
    return BertEmbedding(network("BertModel", add_pooling_layer=False), max_length=32)


def options(folder: Path, **more: Any) -> BertOptions:
    return BertOptions(**{"weights": str(folder), "input": "tokens", "max_length": 32, **more})


def row(ids: list[int], mask: list[int] | None = None) -> dict[str, np.ndarray]:
    given = {"input_ids": np.array([ids], np.int64)}
    return given if mask is None else {**given, "attention_mask": np.array([mask], np.int64)}


@needs_transformers
@pytest.mark.parametrize("pack_rows", [0, 20])
@pytest.mark.parametrize("head", ["embedding", "answer"])
def test_ragged_rows_together_equal_each_alone(head: str, pack_rows: int) -> None:
    """Some of their masks have holes."""
    model, rng = tiny(head), random.Random(0)
    runner = BatchRunner(model, torch.device("cpu"), torch.float32, pack_rows=pack_rows)
    by_itself = BatchRunner(model, torch.device("cpu"), torch.float32)
    rows = []
    for i in range(20):
        ids = [rng.randrange(100) for _ in range(rng.randint(1, 32))]
        mask = [1, *(rng.randint(0, 1) for _ in ids[1:])] if i % 3 == 0 else None
        rows += runner.rows(row(ids, mask), 1)
    together = runner.run(rows)
    for one, result in zip(rows, together, strict=True):
        (alone,) = by_itself.run([one])
        assert isinstance(alone, dict) and isinstance(result, dict)
        for name, expected in alone.items():
            assert result[name].shape == expected.shape
            np.testing.assert_allclose(result[name], expected, atol=1e-5)
        if head == "embedding":
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
        (row([1, 100]), "token id 100 is out of range, expected 0 to 99"),
        (row([-1]), "token id -1 is out of range"),
        (row([1, 2], [1, 2]), "attention_mask 2 is out of range, expected 0 to 1"),
        (row([1, 2], [0, 0]), "attention_mask leaves no token"),
        (row([1] * 33), "length 33 arrived, the model takes 1 to 32"),
    ],
)
def test_tokens_that_cannot_be_run(given: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        BatchRunner(tiny(), torch.device("cpu"), torch.float32).rows(given, 1)


@needs_transformers
def test_tokens_of_an_answer_have_scores_and_may_have_types() -> None:
    runner = BatchRunner(tiny("answer"), torch.device("cpu"), torch.float32)
    typed = {**row([5, 6, 7]), "token_type_ids": np.array([[0, 1, 1]])}
    plain, other, longer = (runner.rows(given, 1)[0] for given in (row([5, 6, 7]), typed, row([1] * 9)))
    found = runner.run([plain, other, longer])
    assert all(isinstance(result, dict) for result in found)
    assert [{name: x.shape for name, x in result.items()} for result in found if isinstance(result, dict)] == [
        {"start": (3,), "end": (3,)}, {"start": (3,), "end": (3,)}, {"start": (9,), "end": (9,)},
    ]  # fmt: skip
    assert found[0]["start"].tolist() != found[1]["start"].tolist()  # type: ignore[index]
    with pytest.raises(InvalidInput, match="token_type_ids 2 is out of range, expected 0 to 1"):
        runner.rows({**row([5]), "token_type_ids": np.array([[2]])}, 1)


@needs_transformers
def test_weights_of_a_folder_are_the_ones_that_were_saved(tmp_path: Path) -> None:
    saved = network("BertForQuestionAnswering").eval()
    saved.save_pretrained(tmp_path)
    loaded = bert(options(tmp_path, head="answer")).eval()
    inputs = {"input_ids": torch.arange(8)[None], "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    torch.testing.assert_close(loaded.forward(inputs)["start"], saved(**inputs).start_logits)
    assert bert(options(tmp_path)).outputs["embedding"].shape == (16,)


@needs_transformers
def test_a_folder_that_is_not_the_whole_model_is_refused(tmp_path: Path) -> None:
    network("BertModel").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks 2 weights of a BertForQuestionAnswering, qa_outputs\.bias for one"):
        bert(options(tmp_path, head="answer"))
    with pytest.raises(ConfigError, match=r"has no tokenizer.json, which model.input=text needs"):
        bert(options(tmp_path, input="text"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded: SafetensorError"):
        bert(options(tmp_path))
    weights.unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        bert(options(tmp_path))


@needs_transformers
def test_random_weights_are_those_of_their_seed() -> None:
    made = [bert(BertOptions("random", "base", input="tokens", max_length=384, seed=seed)) for seed in (0, 0, 1)]
    first = [next(model.parameters())[1, :4].tolist() for model in made]
    assert first[0] == first[1] != first[2]


def test_options() -> None:
    assert load_config({"model": "bert"}).batching == BatchingConfig()
    for args, message in (
        ({"model.size": "base"}, "model.size=base has no trained weights here: say model.weights=random, or give"),
        ({"model.weights": "random"}, "model.weights=random needs model.size: mini, base or large"),
        ({"model.weights": "random", "model.size": "large"}, "model.weights=random takes no text: say model.input"),
        ({"model.head": "answer", "model.input": "tokens"}, "model.head=answer needs weights trained for it"),
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


@needs_transformers
@needs_weights
async def test_the_sentence_of_a_text_that_answers_a_question() -> None:
    there = ranking.sentences((ROOT / "docs/operations.md").read_text())
    batcher = build_batcher(load_config({"model": "bert", "model.max_length": "256", "batching.max_batch_size": "8"}))

    async def embed(text: str) -> np.ndarray:
        found = await batcher.infer(RowsRequest({"text": np.array([text.encode()], object)}))
        vector: np.ndarray = found.values["embedding"][0]
        return vector

    told = np.array(await asyncio.gather(*map(embed, there)))
    for question, answer in (
        ("How can the state of a session survive the whole cluster?", "store"),
        ("What happens to requests when the GPU does not work any more?", "Serve replaces the replica"),
    ):
        best = [there[i] for i in ranking.rank(await embed(question), told)[:3]]
        assert any(answer in sentence for sentence in best), best
    await batcher.stop()
