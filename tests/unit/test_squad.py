"""The client of SQuAD: windows, the choice of answers, the scores; and a tiny model, trained here and served."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from bench.bert_server import Local, NoSessions
from clients import squad
from clients.rows import RowsClient
from clients.squad import Question, Settings, Window, best_answers, evaluate, read_questions, windows_of
from serve_app.config import load_config
from serve_app.engine.batcher import build_batcher
from serve_app.errors import InvalidInput
from serve_app.ingress.oip import InferenceServer
from serve_app.ingress.oip_grpc import InferenceService
from serve_app.ingress.protos import oip_pb2_grpc

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

FILE = Path(__file__).parents[1] / "data/squad.json"
SETTINGS = Settings(max_length=48, doc_stride=16, null_threshold=0.0)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return read_questions(FILE)


@pytest.fixture(scope="module")
def tokenizer(questions: list[Question]) -> Any:
    """BERT's, with words and pieces of the fixture."""
    made = tokenizers.BertWordPieceTokenizer()
    made.train_from_iterator([q.question + " " + q.context for q in questions], vocab_size=400, show_progress=False)
    made.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", made.token_to_id("[SEP]")), ("[CLS]", made.token_to_id("[CLS]"))
    )
    return tokenizers.Tokenizer.from_str(made.to_str())


