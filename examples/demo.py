"""`make demo`: 64 live sessions of real speech through a served voice detector, checked against its own package.

Fetches the speech that the silero-vad source package carries, starts Ray and the application on this machine, streams
sessions cut from it (different offsets and lengths, joining and leaving), and compares every probability with the
package's own model, fed one session at a time. Exits with 1 if any output is wrong or missing.
"""

import asyncio
import functools
import logging
import subprocess
import sys
import tarfile
import time
import warnings
from dataclasses import dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import NoReturn

import click
import numpy as np
import ray
import torch
from ray import serve
from tqdm import tqdm

from clients.audio import read_wav
from clients.client import Client, connect
from clients.vad import speech_intervals, timeline
from serve_app.app import build

RATE = 16000
TIMESTEP = 512
TOLERANCE = 1e-4
SPEECH = ("tests/data/test.wav", "examples/c++/aepyx.wav")


@dataclass
class Take:
    """One session: the samples it streams from `at_s` on, and what comes back."""

    name: str
    at_s: float
    samples: np.ndarray
    probabilities: list[float] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    segments: int = 0

    @property
    def timesteps(self) -> int:
        return -(-len(self.samples) // TIMESTEP)


@click.command()
@click.option("--sessions", default=64, show_default=True, type=click.IntRange(1))
@click.option("--speed", default=2.0, show_default=True, type=click.FloatRange(0.1), help="1 is real time.")
@click.option("--segment-ms", default=100.0, show_default=True, type=click.FloatRange(1), help="Audio sent at once.")
@click.option("--transport", default="handle", show_default=True, type=click.Choice(["handle", "websocket"]))
@click.option("--port", default=8000, show_default=True, help="Of the HTTP and WebSocket ingress.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures here.")
@click.option("--data", default=Path(".data"), show_default=True, type=click.Path(file_okay=False, path_type=Path))
def main(
    sessions: int, speed: float, segment_ms: float, transport: str, port: int, json_file: Path | None, data: Path
) -> None:
    """Stream sessions of real speech through Silero VAD on Ray Serve, and check every output."""
    takes = cut(speech(data), sessions)
    with Application(port):
        target = "lockstep" if transport == "handle" else f"ws://127.0.0.1:{port}"
        took_s = asyncio.run(stream(target, takes, speed, round(segment_ms * RATE / 1000)))
        batch_size = asyncio.run(mean_batch_size())
    show(takes)
    missing = sum(take.timesteps - len(take.probabilities) for take in takes)
    difference = max(largest_difference(take) for take in takes)
    p50, p99 = np.percentile(np.concatenate([take.delays_s for take in takes]), [50, 99]) * 1e3
    timesteps = sum(take.timesteps for take in takes)
    figures = {
        "vad_max_diff": difference,
        "missing_outputs": missing,
        "segments_per_s": sum(take.segments for take in takes) / took_s,
        "delay_p50_ms": float(p50),
        "delay_p99_ms": float(p99),
        "mean_batch_size": batch_size,
    }
    click.echo(
        f"\n{sessions} sessions, {timesteps:,} timesteps of {TIMESTEP} samples in {took_s:.1f} s\n"
        f"largest difference to the package's own model   {difference:.1e} (tolerance {TOLERANCE:.0e})\n"
        f"outputs missing                                 {missing}\n"
        f"segments per second                             {figures['segments_per_s']:,.0f}\n"
        f"delay of a segment, p50 and p99                 {p50:.1f} ms, {p99:.1f} ms\n"
        f"mean batch size                                 {batch_size:.1f}"
    )
    if json_file is not None:
        from bench.report import save

        save(figures, json_file)
    if missing or not difference <= TOLERANCE:
        click.echo("FAILED: outputs are wrong or missing", err=True)
        sys.exit(1)


def speech(data: Path) -> list[np.ndarray]:
    """The recordings in the silero-vad source package, fetched with pip once and kept in `data`."""
    paths = [data / Path(name).name for name in SPEECH]
    if not all(path.exists() for path in paths):
        version = metadata.version("silero-vad")
        click.echo(f"fetching speech: the source package of silero-vad {version} …")
        data.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(data), f"silero-vad=={version}"], check=True)
        (archive,) = data.glob("silero_vad-*.tar.gz")
        with tarfile.open(archive) as tar:
            for name, path in zip(SPEECH, paths, strict=True):
                member = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/{name}")
                assert member is not None, f"{name} is no file in {archive}"
                path.write_bytes(member.read())
        archive.unlink()
    return [read_wav(path)[0] for path in paths]


