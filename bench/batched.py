"""Dynamic batches of a stateless model, as ratios within one run: ragged rows against padded ones, and batches of one.

`ragged_vs_padded`: rows a second when each has its own length and batches are made by length, against the same rows,
all padded to the maximum. `dynamic_vs_single`: against batches of one row. The rows are as long as sentences of docs/.
"""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
import torch

from bench.report import ROOT, json_option, save, show_hardware, table
from serve_app.config import BatchingConfig
from serve_app.engine.batch_runner import BatchRunner
from serve_app.engine.batcher import Batcher
from serve_app.rows import BatchedSpec, RowsRequest
from serve_app.spec import TensorSpec

MAX_LENGTH, VOCABULARY, OUTSTANDING = 128, 1000, 64
TOLERANCE = 1e-4


class Encoder(torch.nn.Module):
    """A transformer of MiniLM's size (6 layers of 384) with random weights: the mean of its token vectors."""

    max_length = MAX_LENGTH

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.inputs = {"ids": TensorSpec((-1,), "int64"), "mask": TensorSpec((-1,), "int64")}
        self.outputs = {"embedding": TensorSpec((384,))}
        self.embed = torch.nn.Embedding(VOCABULARY, 384)
        layer = torch.nn.TransformerEncoderLayer(384, 12, 1536, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Tokens and mask [B, L] -> [B, 384]."""
        mask = inputs["mask"][..., None]
        vectors = self.encoder(self.embed(inputs["ids"]), src_key_padding_mask=inputs["mask"] == 0)
        mean: torch.Tensor = (vectors * mask).sum(1) / mask.sum(1)
        return mean


def sentence_lengths(folder: Path) -> list[int]:
    """Tokens of each sentence of the documents, at 1.3 a word, MAX_LENGTH at most."""
    text = " ".join(path.read_text() for path in sorted(folder.glob("*.md")))
    words = [len(sentence.split()) for sentence in re.split(r"[.:;]\s", text)]
    return [min(MAX_LENGTH, round(1.3 * count) + 2) for count in words if count]


def requests(lengths: Sequence[int], *, padded: bool) -> list[RowsRequest]:
    """A row of each length; padded: filled up to MAX_LENGTH."""
    rng, made = np.random.default_rng(0), []
    for length in lengths:
        size = MAX_LENGTH if padded else length
        ids, mask = np.zeros((1, size), np.int64), np.zeros((1, size), np.int64)
        ids[0, :length], mask[0, :length] = rng.integers(1, VOCABULARY, length), 1
        made.append(RowsRequest({"ids": ids, "mask": mask}))
    return made


async def measure(
    model: Encoder, rows: Sequence[RowsRequest], batch: int, seconds: float
) -> tuple[float, dict[int, np.ndarray]]:
    """Rows a second with OUTSTANDING of them at any time, and the outputs of the first that were asked for."""
    config = BatchingConfig(max_batch_size=batch)
    spec = BatchedSpec("encoder", model.inputs, model.outputs, max_length=MAX_LENGTH, max_batch_size=batch)
    batcher = Batcher(spec, BatchRunner(model, torch.device("cpu"), torch.float32), config)
    outputs: dict[int, np.ndarray] = {}
    began, done = time.monotonic(), 0

    async def one(index: int) -> None:
        nonlocal done
        while time.monotonic() < began + seconds:
            result = await batcher.infer(rows[index % len(rows)])
            outputs.setdefault(index % len(rows), result.values["embedding"])
            done += 1
            index += OUTSTANDING

    await asyncio.gather(*(one(index) for index in range(OUTSTANDING)))
    took_s = time.monotonic() - began
    await batcher.stop()
    return done / took_s, outputs


def difference(some: Mapping[int, np.ndarray], others: Mapping[int, np.ndarray]) -> float:
    """The largest between outputs of the same rows."""
    return max(float(np.abs(some[row] - others[row]).max()) for row in some.keys() & others.keys())


@click.command()
@click.option("--seconds", default=8.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Of each.")
@click.option("--layers", default=6, show_default=True, type=click.IntRange(1))
@json_option
def main(seconds: float, layers: int, json_file: Path | None) -> None:
    """Measure, print, and write the figures."""
    show_hardware()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, lengths = Encoder(layers), sentence_lengths(ROOT / "docs")
    ragged, padded = requests(lengths, padded=False), requests(lengths, padded=True)
    single_rate, alone = asyncio.run(measure(model, ragged, 1, seconds))
    ragged_rate, together = asyncio.run(measure(model, ragged, OUTSTANDING, seconds))
    padded_rate, filled = asyncio.run(measure(model, padded, OUTSTANDING, seconds))
    off = max(difference(together, alone), difference(filled, alone))
    if not off <= TOLERANCE:
        raise RuntimeError(f"outputs of batches are off by {off:.2g} from those of single rows, allowed is {TOLERANCE}")
    figures = {
        "ragged_vs_padded": ragged_rate / padded_rate,
        "dynamic_vs_single": ragged_rate / single_rate,
        "batched_max_diff": off,
    }
    rates = {"single": single_rate, "ragged": ragged_rate, "padded": padded_rate}
    click.echo(table(["rows a second", ""], list(rates.items())))
    click.echo(table(["figure", ""], list(figures.items())))
    shape = {"mean_length": float(np.mean(lengths)), "max_length": MAX_LENGTH, "rows": len(lengths), "layers": layers}
    save(figures, json_file, rows_per_s=rates, workload=shape)


if __name__ == "__main__":
    main()