def test_answers_of_the_fixture_are_where_it_says(questions: list[Question]) -> None:
    for article in json.loads(FILE.read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                assert question["is_impossible"] == (not question["answers"])
                for found in question["answers"]:
                    assert paragraph["context"][found["answer_start"] :].startswith(found["text"])
    assert [len(q.answers) for q in questions] == [2, 1, 1, 1, 0, 1, 2, 1, 0]


def test_the_flat_format_of_datasets_is_read(questions: list[Question], tmp_path: Path) -> None:
    flat = [
        {"id": q.id, "question": q.question, "context": q.context, "answers": {"text": q.answers, "answer_start": []}}
        for q in questions
    ]
    file = tmp_path / "flat.json"
    file.write_text(json.dumps({"version": 2.0, "data": flat}))
    assert read_questions(file) == questions
    for wrong in ("[]", "{", '{"data": [{"paragraphs": 3}]}', '{"data": [{"id": "x"}]}'):
        file.write_text(wrong)
        with pytest.raises(InvalidInput, match="is not in SQuAD's format"):
            read_questions(file)


def test_windows_cover_the_text_and_each_token_counts_once(questions: list[Question], tokenizer: Any) -> None:
    for question in questions:
        windows = windows_of(question, tokenizer, SETTINGS)
        tokenizer.no_truncation()
        whole = tokenizer.encode(question.context, add_special_tokens=False).offsets
        shown = [[(int(a), int(b)) for a, b in window.offsets if a >= 0] for window in windows]
        starts = [whole.index(each[0]) for each in shown]
        assert starts == list(range(0, 16 * len(windows), 16))
        assert all(each == whole[at : at + len(each)] for each, at in zip(shown, starts, strict=True))
        assert shown[-1][-1] == whole[-1]
        counted = [
            (int(a), int(b)) for w in windows for (a, b), begins in zip(w.offsets, w.begins, strict=True) if begins
        ]
        assert sorted(counted) == whole
        assert all(len(window.ids) <= 48 for window in windows)
        assert all(
            (window.types == (np.arange(len(window.ids)) > window.types.argmax() - 1)).all() for window in windows
        )


def test_a_token_counts_where_most_is_around_it() -> None:
    """The example of run_squad.py: with a stride of 3, `bought` is best seen in the third of its windows."""
    words = ["the", "man", "went", "to", "the", "store", "and", "bought", "a", "gallon", "of"]
    at = np.cumsum([0, *(len(word) + 1 for word in words)])
    offsets = np.array([(at[i], at[i] + len(word)) for i, word in enumerate(words)])
    placed = [offsets[i : i + 5] for i in (0, 3, 6)]
    assert [begins.tolist() for begins in squad._begins(placed)] == [
        [True, True, True, True, False],
        [False, True, True, True, False],
        [False, True, True, True, True],
    ]


def test_a_question_may_leave_no_room(questions: list[Question], tokenizer: Any) -> None:
    long = Question("x", "when " * 100, questions[0].context, ())
    with pytest.raises(
        InvalidInput, match="question 'x' has 67 tokens and leaves no room for its text in max_length=48"
    ):
        windows_of(long, tokenizer, SETTINGS)
    (window, *_) = windows_of(long, tokenizer, Settings(max_length=128, max_question_length=10))
    assert (window.offsets[:, 0] >= 0).argmax() == 12
    with pytest.raises(InvalidInput, match="doc_stride is 0"):
        Settings(doc_stride=0)


def one_window(text: str) -> Window:
    """[CLS] ? [SEP] and the words of a text."""
    at = np.cumsum([0, *(len(word) + 1 for word in text.split())])
    offsets = [(-1, -1)] * 3 + [(int(at[i]), int(at[i]) + len(word)) for i, word in enumerate(text.split())]
    n = len(offsets)
    return Window(np.zeros(n, int), np.zeros(n, int), np.array(offsets), np.array([a >= 0 for a, _ in offsets]))


def scores(window: Window, start: Mapping[int, float], end: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    both = np.full((2, len(window.ids)), -5.0, np.float32)
    for values, given in zip(both, (start, end), strict=True):
        for i, score in given.items():
            values[i] = score
    return both[0], both[1]


def test_the_best_answers_of_two_windows() -> None:
    text = "red green blue"
    question, window = Question("q", "?", text, ("green",)), one_window("red green blue")
    first = scores(window, {0: 1.0, 3: 2.0, 4: 3.0}, {0: 1.0, 4: 2.5, 5: 1.0, 3: 9.0})
    second = scores(window, {0: -2.0, 1: 9.0, 4: 3.5}, {0: -2.0, 4: 1.0, 2: 9.0})
    found = best_answers(question, [window, window], [first, second], Settings(n_best=3))
    assert [(each.text, each.score) for each in found] == [("red", 11.0), ("green", 5.5), ("red green", 4.5)]
    assert sum(each.probability for each in found) == pytest.approx(1)
    assert found[0].probability / found[1].probability == pytest.approx(np.exp(5.5), rel=1e-5)
    found = best_answers(question, [window], [first], Settings(n_best=9, max_answer_length=1))
    assert {each.text for each in found} == {"red", "green", "blue"}


def test_no_answer_wins_by_more_than_the_threshold() -> None:
    question, window = Question("q", "?", "red green", ()), one_window("red green")
    given = [scores(window, {0: 2.0, 3: 2.0}, {0: 2.0, 3: 1.0})]
    for threshold, expected in ((0.0, ["", "red"]), (0.99, ["", "red"]), (1.0, ["red"])):
        found = best_answers(question, [window], given, Settings(null_threshold=threshold))
        assert [each.text for each in found][: len(expected)] == expected
        assert "" in [each.text for each in found]
    assert all(each.text for each in best_answers(question, [window], given, Settings()))
    nothing = [scores(window, {0: 1.0}, {0: 1.0})]
    nothing[0][0][3:] = -9
    window.begins[:] = False
    assert [each.text for each in best_answers(question, [window], nothing, Settings())] == [""]


@pytest.mark.parametrize(
    ("found", "right", "exact", "f1"),
    [
        ("The Moreau family", "moreau family.", 1, 1),
        ("  an  apple, a day ", "apple day", 1, 1),
        ("Theatre", "the atre", 0, 0),
        ("U.S.", "US", 1, 1),
        ("three days", "three long days", 0, 0.8),
        ("days days", "days", 0, 2 / 3),
        ("the", "a", 1, 1),
        ("", "the", 1, 1),
        ("word", "", 0, 0),
        ("well-known", "well known", 0, 0),
        ("été", "ete", 0, 0),
    ],
)
def test_scores_are_those_of_the_official_evaluation(found: str, right: str, exact: float, f1: float) -> None:
    assert squad.exact(found, right) == exact
    assert squad.f1(found, right) == pytest.approx(f1)
    assert squad.f1(right, found) == pytest.approx(f1)


def test_means_are_of_the_best_of_the_right_answers() -> None:
    asked = [
        Question("a", "?", "", ("in 1862", "1862")),
        Question("b", "?", "", ("a b", "b c")),
        Question("c", "?", "", ()),
    ]
    assert evaluate(asked, {"a": "1862", "b": "b d", "c": "x"}) == pytest.approx(
        {
            "exact": 100 / 3, "f1": 100 * (1 + 2 / 3) / 3, "total": 3, "HasAns_exact": 50, "HasAns_f1": 100 * 5 / 6,
            "HasAns_total": 2, "NoAns_exact": 0, "NoAns_f1": 0, "NoAns_total": 1,
        }
    )  # fmt: skip
    assert evaluate(asked[:2], {"a": "1862", "b": "b c"}) == {
        "exact": 100, "f1": 100, "total": 2, "HasAns_exact": 100, "HasAns_f1": 100, "HasAns_total": 2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def weights(questions: list[Question], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT that has learned the fixture by heart, window by window."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, num_labels=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForQuestionAnswering(config).train()
    rows, labels = [], []
    for question in questions:
        for window in windows_of(question, tokenizer, SETTINGS):
            rows.append(window)
            begin = question.context.find(question.answers[0]) if question.answers else -2
            first = np.flatnonzero(window.offsets[:, 0] == begin)
            last = np.flatnonzero(window.offsets[:, 1] == begin + len(question.answers[0])) if len(first) else []
            labels.append((first[0], last[0]) if begin >= 0 and len(last) else (0, 0))
    inputs = {name: torch.zeros(len(rows), 48, dtype=torch.int64) for name in ("input_ids", "token_type_ids")}
    inputs["attention_mask"] = torch.zeros(len(rows), 48, dtype=torch.int64)
    for i, row in enumerate(rows):
        inputs["input_ids"][i, : len(row.ids)] = torch.from_numpy(row.ids)
        inputs["token_type_ids"][i, : len(row.ids)] = torch.from_numpy(row.types)
        inputs["attention_mask"][i, : len(row.ids)] = 1
    start, end = torch.tensor(np.array(labels)).T
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = model(**inputs, start_positions=start, end_positions=end).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.003:
            break
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


async def test_a_trained_model_answers_over_grpc(weights: Path, questions: list[Question]) -> None:
    config = load_config(
        {
            "model": {"name": "bert", "weights": str(weights), "head": "answer", "input": "tokens", "max_length": 48},
            "engine": {"device": "cpu"},
        }
    )
    batcher = build_batcher(config)
    service, server = InferenceService(), grpc.aio.server()
    service.inference = InferenceServer(NoSessions(), Local({"bert": batcher}))
    oip_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = RowsClient(f"grpc://127.0.0.1:{port}")
    tokenizer = tokenizers.Tokenizer.from_file(str(weights / "tokenizer.json"))
    found = await squad.answer(questions, tokenizer, lambda inputs: client.infer("bert", inputs), SETTINGS)
    best = {name: answers[0].text for name, answers in found.items()}
    figures = evaluate(questions, best)
    assert (figures["exact"], figures["f1"], figures["NoAns_exact"]) == (100, 100, 100)
    assert batcher.stats.rows / batcher.stats.batches > 2
    with pytest.raises(InvalidInput, match="token id 999999 is out of range"):
        await client.infer("bert", {"input_ids": np.array([[999999]])})
    await asyncio.gather(client.stop(), server.stop(grace=None), batcher.stop())
