"""The engine on a GPU: the same outputs as on the CPU, with sessions evicted and restored. Needs no Ray."""

import copy
import random

import numpy as np
import pytest
import torch

from serve_app.config import AppConfig, EngineConfig, FrameConfig, SessionConfig
from serve_app.engine import cuda_runner
from serve_app.frame import NO_CLOSE
from serve_app.models.options import RnnOptions, SileroOptions
from serve_app.models.rnn import FP8_TOLERANCE, Rnn
from serve_app.models.silero_vad import SileroVad
from tests.fakes import Sender, SumModel, check_checkpoints

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where there is a GPU"),
]


@pytest.fixture(autouse=True)
def full_precision() -> None:
    """fp32 means fp32 here: TF32 would be a numerics class of its own."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def run(
    model: torch.nn.Module | SumModel, x: dict[int, np.ndarray], device: str, **engine: int
) -> dict[int, np.ndarray]:
    """All outputs of each session, its inputs sent in random pieces."""
    config = AppConfig(
        engine=EngineConfig(device=device, calibration_file="", **engine),
        session=SessionConfig(max_sessions=len(x)),
        frame=FrameConfig(answer_within_s=1),
    )
    sender, rng = Sender(model, config), random.Random(0)
    sender.open(*x)
    at = dict.fromkeys(x, 0)
    while behind := [epoch for epoch in x if at[epoch] < len(x[epoch])]:
        entries = []
        for epoch in rng.sample(behind, max(1, len(behind) // 2)):
            end = min(len(x[epoch]), at[epoch] + rng.randint(1, 20))
            entries.append({"epoch": epoch, "start": at[epoch], "x": x[epoch][at[epoch] : end]})
            at[epoch] = end
        sender.send(*entries)
        sender.run()
        sender.poll()
    assert sender.engine.stats.evictions > 0
    sender.engine.check()
    return {epoch: sender.line(epoch) for epoch in x}


def relative(found: dict[int, np.ndarray], expected: dict[int, np.ndarray]) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ of a session."""
    return max(
        float(
            np.linalg.norm(found[epoch].astype("f8") - expected[epoch]) / np.linalg.norm(expected[epoch].astype("f8"))
        )
        for epoch in expected
    )


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("cell", ["lstm", "gru", "tanh", "relu"])
def test_cells_equal_the_cpu(cell: str) -> None:
    x = {e: np.random.default_rng(e).standard_normal((60, 32), np.float32) for e in range(1, 101)}
    options = RnnOptions(cell=cell, input=32, hidden=64, layers=2, projection=48 if cell == "lstm" else 0)
    size = {"slots": 24, "max_batch_size": 16, "max_step_timesteps": 8}
    assert relative(run(Rnn(options), x, "cuda", **size), run(Rnn(options), x, "cpu", **size)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_precision_is_near_the_cpu(dtype: str, tolerance: float) -> None:
    kind = np.float16 if dtype == "fp16" else np.float32
    x = {e: np.random.default_rng(e).standard_normal((60, 32), np.float32).astype(kind) for e in range(1, 65)}
    size = {"slots": 24, "max_batch_size": 16, "max_step_timesteps": 8}
    options = {"input": 32, "hidden": 64, "layers": 2}
    found = run(Rnn(RnnOptions(dtype=dtype, **options)), x, "cuda", **size)  # type: ignore[arg-type]
    single = {epoch: values.astype(np.float32) for epoch, values in x.items()}
    assert relative(found, run(Rnn(RnnOptions(**options)), single, "cpu", **size)) < tolerance


def test_fp8_weights_are_near_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    x = {e: np.random.default_rng(e).standard_normal((60, 32), np.float32).astype(np.float16) for e in range(1, 65)}
    size = {"slots": 24, "max_batch_size": 16, "max_step_timesteps": 8}
    options = {"input": 32, "hidden": 256, "layers": 3, "quantization": "fp8"}
    found = run(Rnn(RnnOptions(dtype="fp16", **options)), x, "cuda", **size)  # type: ignore[arg-type]
    single = {epoch: values.astype(np.float32) for epoch, values in x.items()}
    assert relative(found, run(Rnn(RnnOptions(**options)), single, "cpu", **size)) < FP8_TOLERANCE  # type: ignore[arg-type]
    assert "fused_lstm is not used" not in caplog.text


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2), ("tf32", 2e-3), ("fp32", 1e-5)])
def test_thousand_timesteps_near_float64(dtype: str, tolerance: float) -> None:
    """Sessions join while others run and leave when they are through, three times as many as slots at any time."""
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    num_timesteps, together = 1000, 48
    model = Rnn(RnnOptions(input=64, hidden=256, layers=3, dtype=dtype))
    seed = np.random.SeedSequence().entropy
    rng = np.random.default_rng(seed)
    draws = rng.standard_normal((72, num_timesteps, 64), np.float32).astype(model.input.dtype)
    engine = EngineConfig(device="cuda", calibration_file="", slots=16, max_batch_size=16, max_step_timesteps=16)
    sender = Sender(model, AppConfig(engine=engine, session=SessionConfig(max_sessions=together)))
    joining = list(range(1, len(draws) + 1))
    at: dict[int, int] = {}
    while joining or at:
        while joining and len(at) < together:
            at[joining[-1]] = 0
            sender.open(joining.pop())
        entries = []
        for epoch in rng.choice(list(at), max(1, len(at) // 2), replace=False).tolist():
            end = min(num_timesteps, at[epoch] + int(rng.integers(1, 33)))
            close = num_timesteps if end == num_timesteps else NO_CLOSE
            x = draws[epoch - 1][at[epoch] : end]
            entries.append({"epoch": epoch, "start": at[epoch], "acked": at[epoch], "x": x, "close": close})
            at[epoch] = end
        sender.send(*entries)
        sender.run()
        sender.poll()
        done = [epoch for epoch, end in at.items() if end == num_timesteps]
        sender.send(*({"epoch": epoch, "start": num_timesteps, "acked": num_timesteps} for epoch in done))
        for epoch in done:
            del at[epoch]
    sender.engine.check()
    assert min(sender.engine.stats.evictions, sender.engine.stats.restores) > len(draws)
    twin = copy.deepcopy(model).cpu().double()
    with torch.inference_mode():
        expected, _ = twin.rnn(torch.from_numpy(draws).to(model.dtype).double().transpose(0, 1))
    found = {epoch: sender.line(epoch) for epoch in range(1, len(draws) + 1)}
    due = {epoch: expected[:, epoch - 1].numpy() for epoch in found}
    assert relative(found, due) < tolerance, f"seed {seed}"


def test_silero_equals_the_cpu() -> None:
    x = {e: np.random.default_rng(e).normal(0, 0.1, (40, 512)).astype(np.float32) for e in range(1, 65)}
    size = {"slots": 24, "max_batch_size": 16, "max_step_timesteps": 8}
    found, expected = (run(SileroVad(SileroOptions()), x, device, **size) for device in ("cuda", "cpu"))
    for epoch in x:
        np.testing.assert_allclose(found[epoch], expected[epoch], rtol=1e-4, atol=1e-4)


def test_uploads_and_downloads_on_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "WORTH_A_STREAM", 0)
    x = {e: np.random.default_rng(e).standard_normal((60, 32), np.float32) for e in range(1, 101)}
    options, size = RnnOptions(input=32, hidden=64), {"slots": 24, "max_batch_size": 16, "max_step_timesteps": 8}
    assert relative(run(Rnn(options), x, "cuda", **size), run(Rnn(options), x, "cpu", **size)) < 1e-5


def test_a_model_that_cannot_be_captured_runs_all_the_same() -> None:
    """SumModel looks at its input on the host, which a capture does not allow."""
    before = torch.cuda.current_stream()
    x = {e: np.random.default_rng(e).integers(-9, 9, (50, 2)) for e in range(1, 33)}
    found = run(SumModel(), x, "cuda", slots=8, max_batch_size=8, max_step_timesteps=4)
    assert torch.cuda.current_stream() == before
    assert torch.isfinite(torch.randn(8, device="cuda")).all(), "random numbers can be drawn"
    for epoch, values in x.items():
        assert found[epoch].tolist() == values.cumsum(0).tolist()


def test_whole_numbers_are_equal_to_the_bit() -> None:
    x = {e: np.random.default_rng(e).integers(-9, 9, (50, 2)) for e in range(1, 301)}
    found = run(SumModel(), x, "cuda", slots=64, max_batch_size=32, max_step_timesteps=4)
    for epoch, values in x.items():
        assert found[epoch].tolist() == values.cumsum(0).tolist()


def test_checkpoints_have_the_states_of_their_timesteps() -> None:
    check_checkpoints("cuda")
