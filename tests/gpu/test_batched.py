"""Batches of a stateless model on a GPU, as CUDA graphs: the same outputs as on the CPU, from several threads."""

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from bench.batched import Encoder
from serve_app.config import ModelConfig
from serve_app.engine.batch_graphs import BatchGraph
from serve_app.engine.batch_runner import BatchRunner, Replay, Row
from serve_app.errors import InferenceFailed
from serve_app.models import registry
from serve_app.spec import TensorSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where there is a GPU"),
]
SIZES, LENGTHS = [1, 2, 4, 8], [32, 64, 96]


class Halves(torch.nn.Module):
    """Fails where it cannot be captured: it looks at its inputs."""

    inputs: Mapping[str, TensorSpec] = {"x": TensorSpec((3,))}
    outputs: Mapping[str, TensorSpec] = {"y": TensorSpec((3,))}

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if (inputs["x"] < 0).any():
            raise ValueError("it is negative")
        return inputs["x"] / 2


def rows(runner: BatchRunner, count: int) -> list[Row]:
    """Of all lengths up to 96, and one over that, for which there is no graph."""
    rng, made = np.random.default_rng(0), []
    for length in (*rng.integers(1, 97, count - 1), 105):
        ids = rng.integers(1, 1000, (1, length))
        made += runner.rows({"ids": ids, "mask": np.ones_like(ids)}, 1)
    return made


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
def test_graphs_from_several_threads_give_what_the_cpu_gives(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = Encoder(2)
    here = BatchRunner(copy.deepcopy(model), torch.device("cpu"), torch.float32)
    there = BatchRunner(model, torch.device("cuda"), dtype)
    there.warm_up(SIZES, LENGTHS, instances=2)
    replays = []
    outputs = BatchGraph.outputs
    monkeypatch.setattr(BatchGraph, "outputs", lambda graph, count: replays.append(count) or outputs(graph, count))
    made = rows(here, 120)
    cuts = np.cumsum(np.random.default_rng(1).integers(1, 9, 60))
    batches = [made[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True) if made[a:b]]
    with ThreadPoolExecutor(4) as threads:
        found = [result for results in threads.map(there.run, batches) for result in results]
    assert sum(replays) > 100
    for row, result in zip(made, found, strict=True):
        (expected,) = here.run([row])
        assert isinstance(result, dict) and isinstance(expected, dict)
        np.testing.assert_allclose(result["embedding"], expected["embedding"], atol=tolerance)


def test_packed_rows_of_bert_in_graphs_give_what_each_alone_gives() -> None:
    pytest.importorskip("transformers")
    options = {"weights": "random", "size": "mini", "head": "answer", "input": "tokens", "max_length": 96}
    model = registry.load_stateless(ModelConfig("bert", options))
    alone = BatchRunner(copy.deepcopy(model), torch.device("cuda"), torch.float16)
    packed = BatchRunner(model, torch.device("cuda"), torch.float16, pack_rows=8)
    packed.warm_up(SIZES)
    rng = np.random.default_rng(0)
    for lengths in ([1], [96] * 8, rng.integers(1, 97, 8), [5, 90, 3], rng.integers(1, 20, 8)):
        made = [packed.rows({"input_ids": rng.integers(1, 1000, (1, length))}, 1)[0] for length in lengths]
        started = packed.start(made)
        assert isinstance(started, Replay)
        started.wait()
        for row, result in zip(made, started.results(), strict=True):
            (expected,) = alone.run([row])
            assert isinstance(result, dict) and isinstance(expected, dict)
            np.testing.assert_allclose(result["start"], expected["start"], atol=2e-2)


def test_rows_cost_what_the_next_longer_graph_does() -> None:
    runner = BatchRunner(Encoder(1), torch.device("cuda"), torch.float16)
    assert runner.padded_length(33) == 33
    runner.warm_up([1], LENGTHS)
    assert [runner.padded_length(length) for length in (1, 32, 33, 96, 97)] == [32, 32, 64, 96, 97]


def test_a_model_that_cannot_be_captured_runs_without_graphs() -> None:
    runner = BatchRunner(Halves(), torch.device("cuda"), torch.float32)
    runner.warm_up([1, 4])
    made = runner.rows({"x": np.array([[1, 2, 3], [-1, 0, 0], [4, 5, 6]], np.float32)}, 3)
    first, second, third = runner.run(made)
    assert isinstance(first, dict) and first["y"].tolist() == [0.5, 1.0, 1.5]
    assert isinstance(second, InferenceFailed)
    assert isinstance(third, dict) and third["y"].tolist() == [2.0, 2.5, 3.0]
