"""Our LSTM kernel against float64: any shape, batch and length, in a CUDA graph and outside. Needs no Ray."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from serve_app.models import fused_lstm
from serve_app.models.fused_lstm import H_SCALE, TILES, FusedLstm, Tiles, top_k
from serve_app.models.options import RnnOptions
from serve_app.models.rnn import FP8_TOLERANCE, Rnn

CUDA = torch.device("cuda")
TOLERANCE = {"fp16": 2e-3, "bf16": 2e-2}
LARGE = RnnOptions(input=128, hidden=1024, layers=7, output=1024, top_k=8, dtype="fp16")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="runs where there is a GPU of compute capability 9.0",
    ),
]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated here is full of NaN until something is written there."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pair(options: RnnOptions) -> tuple[Rnn, FusedLstm]:
    """A model and its fused layers."""
    model = Rnn(options).to(CUDA)
    return model, FusedLstm(model)


def draw(options: RnnOptions, timesteps: int, batch: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Random x and state, another at every call."""
    dtype = Rnn(RnnOptions(dtype=options.dtype)).dtype
    x = torch.randn(timesteps, batch, options.input, device=CUDA).to(dtype)
    h, c = (torch.randn(options.layers, batch, options.hidden, device=CUDA).to(dtype) / 2 for _ in range(2))
    return x, (h, c)


def exact(model: Rnn) -> Rnn:
    """The same weights in float64, and not through cuDNN."""
    twin = copy.deepcopy(model).double()
    twin.dtype = torch.float64
    return twin


