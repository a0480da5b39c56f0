"""The commands of the README, as a newcomer types them, against the tests' own Ray."""

import os
import re
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from ray import serve

from clients.blocking import BlockingClient
from serve_app.config import ModelConfig
from serve_app.models import registry

pytestmark = [pytest.mark.serve, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of a buzz with noise, 16 kHz."""
    t = np.arange(3 * 16000) / 16000
    sound = sum(np.sin(2 * np.pi * 140 * n * t) / n for n in range(1, 20)) * (np.sin(2 * np.pi * 3 * t) > 0)
    sound = 0.1 * sound + np.random.default_rng(0).normal(0, 0.003, len(t))
    path = tmp_path_factory.mktemp("audio") / "buzz.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((sound * 32767).astype("<i2").tobytes())
    return path


def start(*command: str, repository: Path) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def run(*command: str, repository: Path) -> str:
    done = start(*command, repository=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SERVE_RUN = [str(Path(sys.executable).parent / "serve"), "run", "--non-blocking"]


@pytest.fixture
def serve_run(cluster: None, repository: Path) -> Iterator[Callable[..., None]]:
    """`serve run` with some arguments, until the application runs; it is deleted afterwards."""

    def start(*arguments: str) -> None:
        run(*SERVE_RUN, *arguments, repository=repository)
        deadline = time.monotonic() + 60
        while (states := [app.status for app in serve.status().applications.values()]) != ["RUNNING"]:
            assert time.monotonic() < deadline, states
            time.sleep(0.2)

    yield start
    for name in serve.status().applications:
        serve.delete(name)


def test_vad_yaml_and_the_command_line(
    serve_run: Callable[..., None], repository: Path, http_port: int, voice: Path
) -> None:
    serve_run("configs/vad.yaml")
    for address in ("lockstep", f"ws://127.0.0.1:{http_port}"):
        out = run(sys.executable, "-m", "clients", "vad", "--address", address, str(voice), repository=repository)
        assert re.search(r"buzz\.wav  [·█]{60}", out)
    out = run(
        sys.executable, "-m", "clients", "bench", "--address", f"ws://127.0.0.1:{http_port}", "--sessions", "4",
        "--seconds", "1", repository=repository,
    )  # fmt: skip
    assert re.search(r"4 sessions, 1 timesteps a segment: [\d,]+ segments/s", out)


def test_lstm_yaml(serve_run: Callable[..., None], repository: Path) -> None:
    serve_run("configs/lstm.yaml")
    with BlockingClient("lockstep", timeout_s=30) as client, client.open() as session:
        session.submit(np.ones((2, 256), np.float32))
        assert session.wait() == 2


def test_bert_yaml_and_the_ranking_of_sentences(
    serve_run: Callable[..., None], repository: Path, http_port: int
) -> None:
    serve_run("configs/bert.yaml")
    out = run(
        sys.executable, "-m", "examples.ranking", "docs/operations.md",
        "What happens to requests when the GPU does not work any more?", "--url", f"http://127.0.0.1:{http_port}",
        repository=repository,
    )  # fmt: skip
    assert re.fullmatch(r"(0\.\d\d  .+\n){3}", out)
    assert "Serve replaces the replica" in out


def test_import_path_with_arguments(serve_run: Callable[..., None], repository: Path, http_port: int) -> None:
    serve_run("--name", "eight", "serve_app.app:build", "model=silero_vad", "model.sample_rate=8000", "engine.slots=32")
    samples = np.random.default_rng(0).normal(0, 0.1, 1000).astype(np.float32)
    with BlockingClient(f"ws://127.0.0.1:{http_port}", timeout_s=30) as client:
        assert client.models()["silero_vad"].sample_rate == 8000
        with client.open() as session:
            assert [session.submit(samples[:300]), session.submit(samples[300:])] == [1, 3]
        values = np.concatenate([outputs.values["probability"] for outputs in session.outputs()])
    model = registry.load(ModelConfig("silero_vad", {"sample_rate": 8000}))
    x = torch.from_numpy(np.pad(samples, (0, 24)).reshape(4, 1, 256))  # the last timestep is filled up with zeros
    with torch.inference_mode():
        expected, _ = model.forward(x, model.initial_state(1))
    np.testing.assert_allclose(values, expected[:, 0].numpy(), atol=1e-5)


def test_a_wrong_key_is_named_with_a_suggestion(cluster: None, repository: Path) -> None:
    done = start(*SERVE_RUN, "serve_app.app:build", "engine.slot=3", repository=repository)
    assert done.returncode != 0
    assert re.search(r"engine\.slot\b.*engine\.slots", done.stderr)