def cut(recordings: list[np.ndarray], sessions: int) -> list[Take]:
    """Sessions of 4 to 16 s from all over the recordings, joining within 8 s. The same every time."""
    rng = np.random.default_rng(0)
    takes = []
    for i in range(sessions):
        recording = recordings[i % len(recordings)]
        length = int(rng.uniform(4, 16) * RATE)
        first = int(rng.integers(0, len(recording) - length))
        takes.append(Take(f"session-{i:02}", float(rng.uniform(0, 8)), recording[first : first + length]))
    return takes


class Application:
    """Ray and the application, on this machine, for the time of a `with` block."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __enter__(self) -> None:
        click.echo("starting Ray and the application …")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(http_options={"port": self._port}, logging_config={"log_level": "ERROR"})
        serve.run(build({"model": "silero_vad"}), name="lockstep")

    def __exit__(self, *_: object) -> None:
        ray.shutdown()  # the Ray that was started here, and so all that runs on it


async def stream(target: str, takes: list[Take], speed: float, segment: int) -> float:
    """Play all takes at once; returns how long it took, in seconds."""
    async with connect(target) as client:
        began = time.monotonic()
        with tqdm(total=sum(take.timesteps for take in takes), unit=" timesteps", mininterval=0.2) as bar:
            await asyncio.gather(*(play(client, take, began, speed, segment, bar) for take in takes))
        return time.monotonic() - began


async def play(client: Client, take: Take, began: float, speed: float, segment: int, bar: "tqdm[NoReturn]") -> None:
    """One client: speaks at its own pace, and listens for what comes back."""
    await asyncio.sleep(max(0.0, began + take.at_s / speed - time.monotonic()))
    session = await client.open(take.name)
    due: list[tuple[int, float]] = []  # (the timestep a segment ends at, when it was submitted)

    async def listen() -> None:
        async for outputs in session.outputs():
            take.probabilities += outputs.values["probability"].tolist()
            bar.update(len(outputs))
            while due and due[0][0] <= outputs.end:
                take.delays_s.append(time.monotonic() - due.pop(0)[1])

    listening = asyncio.create_task(listen())
    start = time.monotonic()
    for at in range(0, len(take.samples), segment):
        await asyncio.sleep(max(0.0, start + (at + segment) / RATE / speed - time.monotonic()))
        before, now = session.submitted, time.monotonic()
        if (end := session.submit(take.samples[at : at + segment])) > before:
            due.append((end, now))
            take.segments += 1
    await session.close()
    await listening


async def mean_batch_size() -> float:
    """Sessions of a step, on average, as the replica counted them."""
    handle = serve.get_deployment_handle("Recurrent", "lockstep")
    stats = await handle.stats.remote()
    return float(stats["session_steps"] / max(1, stats["steps"]))


def show(takes: list[Take]) -> None:
    """The speech of every session as a line."""
    longest_s = max(len(take.samples) for take in takes) / RATE
    for take in takes:
        length_s = len(take.samples) / RATE
        intervals = speech_intervals(take.probabilities, TIMESTEP / RATE)
        line = timeline(intervals, length_s, max(1, round(60 * length_s / longest_s)))
        speech_s = sum(interval.end_s - interval.start_s for interval in intervals)
        click.echo(f"{take.name}  {line:<60}  {speech_s:4.1f} of {length_s:4.1f} s")


def largest_difference(take: Take) -> float:
    """Between what came back and the package's own model on the same samples; infinite where something is missing."""
    model = package_model()
    model.reset_states()
    samples = torch.from_numpy(np.pad(take.samples, (0, -len(take.samples) % TIMESTEP))).view(-1, 1, TIMESTEP)
    with torch.inference_mode():
        expected = np.array([model(timestep, RATE).item() for timestep in samples])
    if len(expected) != len(take.probabilities):
        return float("inf")
    return float(np.abs(expected - take.probabilities).max())


@functools.cache
def package_model() -> torch.jit.ScriptModule:
    """The model as the package ships it, which keeps one session's state inside."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model: torch.jit.ScriptModule = torch.jit.load(str(resources.files("silero_vad") / "data" / "silero_vad.jit"))  # type: ignore[no-untyped-call]
    return model


if __name__ == "__main__":
    main()
