"""Answers out of texts by a served model with head=answer, and how good they are: the client of SQuAD.

    serve run squad.yaml   # configs/bert.yaml with model: {name: bert, weights: FOLDER, head: answer, input: tokens, …}
    python -m clients.squad dev-v2.0.json --tokenizer FOLDER

A text that is longer than the model takes is sent in windows that overlap. Windows, the choice of the n best answers
and that of no answer are those of BERT's own run_squad.py, exact match and F1 those of the official evaluation of SQuAD
2.0 (evaluate-v2.0.py); an answer is cut out of the text itself. It needs the package tokenizers.
"""

import asyncio
import collections
import json
import re
import string
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from tqdm import tqdm

from clients.rows import RowsClient
from serve_app.errors import InvalidInput

MAX_OUTSTANDING = 256
"""Windows."""

Infer = Callable[[Mapping[str, np.ndarray]], Awaitable[Mapping[str, np.ndarray]]]
"""Tokens of one row, [1, L] each, to the scores `start` and `end`, [1, L]."""


@dataclass(frozen=True, slots=True)
class Question:
    """`answers`: what is right; none where the text does not say it."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Settings:
    """`max_length`: tokens of a window with its question. `doc_stride`: from the start of a window to that of the next.

    `null_threshold`: by how much no answer must be better than the best one (None: there always is an answer).
    """

    max_length: int = 384
    doc_stride: int = 128
    max_question_length: int = 64
    max_answer_length: int = 30
    n_best: int = 20
    null_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_length", "doc_stride", "max_question_length", "max_answer_length", "n_best"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}, the least is 1")


class Window(NamedTuple):
    """Tokens of a question and a part of its text: ids and types [L]; where each is in the text, [L, 2].

    `offsets` are -1 for tokens that are not of the text. `begins`: whether an answer may begin there, since no other
    window shows more around it.
    """

    ids: np.ndarray
    types: np.ndarray
    offsets: np.ndarray
    begins: np.ndarray


class Answer(NamedTuple):
    """One of the n best: "" is no answer."""

    text: str
    score: float
    probability: float


def read_questions(file: Path) -> list[Question]:
    """Of a file in SQuAD's format, 1.1 or 2.0, or in the flat one of the package datasets. Raises InvalidInput."""
    try:
        data = json.loads(file.read_text())["data"]
        if data and "paragraphs" not in data[0]:
            return [Question(q["id"], q["question"], q["context"], tuple(q["answers"]["text"])) for q in data]
        return [
            Question(q["id"], q["question"], paragraph["context"], tuple(answer["text"] for answer in q["answers"]))
            for article in data
            for paragraph in article["paragraphs"]
            for q in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{file} is not in SQuAD's format: {type(error).__name__}: {error}") from error


def windows_of(question: Question, tokenizer: Any, settings: Settings) -> list[Window]:
    """The windows of a question's text, in order. tokenizer: a tokenizers.Tokenizer, whose truncation is changed.

    Raises InvalidInput where the question leaves no room for the text.
    """
    tokenizer.no_truncation()
    asked = question.question.strip()
    tokens = tokenizer.encode(asked, add_special_tokens=False)
    if len(tokens) > settings.max_question_length:
        asked = asked[: tokens.offsets[settings.max_question_length - 1][1]]
    used = min(len(tokens), settings.max_question_length) + tokenizer.num_special_tokens_to_add(is_pair=True)
    room = settings.max_length - used
    if room < 1:
        raise InvalidInput(
            f"question {question.id!r} has {used} tokens and leaves no room for its text in "
            f"max_length={settings.max_length}: raise that, or lower max_question_length"
        )
    overlap = max(0, room - settings.doc_stride)
    tokenizer.enable_truncation(settings.max_length, stride=overlap, strategy="only_second")
    first = tokenizer.encode(asked, question.context)
    encodings = [first, *first.overflowing]
    placed = []
    for encoding in encodings:
        of_text = np.array([sequence == 1 for sequence in encoding.sequence_ids])
        placed.append(np.where(of_text[:, None], np.array(encoding.offsets), -1))
    return [
        Window(np.array(encoding.ids), np.array(encoding.type_ids), offsets, begins)
        for encoding, offsets, begins in zip(encodings, placed, _begins(placed), strict=True)
    ]


def _begins(placed: Sequence[np.ndarray]) -> list[np.ndarray]:
    """See Window.begins: a token counts where the lesser of what is left and right of it is the most."""
    most: dict[tuple[int, int], tuple[float, int]] = {}
    for i, offsets in enumerate(placed):
        of_text = np.flatnonzero(offsets[:, 0] >= 0)
        for at in of_text:
            around = min(at - of_text[0], of_text[-1] - at) + 0.01 * len(of_text)
            where = (int(offsets[at, 0]), int(offsets[at, 1]))
            if where not in most or around > most[where][0]:
                most[where] = (around, i)
    return [
        np.array([a >= 0 and most[int(a), int(b)][1] == i for a, b in offsets], bool)
        for i, offsets in enumerate(placed)
    ]


def best_answers(
    question: Question, windows: Sequence[Window], scores: Sequence[tuple[np.ndarray, np.ndarray]], settings: Settings
) -> list[Answer]:
    """The n best, the best first. scores: of each window's tokens as first and as last, [L] each."""
    found: dict[str, float] = {}
    no_answer = min(float(start[0] + end[0]) for start, end in scores)
    for window, (start, end) in zip(windows, scores, strict=True):
        firsts = [i for i in np.argsort(-start)[: settings.n_best] if window.begins[i]]
        lasts = [i for i in np.argsort(-end)[: settings.n_best] if window.offsets[i, 0] >= 0]
        for first, last in ((a, b) for a in firsts for b in lasts if a <= b < a + settings.max_answer_length):
            text = question.context[window.offsets[first, 0] : window.offsets[last, 1]]
            found[text] = max(found.get(text, -np.inf), float(start[first] + end[last]))
    best = sorted(found.items(), key=lambda item: -item[1])[: settings.n_best]
    if settings.null_threshold is not None or not best:
        nothing = ("", no_answer)
        first = not best or no_answer - best[0][1] > (settings.null_threshold or 0.0)
        best = [nothing, *best] if first else [*best, nothing]
    odds = np.exp(np.array([score for _, score in best]) - max(score for _, score in best))
    return [Answer(text, score, float(p)) for (text, score), p in zip(best, (odds / odds.sum()).tolist(), strict=True)]


async def answer(
    questions: Sequence[Question], tokenizer: Any, infer: Infer, settings: Settings, *, show: bool = False
) -> dict[str, list[Answer]]:
    """The n best answers of each question, by its id; the windows of all are on their way at the same time."""
    free = asyncio.Semaphore(MAX_OUTSTANDING)

    async def score(window: Window) -> tuple[np.ndarray, np.ndarray]:
        async with free:
            given = {
                "input_ids": window.ids[None].astype(np.int64),
                "token_type_ids": window.types[None].astype(np.int64),
            }
            scores = await infer(given)
            return scores["start"][0], scores["end"][0]

    async def one(question: Question) -> tuple[str, list[Answer]]:
        windows = windows_of(question, tokenizer, settings)
        found = question.id, best_answers(question, windows, await asyncio.gather(*map(score, windows)), settings)
        bar.update()
        return found

    with tqdm(total=len(questions), unit=" questions", disable=not show) as bar:
        return dict(await asyncio.gather(*map(one, questions)))


def normalize(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact(found: str, right: str) -> float:
    """1 if they are the same but for what `normalize` takes off, else 0."""
    return float(normalize(found) == normalize(right))


def f1(found: str, right: str) -> float:
    """Of their words: the harmonic mean of precision and recall; where either has none, whether both have none."""
    some, others = normalize(found).split(), normalize(right).split()
    if not some or not others:
        return float(some == others)
    same = sum((collections.Counter(some) & collections.Counter(others)).values())
    return 2 * same / (len(some) + len(others))


def evaluate(questions: Sequence[Question], found: Mapping[str, str]) -> dict[str, float]:
    """Means in percent over all questions, and over those that have an answer, and have none."""
    scores: dict[str, list[tuple[float, float]]] = {"": [], "HasAns_": [], "NoAns_": []}
    for question in questions:
        right = [answer for answer in question.answers if normalize(answer)] or [""]
        text = found[question.id]
        score = max(exact(text, each) for each in right), max(f1(text, each) for each in right)
        scores[""].append(score)
        scores["HasAns_" if question.answers else "NoAns_"].append(score)
    figures: dict[str, float] = {}
    for kind, each in scores.items():
        if each:
            exact_mean, f1_mean = (np.mean(each, 0) * 100).tolist()
            figures |= {f"{kind}exact": exact_mean, f"{kind}f1": f1_mean, f"{kind}total": float(len(each))}
    return figures


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--tokenizer", "folder", required=True, type=click.Path(exists=True, path_type=Path), help="Of the model."
)
@click.option("--address", default="grpc://127.0.0.1:8001", show_default=True)
@click.option("--model", default="bert", show_default=True)
@click.option("--max-length", default=384, show_default=True, help="Tokens of a window, with its question.")
@click.option("--doc-stride", default=128, show_default=True, help="Tokens from a window's start to the next one's.")
@click.option("--n-best", default=20, show_default=True)
@click.option("--max-answer-length", default=30, show_default=True, help="In tokens.")
@click.option("--null-threshold", default=0.0, show_default=True, help="By how much no answer must be better.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the n best answers here, in JSON.")
def main(
    file: Path,
    folder: Path,
    address: str,
    model: str,
    max_length: int,
    doc_stride: int,
    n_best: int,
    max_answer_length: int,
    null_threshold: float,
    out: Path | None,
) -> None:
    """Ask the questions of FILE, in SQuAD's format, and say how many answers are right."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json" if folder.is_dir() else folder))
    tokenizer.no_padding()
    questions = read_questions(file)
    threshold = null_threshold if any(not question.answers for question in questions) else None
    settings = Settings(
        max_length, doc_stride, n_best=n_best, max_answer_length=max_answer_length, null_threshold=threshold
    )
    found = asyncio.run(_ask(questions, tokenizer, address, model, settings))
    if out is not None:
        out.write_text(json.dumps({name: [each._asdict() for each in best] for name, best in found.items()}, indent=1))
    for name, value in evaluate(questions, {name: best[0].text for name, best in found.items()}).items():
        click.echo(f"{name}: {value:.2f}")


async def _ask(
    questions: Sequence[Question], tokenizer: Any, address: str, model: str, settings: Settings
) -> dict[str, list[Answer]]:
    client = RowsClient(address)
    try:
        return await answer(questions, tokenizer, lambda inputs: client.infer(model, inputs), settings, show=True)
    finally:
        await client.stop()


if __name__ == "__main__":
    main()
