"""A stateless model in batches, on an event loop."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.config import AppConfig, BatchingConfig, EngineConfig, ModelConfig, PriorityConfig
from serve_app.engine.batch_graphs import BatchGraph, BatchGraphs
from serve_app.engine.batch_runner import BatchRunner, Row
from serve_app.engine.batcher import Batcher, build_batcher
from serve_app.errors import ConfigError, InferenceFailed, InvalidInput, Overloaded, TimedOut, Unavailable
from serve_app.rows import RowsRequest
from serve_app.spec import TensorSpec
from tests.stateless import MaskedSum, PackedSum

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def served(name: str = "MaskedSum", **batching: Any) -> AsyncIterator[Batcher]:
    config = AppConfig(
        ModelConfig(f"tests.stateless:{name}"), EngineConfig(device="cpu"), batching=BatchingConfig(**batching)
    )
    batcher = build_batcher(config)
    yield batcher
    await batcher.stop()
    assert batcher.num_waiting == 0


def ask(*rows: list[int], **more: Any) -> RowsRequest:
    return RowsRequest({"ids": np.array(rows, np.int64)}, **more)


def model_of(batcher: Batcher) -> MaskedSum:
    model = batcher._runner._model
    assert isinstance(model, MaskedSum)
    return model


@pytest.mark.parametrize("model", ["MaskedSum", "PackedSum"])
async def test_many_requests_of_any_length_equal_each_alone(model: str) -> None:
    rng = random.Random(0)
    async with served(model, max_batch_size=16, max_padding=0.2, instances=2) as batcher:

        async def one() -> None:
            length = rng.randint(1, 32)
            rows = [[rng.randint(0, 600) for _ in range(length)] for _ in range(rng.randint(1, 5))]
            await asyncio.sleep(rng.random() * 0.02)
            values, timing, _ = await batcher.infer(ask(*rows))
            assert values["total"].tolist() == [sum(row) for row in rows]
            assert values["sums"].tolist() == [np.cumsum(row).tolist() for row in rows]
            assert 1 <= timing.batch_size <= 16

        await asyncio.gather(*(one() for _ in range(500)))
        assert batcher.stats.requests == 500
        assert batcher.stats.batches < batcher.stats.rows / 2
        assert all(size <= 16 for size, _ in model_of(batcher).shapes)


async def test_what_arrives_together_runs_together() -> None:
    async with served(max_batch_size=8) as batcher:
        warmed = len(model_of(batcher).shapes)
        assert warmed == 4  # batches of 1 and 8, of length 1 and 32
        await asyncio.gather(*(batcher.infer(ask([1, 2, 3])) for _ in range(8)))
        assert model_of(batcher).shapes[warmed:] == [(8, 3)]


async def test_rows_one_behind_the_other_share_a_batch_whatever_their_length() -> None:
    async with served("PackedSum", max_batch_size=8) as batcher:
        warmed = len(model_of(batcher).shapes)
        asked = [ask([i] * length) for i, length in enumerate((32, 5, 27, 1, 20, 2, 10, 30))]
        results = await asyncio.gather(*map(batcher.infer, asked))
        assert [values["total"].tolist() for values, *_ in results] == [[0], [5], [54], [3], [80], [10], [60], [210]]
        assert [values["sums"].shape for values, *_ in results] == [x.inputs["ids"].shape for x in asked]
        assert model_of(batcher).shapes[warmed:] == [(4, 32)], "127 of 128 tokens are some row's"
    async with served("PackedSum", max_batch_size=8, pack=False, max_padding=0) as batcher:
        await asyncio.gather(*map(batcher.infer, asked))
        assert len(model_of(batcher).shapes) > 8, "one for each length"


@pytest.mark.parametrize("model", ["MaskedSum", "PackedSum"])
async def test_a_bad_row_costs_no_other(model: str) -> None:
    async with served(model, max_batch_size=16) as batcher:
        requests = [ask([i, i]) for i in range(16)]
        requests[5] = ask([666, 1])
        results = await asyncio.gather(*map(batcher.infer, requests), return_exceptions=True)
        bad = results.pop(5)
        assert isinstance(bad, InferenceFailed) and "a bad row" in str(bad)
        assert [result.values["total"].item() for result in results] == [2 * i for i in range(16) if i != 5]  # type: ignore[union-attr]
        with pytest.raises(InferenceFailed):
            await batcher.infer(ask([1], [666], [2]))
        assert (await batcher.infer(ask([4]))).values["total"].tolist() == [4]
        assert batcher.stats.failed_rows == 2


BAD = {
    "an id out of range": (ask([1, 1000]), "id 1000 is out of range"),
    "too long": (ask([1] * 33), "rows of length 33 arrived, model 'tests.stateless:MaskedSum' takes 1 to 32"),
    "empty": (ask([]), "rows of length 0"),
    "no rows": (RowsRequest({"ids": np.zeros((0, 3), np.int64)}), "a request of 0 rows"),
    "too many rows": (ask(*[[1]] * 9), "a request of 9 rows arrived, model .* takes 1 to 8"),
    "dtype": (RowsRequest({"ids": np.zeros((1, 3))}), "input 'ids' of float64 arrived"),
    "no array": (RowsRequest({"ids": [[1]]}), "input 'ids' of list arrived"),  # type: ignore[dict-item]
    "shape": (RowsRequest({"ids": np.zeros(3, np.int64)}), r"Expected \[-1,-1\], got \[3\]"),
    "unknown": (RowsRequest({"x": np.zeros(3)}), "unexpected inference input 'x'"),
    "missing": (RowsRequest({"mask": np.ones((1, 3), np.int64)}), "input 'ids' is missing"),
    "lengths": (
        RowsRequest({"ids": np.ones((1, 3), np.int64), "mask": np.ones((1, 4), np.int64)}),
        "input 'mask' has length=4, input 'ids' has length=3",
    ),
    "priority": (ask([1], priority=2), "priority is 2, model .* has 1 to 1"),
    "timeout": (ask([1], timeout_s=-1.0), "the timeout is -1.0 s"),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_input_is_named(what: str) -> None:
    request, message = BAD[what]
    async with served(max_batch_size=8) as batcher:
        with pytest.raises(InvalidInput, match=message):
            await batcher.infer(request)
        assert (await batcher.infer(ask([3]))).values["total"].tolist() == [3]


async def test_a_request_that_waits_too_long_and_a_full_queue() -> None:
    levels = (PriorityConfig(max_queue_size=2, timeout_s=0.05), PriorityConfig())
    async with served(max_batch_size=4, max_queue_delay_s=60, priorities=levels) as batcher:
        waiting = [asyncio.create_task(batcher.infer(ask([i]))) for i in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 rows of priority 1 wait, the limit is 2"):
            await batcher.infer(ask([9]))
        for each in waiting:
            with pytest.raises(TimedOut, match="has waited for 0"):
                await each
        assert batcher.stats.timed_out_rows == 2
        with pytest.raises(TimedOut):
            await batcher.infer(ask([1], priority=2, timeout_s=0.01))


async def test_a_caller_who_has_gone_is_not_run() -> None:
    async with served(max_batch_size=2, max_queue_delay_s=60) as batcher:
        gone = asyncio.create_task(batcher.infer(ask([1])))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        assert batcher.num_waiting == 0
        both = await asyncio.gather(*(batcher.infer(ask([i])) for i in (2, 3)))
        assert [result.values["total"].item() for result in both] == [2, 3]


async def test_at_its_stop_everybody_gets_an_answer() -> None:
    async with served(max_batch_size=4, max_queue_delay_s=60) as batcher:
        waiting = asyncio.create_task(batcher.infer(ask([1])))
        await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="stopping"):
        await waiting
    with pytest.raises(Unavailable):
        await batcher.infer(ask([1]))
    with pytest.raises(Unavailable):
        batcher.check_health()


async def test_texts_are_batched_by_what_they_become() -> None:
    async with served("Words", max_batch_size=4) as batcher:
        texts = RowsRequest({"text": np.array([b"one", b"eleven", "fünf".encode()], object)})
        assert (await batcher.infer(texts)).values["count"].tolist() == [3, 6, 5]
        with pytest.raises(InvalidInput, match="the text is empty"):
            await batcher.infer(RowsRequest({"text": np.array([b"one", b""], object)}))
        with pytest.raises(InvalidInput, match="an input of length 101 arrived, the model takes 1 to 100"):
            await batcher.infer(RowsRequest({"text": np.array([b"a" * 101], object)}))
        with pytest.raises(InferenceFailed, match="cannot prepare this request: UnicodeDecodeError"):
            await batcher.infer(RowsRequest({"text": np.array([b"\xff"], object)}))


class Half(torch.nn.Module):
    """Tells which dtype it computes in."""

    def __init__(self) -> None:
        super().__init__()
        from serve_app.spec import TensorSpec

        self.inputs = {"x": TensorSpec((2,))}
        self.outputs = {"y": TensorSpec((1,))}
        self.linear = torch.nn.Linear(2, 1)
        self.seen: set[torch.dtype] = set()

    def forward(self, inputs: Any) -> torch.Tensor:
        self.seen.add(inputs["x"].dtype)
        y: torch.Tensor = self.linear(inputs["x"])
        return y


async def test_weights_and_inputs_in_another_dtype() -> None:
    config = AppConfig(ModelConfig(f"{__name__}:Half"), EngineConfig(device="cpu"))
    with pytest.raises(ConfigError, match="has no section batching"):
        build_batcher(config)
    model = Half()
    runner = BatchRunner(model, torch.device("cpu"), torch.bfloat16)
    (outputs,) = runner.run(runner.rows({"x": np.ones((1, 2), np.float32)}, 1))
    assert isinstance(outputs, dict)
    assert outputs["y"].dtype == np.float32
    assert model.seen == {torch.bfloat16}


async def test_a_model_without_what_it_needs() -> None:
    for name, message in (("tests.fakes:SumModel", "has no inputs"), ("tests.stateless:Nothing", "has no Nothing")):
        with pytest.raises(ConfigError, match=message):
            build_batcher(AppConfig(ModelConfig(name), batching=BatchingConfig()))


async def test_a_model_that_is_too_large_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: MaskedSum, inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskedSum, "forward", forward)
    message = r"batching.max_batch_size=64 is too large for cpu: lower that, or the model's max_length: CUDA out of"
    with pytest.raises(ConfigError, match=message):
        async with served():
            pass


class GraphByHand:
    """None: its inputs are filled and its outputs taken as those of a CUDA graph."""

    nbytes = 0

    def __init__(self, runner: BatchRunner, size: int, length: int) -> None:
        self.inputs = {name: np.full((size, length), 9, np.int64) for name in runner._prepared}
        self._runner = runner
        self._arrays: list[np.ndarray] = []

    def launch(self) -> None:
        inputs = {name: torch.from_numpy(x) for name, x in self.inputs.items()}
        self._arrays = [y.numpy() for y in self._runner._compute(inputs)]

    def wait(self) -> None:
        assert self._arrays

    def outputs(self, rows: int) -> list[np.ndarray]:
        return [y[:rows] for y in self._arrays]


class ByHand(BatchGraphs):
    """Graphs that are none, and which of them were given back."""

    def __init__(self, runner: BatchRunner, sizes: list[int], lengths: list[int]) -> None:
        self._sizes, self._lengths, self._free, self._taken = sizes, lengths, SimpleQueue(), {}
        self.used: list[tuple[int, int]] = []
        graphs: dict[tuple[int, int], Any] = {
            (size, length): GraphByHand(runner, size, length) for size in sizes for length in lengths
        }
        self._free.put(graphs)

    def give_back(self, graph: BatchGraph) -> None:
        self.used += [key for key, other in self._taken[graph].items() if other is graph]
        super().give_back(graph)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_length", 0, "packs its rows, but it has no max_length"),
        ("inputs", {"ids": TensorSpec((-1,), "int64"), "more": TensorSpec((3,))}, "the shape of 'more' is no length"),
        ("outputs", {"sums": TensorSpec((2, -1), "int64")}, "the shape of 'sums' is no length"),
    ],
)
async def test_a_model_whose_rows_cannot_be_packed_is_refused(
    name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedSum, name, value)
    with pytest.raises(ConfigError, match=f"{message}.*: leave out `packs`, or set batching.pack to false"):
        BatchRunner(PackedSum(), torch.device("cpu"), torch.float32, pack_rows=8)
    BatchRunner(PackedSum(), torch.device("cpu"), torch.float32)


async def test_packed_rows_fill_the_next_graph() -> None:
    runner, rng = BatchRunner(PackedSum(), torch.device("cpu"), torch.float32, pack_rows=8), random.Random(0)
    runner._graphs = graphs = ByHand(runner, [1, 2, 4], [32])
    for lengths, expected in (([3], (1, 32)), ([20, 20, 9, 12], (2, 32)), ([30, 20, 20], (4, 32)), ([32] * 5, None)):
        graphs.used.clear()
        ids = [[rng.randint(0, 600) for _ in range(length)] for length in lengths]
        found = runner.run([runner.rows({"ids": np.array([row])}, 1)[0] for row in ids])
        assert graphs.used == ([expected] if expected else [])
        for row, result in zip(ids, found, strict=True):
            assert isinstance(result, dict)
            assert result["total"] == sum(row)
            assert result["sums"].tolist() == np.cumsum(row).tolist()


async def test_batches_are_padded_to_the_next_graph_and_run_without_where_there_is_none() -> None:
    runner, rng = BatchRunner(MaskedSum(), torch.device("cpu"), torch.float32), random.Random(0)
    runner._graphs = graphs = ByHand(runner, [1, 2, 4], [8, 16])
    assert [runner.padded_length(length) for length in (1, 8, 9, 17)] == [8, 8, 16, 17]
    for count, length, expected in ((1, 3, (1, 8)), (2, 8, (2, 8)), (3, 9, (4, 16)), (4, 17, None), (5, 4, None)):
        graphs.used.clear()
        ids = [[rng.randint(0, 600) for _ in range(rng.randint(1, length))] for _ in range(count - 1)]
        ids.append([rng.randint(0, 600) for _ in range(length)])
        rows = [runner.rows({"ids": np.array([row])}, 1)[0] for row in ids]
        found = runner.run(rows)
        assert graphs.used == ([expected] if expected else [])
        for row, result in zip(ids, found, strict=True):
            assert isinstance(result, dict)
            assert result["total"] == sum(row)
            assert result["sums"].tolist() == np.cumsum(row).tolist()


async def test_a_second_batch_is_taken_in_beside_one_that_runs_if_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A quarter of a full one."""
    go, began = threading.Event(), []

    def run(runner: BatchRunner, rows: Sequence[Row]) -> list[Any]:
        began.append(len(rows))
        go.wait(10)
        return [{"total": np.float32(0), "sums": np.zeros(1, np.int64)}] * len(rows)

    monkeypatch.setattr(BatchRunner, "run", run)
    monkeypatch.setattr(BatchRunner, "depth", 2)
    async with served(max_batch_size=8) as batcher:
        asked: list[asyncio.Task[Any]] = []
        for more, expected in ((1, [1]), (1, [1]), (1, [1, 2]), (17, [1, 2])):
            asked += [asyncio.create_task(batcher.infer(ask([1]))) for _ in range(more)]
            await asyncio.sleep(0.05)
            assert began == expected
        go.set()
        await asyncio.gather(*asked)
        assert began == [1, 2, 8, 8, 1]


class Unprepared(MaskedSum):
    prepare = None  # type: ignore[assignment]


async def test_optional_inputs_need_a_prepare_that_fills_them_in() -> None:
    with pytest.raises(ConfigError, match="input 'mask' is optional, but it has no `prepare`"):
        BatchRunner(Unprepared(), torch.device("cpu"), torch.float32)