def run_exact(
    twin: Rnn, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    with torch.backends.cudnn.flags(enabled=False):
        y, state = twin.rnn(x.double(), (state[0].double(), state[1].double()))
    return y, state


def errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """‖found - expected‖ / ‖expected‖ of each session, [B]; the batch is the dimension before the last."""
    assert found.shape == expected.shape
    others = [dim for dim in range(found.dim()) if dim != found.dim() - 2]
    norm = torch.linalg.vector_norm(found.double() - expected, dim=others)
    return norm / torch.linalg.vector_norm(expected.double(), dim=others)


def check(options: RnnOptions, timesteps: int, batch: int) -> None:
    model, fused = pair(options)
    x, state = draw(options, timesteps, batch)
    before = [leaf.clone() for leaf in state]
    with poisoned():
        y, (h, c) = fused.layers(x, state)
    expected_y, (expected_h, expected_c) = run_exact(exact(model), x, state)
    for found, expected in ((y, expected_y), (h, expected_h), (c, expected_c)):
        assert found.dtype == model.dtype
        assert errors(found, expected).max() < TOLERANCE[options.dtype]
    assert all(torch.equal(leaf, old) for leaf, old in zip(state, before, strict=True))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("shape", "timesteps", "batch"),
    [
        ((32, 64, 1), 1, 1),
        ((32, 64, 2), 5, 33),
        ((72, 128, 3), 7, 200),
        ((200, 128, 1), 12, 65),
        ((8, 192, 2), 3, 129),
        ((256, 256, 3), 2, 500),
    ],
)
def test_near_float64(shape: tuple[int, int, int], timesteps: int, batch: int, dtype: str) -> None:
    size, hidden, layers = shape
    check(RnnOptions(input=size, hidden=hidden, layers=layers, dtype=dtype), timesteps, batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("batch", [1, 200, 1100])
def test_all_tiles_near_float64(tiles: Tiles, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_lstm, "tiles_for", lambda *_: tiles)
    check(RnnOptions(input=40, hidden=256, layers=3, dtype="fp16"), 9, batch)


def run_as_fp8(
    model: Rnn, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """In float64, but that h is rounded as the kernel does before each product, and c after each cell."""

    def rounded(h: torch.Tensor) -> torch.Tensor:
        return (h.to(model.dtype).float() * H_SCALE).to(torch.float8_e4m3fn).double() / H_SCALE

    below, after = x.double(), []
    for layer, weights in enumerate(model.rnn.all_weights):
        w_ih, w_hh, b_ih, b_hh = (weight.double() for weight in weights)
        h, c = (leaf[layer].double() for leaf in state)
        ys = []
        for inputs in below:
            gates = (rounded(inputs) if layer else inputs) @ w_ih.T + b_ih + rounded(h) @ w_hh.T + b_hh
            i, f, g, o = gates.chunk(4, -1)
            c = (f.sigmoid() * c + i.sigmoid() * g.tanh()).to(model.dtype).double()
            h = o.sigmoid() * c.tanh()
            ys.append(h)
        below = torch.stack(ys)
        after.append((h, c))
    return below, (torch.stack([h for h, _ in after]), torch.stack([c for _, c in after]))


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("shape", "timesteps", "batch"), [((72, 128, 3), 7, 200), ((8, 256, 1), 3, 1), ((200, 384, 2), 5, 65)]
)
def test_fp8_as_it_is_meant(
    shape: tuple[int, int, int], timesteps: int, batch: int, dtype: str, tiles: Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_lstm, "tiles_for", lambda *_: tiles)
    size, hidden, layers = shape
    options = RnnOptions(input=size, hidden=hidden, layers=layers, dtype=dtype, quantization="fp8")  # type: ignore[arg-type]
    model, fused = pair(options)
    x, state = draw(options, timesteps, batch)
    x *= 30  # as no number in FP8 could be with the same scale as h
    before = [leaf.clone() for leaf in state]
    with poisoned():
        y, (h, c) = fused.layers(x, state)
    expected_y, (expected_h, expected_c) = run_as_fp8(model, x, state)
    for found, expected in ((y, expected_y), (h, expected_h), (c, expected_c)):
        assert found.dtype == model.dtype
        assert errors(found, expected).max() < 1e-2  # where one of both rounds h up and the other down
    assert all(torch.equal(leaf, old) for leaf, old in zip(state, before, strict=True))


def test_fp8_over_a_thousand_timesteps() -> None:
    """Against float64 with the weights as they were before they were rounded."""
    options = RnnOptions(input=128, hidden=1024, layers=7, dtype="fp16")
    twin, (_, fused) = exact(pair(options)[0]), pair(replace(options, quantization="fp8"))
    _, state = draw(options, 1, 96)
    expected_state = state
    found, expected = [], []
    for _ in range(100):
        x, _ = draw(options, 10, 96)
        y, state = fused.layers(x, state)
        expected_y, expected_state = run_exact(twin, x, expected_state)
        found.append(y)
        expected.append(expected_y)
    assert errors(torch.cat(found), torch.cat(expected)).max() < FP8_TOLERANCE


@pytest.mark.parametrize("batch", [64, 300])
def test_large_model_near_float64(batch: int) -> None:
    check(LARGE, 10, batch)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_thousand_timesteps_near_float64(dtype: str) -> None:
    options = RnnOptions(input=128, hidden=1024, layers=7, dtype=dtype)  # type: ignore[arg-type]
    model, fused = pair(options)
    twin = exact(model)
    _, state = draw(options, 1, 96)
    expected_state = state
    found, expected = [], []
    for _ in range(100):
        x, _ = draw(options, 10, 96)
        with poisoned():
            y, state = fused.layers(x, state)
        expected_y, expected_state = run_exact(twin, x, expected_state)
        found.append(y)
        expected.append(expected_y)
    assert errors(torch.cat(found), torch.cat(expected)).max() < TOLERANCE[dtype]
    for leaf, expected_leaf in zip(state, expected_state, strict=True):
        assert errors(leaf, expected_leaf).max() < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")  # bf16 in torch 2.11
@pytest.mark.parametrize("options", [LARGE, RnnOptions(input=64, hidden=128, layers=2, output=100, dtype="bf16")])
def test_outputs_as_those_of_the_module(options: RnnOptions) -> None:
    model, fused = pair(options)
    x, state = draw(options, 4, 70)
    x = x if options.dtype == "fp16" else x.float()  # bf16 travels as float32
    found, found_state = fused(x, state)
    expected, expected_state = model(x, state)
    for leaf, expected_leaf in zip(found_state, expected_state, strict=True):
        assert (leaf.dtype, leaf.shape) == (expected_leaf.dtype, expected_leaf.shape)
    if not options.top_k:
        assert found.dtype == x.dtype
        assert errors(found, expected).max() < 2 * TOLERANCE[options.dtype]
        return
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape)
    assert errors(found["values"], expected["values"]).max() < 2 * TOLERANCE[options.dtype]


