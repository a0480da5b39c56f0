"""Which sentence of a text answers a question: sentence embeddings of a served BERT.

    serve run configs/bert.yaml
    python -m examples.ranking docs/operations.md "What happens when a replica dies?"

The question and all sentences are sent as texts; the nearest in direction comes first.
"""

import re
from pathlib import Path

import click
import httpx
import numpy as np

MAX_ROWS = 64
"""Of a request: batching.max_batch_size."""
MAX_WORDS = 100
"""Of a sentence; a longer one is ranked in parts."""


def sentences(text: str) -> list[str]:
    """Sentences and headings of a text, markup taken off."""
    parts = re.split(r"(?<=[.!?:;])\s+|\n\s*\n|\n(?=[-|#])", re.sub(r"\]\([^)]*\)|[`*#|\[\]]", " ", text))
    words = [part.split() for part in parts]
    cut = [part[i : i + MAX_WORDS] for part in words for i in range(0, len(part), MAX_WORDS)]
    return [" ".join(part) for part in cut if len(part) > 3]


def embed(texts: list[str], url: str, model: str = "bert") -> np.ndarray:
    """Embeddings [texts, hidden], of length 1, by the Open Inference Protocol."""
    found: list[list[float]] = []
    for i in range(0, len(texts), MAX_ROWS):
        rows = texts[i : i + MAX_ROWS]
        given = {"name": "text", "datatype": "BYTES", "shape": [len(rows)], "data": rows}
        response = httpx.post(f"{url}/v2/models/{model}/infer", json={"inputs": [given]}, timeout=60)
        if response.is_error:
            raise click.ClickException(f"{response.status_code}: {response.text}")
        (output,) = response.json()["outputs"]
        found += np.reshape(output["data"], output["shape"]).tolist()
    return np.array(found, np.float32)


def rank(question: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Indices of answers [n, hidden], the best first, for a question [hidden]."""
    order: np.ndarray = np.argsort(-(answers @ question), kind="stable")
    return order


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("question")
@click.option("--url", default="http://localhost:8000", show_default=True)
@click.option("--best", default=3, show_default=True, help="How many to show.")
def main(file: Path, question: str, url: str, best: int) -> None:
    """Rank the sentences of a text by how well they answer a question."""
    there = sentences(file.read_text())
    (asked, *told) = embed([question, *there], url)
    scores = np.array(told) @ asked
    for i in rank(asked, np.array(told))[:best]:
        click.echo(f"{scores[i]:.2f}  {there[i]}")


if __name__ == "__main__":
    main()