@pytest.mark.parametrize(
    "options",
    [
        LARGE,
        RnnOptions(input=72, hidden=128, layers=3, dtype="fp16"),
        RnnOptions(input=72, hidden=128, layers=3, dtype="fp16", quantization="fp8"),
    ],
)
@pytest.mark.parametrize("spare", [0, 4])
def test_states_in_slots_go_on_and_no_others(options: RnnOptions, spare: int) -> None:
    """Timesteps of a session lie together, as frames have them; what fills the batch up shares a slot."""
    batch, padding, num_slots = 130, 6, 300
    _, fused = pair(options)
    x, _ = draw(options, 10, batch + padding)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    _, states = draw(options, 1, num_slots)
    slots = torch.randperm(num_slots - 1, device=CUDA)[:batch]
    filled = torch.cat([slots, slots.new_full((padding,), num_slots - 1)])
    before = [leaf.clone() for leaf in states]
    expected, expected_state = fused(x[:, :batch], tuple(leaf[:, slots] for leaf in states))
    wanted = [expected["values"], expected["indices"]] if options.top_k else [expected]
    found = [x.new_empty(batch + padding, 10, y.shape[-1], dtype=y.dtype).transpose(0, 1) for y in wanted]
    with poisoned():
        fused.in_slots(x, states, filled, found, spare)
    for y, other in zip(wanted, found, strict=True):
        assert torch.equal(other[:, :batch], y)
    others = torch.ones(num_slots - 1, dtype=torch.bool, device=CUDA)
    others[slots] = False
    for leaf, old, new in zip(states, before, expected_state, strict=True):
        assert torch.equal(leaf[:, slots], new)
        assert torch.equal(leaf[:, :-1][:, others], old[:, :-1][:, others])


def test_graph_gives_what_eager_gives() -> None:
    _, fused = pair(LARGE)
    x, state = draw(LARGE, 10, 130)
    fused(x, state)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, captured_state = fused(x, state)
    for _ in range(5):
        new_x, new_state = draw(LARGE, 10, 130)
        x.copy_(new_x)
        for leaf, new_leaf in zip(state, new_state, strict=True):
            leaf.copy_(new_leaf)
        graph.replay()
        expected, expected_state = fused(new_x, new_state)
        for name in expected:
            assert torch.equal(captured[name], expected[name])
        assert all(torch.equal(leaf, other) for leaf, other in zip(captured_state, expected_state, strict=True))


def test_others_in_the_batch_change_nothing() -> None:
    options = RnnOptions(input=64, hidden=256, layers=2, dtype="fp16")
    _, fused = pair(options)
    x, (h, c) = draw(options, 6, 150)
    y, _ = fused.layers(x, (h, c))
    new_x, (new_h, new_c) = draw(options, 6, 150)
    for old, new in ((x, new_x), (h, new_h), (c, new_c)):
        old[:, :77], old[:, 78:] = new[:, :77], float("nan")
    new_y, _ = fused.layers(x, (h, c))
    assert torch.equal(new_y[:, 77], y[:, 77])


def test_views_are_taken() -> None:
    options = RnnOptions(input=64, hidden=128, layers=2, dtype="fp16")
    _, fused = pair(options)
    x, (h, c) = draw(options, 3, 20)
    y, _ = fused.layers(x, (h, c))
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)  # begins at an odd multiple of two bytes
    rows = torch.stack([h, h], 2)[:, :, 0]
    assert odd.data_ptr() % 16 and not rows.is_contiguous()
    other, _ = fused.layers(odd, (rows, c))
    assert torch.equal(other, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "k"), [(1, 1), (10, 10), (100, 3), (1024, 8), (3000, 32), (1024, 33), (5000, 2)])
def test_top_k_as_torch(outputs: int, k: int, dtype: torch.dtype) -> None:
    y = torch.randn(3, 50, outputs, device=CUDA).to(dtype)
    values, indices = y.new_empty(50, 3, k).transpose(0, 1), y.new_empty(3, 50, k, dtype=torch.int32)
    top_k(y, values, indices)
    assert torch.equal(values, y.topk(k).values)
    assert torch.equal(y.gather(-1, indices.long()), values)
    assert (indices.sort(-1).values.diff(dim=-1) > 0).all()


def test_top_k_of_equals_and_nan() -> None:
    inf = float("inf")
    y = torch.tensor([[[0.5, 0.5, -inf, 0.5], [1.0, float("nan"), inf, -1.0]]], dtype=torch.float16, device=CUDA)
    values, indices = y.new_empty(1, 2, 3), y.new_empty(1, 2, 3, dtype=torch.int32)
    top_k(y, values, indices)
    assert indices.tolist() == [[[0, 1, 3], [1, 2, 0]]]
    assert values[0, 0].tolist() == [0.5, 0.5, 0.5]
    assert values[0, 1, 0].isnan() and values[0, 1, 1:].tolist() == [inf, 1.0]


def test_supports() -> None:
    assert FusedLstm.supports(LARGE, CUDA)
    assert not FusedLstm.supports(LARGE, torch.device("cpu"))
    for options in (
        RnnOptions(),
        RnnOptions(cell="gru", dtype="fp16"),
        RnnOptions(projection=64, dtype="fp16"),
        RnnOptions(hidden=96, dtype="fp16"),
        RnnOptions(hidden=192, dtype="fp16", quantization="fp8"),
        RnnOptions(input=100, dtype="fp16"),
    ):
        assert not FusedLstm.supports(options, CUDA)
