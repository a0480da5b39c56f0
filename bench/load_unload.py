"""A model is loaded and unloaded again and again beside one that serves.

    python -m bench.load_unload [--device cuda] [--json FILE]

Sessions of a 2x256 LSTM, one after the other, send at a steady rate all the time, and each of their outputs is compared
with the module's. Meanwhile another model, of some 130 MB, is loaded, asked, and unloaded. Memory is what all processes
of the application and of its Ray have for themselves (USS), while that model is unloaded; and what is taken of the
GPU's then. `swap_growth_mib` is from the first time to the last. What is set up once grows in the first cycles and no
more, a leak grows by as much in each: `swap_mib_per_cycle` is the slope of the second half. `growth_mib` in the file
says whose it is. A cycle takes seconds, and what grows with time, as what Ray and Serve keep of their events, grows in
it too: `--idle` waits as long instead.
"""

import asyncio
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click
import httpx
import numpy as np
import psutil
import ray
import torch
from ray import serve

from bench.chaos_load import IsOver, Line, lstm, run_session, wrong
from bench.closed_loop import SEED
from bench.report import json_option, save, show_hardware, table
from clients.client import Client, connect
from serve_app.app import build

STEADY, OTHER = {"name": "rnn", "seed": SEED}, {"name": "rnn", "input": 1024, "hidden": 1024, "layers": 4}
WITHIN_S = 120.0
SESSION_S, SETTLED_S = 20.0, 5.0


def memory() -> tuple[dict[str, float], int]:
    """MiB of the processes that this one has started, by what they are; and how many there are."""
    found, count = defaultdict[str, float](float), 0
    for process in psutil.Process().children(recursive=True):
        try:
            command = process.cmdline()
            title = command[0] if command and command[0].startswith("ray::") else process.name()
            what, _, _ = title.partition(".")  # an actor's has the method that runs, too
            found[what] += process.memory_full_info().uss / 2**20
            count += 1
        except psutil.Error:  # it has just ended
            continue
    return dict(found), count


def gpu_mib() -> float:
    """MiB of the GPU's memory that are taken; with no GPU, 0."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


class Repository:
    """Loading and unloading, by the Open Inference Protocol."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def load(self) -> None:
        """Load the other model; returns when it is there."""
        (await self._http.post("/v2/repository/models/other/load", json={})).raise_for_status()

    async def unload(self) -> None:
        """Unload it; returns when its replica is gone."""
        (await self._http.post("/v2/repository/models/other/unload", json={})).raise_for_status()
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline:
            index = (await self._http.post("/v2/repository/index", json={})).json()
            if any(entry["name"] == "other" and entry["state"] == "UNAVAILABLE" for entry in index):
                return
            await asyncio.sleep(0.2)
        raise TimeoutError(f"model other is still there {WITHIN_S} s after it was unloaded")


async def ask(client: Client) -> None:
    """A short session of the other model."""
    async with await client.open(model="other") as session:
        await session.wait(session.submit(np.zeros((4, 1024), np.float32)))


async def cycles(
    count: int, idle_s: float, client: Client, repository: Repository
) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
    """Unload and load the other model so many times; with idle_s, once, and wait so long so many times.

    Returns what there was in each cycle, and the memory while that model was unloaded by process.
    """
    found: dict[str, list[float]] = defaultdict(list)
    by_process = list[dict[str, float]]()
    for i in range(count):
        if not idle_s or i == 0:
            await ask(client)
            found["loaded_mib"].append(sum(memory()[0].values()))
            found["loaded_gpu_mib"].append(gpu_mib())
            began = time.monotonic()
            await repository.unload()
            found["unload_s"].append(time.monotonic() - began)
        mib, processes = memory()
        by_process.append(mib)
        found["unloaded_mib"].append(sum(mib.values()))
        found["unloaded_gpu_mib"].append(gpu_mib())
        found["processes"].append(processes)
        began = time.monotonic()
        await (asyncio.sleep(idle_s) if idle_s else repository.load())
        found["load_s"].append(time.monotonic() - began)
        click.echo(f"{i + 1}/{count}: {sum(mib.values()):.0f} MiB in {processes} processes")
    if not idle_s:
        await ask(client)
    return found, by_process


def per_cycle(mib: Sequence[float]) -> float:
    """Slope of the second half, as the median of those between two cycles: one odd cycle does not make it."""
    half = mib[len(mib) // 2 :]
    return median((half[j] - half[i]) / (j - i) for i in range(len(half)) for j in range(i + 1, len(half)))


def after(seconds: float) -> IsOver:
    """From now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


async def talk(client: Client, seed: int, lines: list[Line], stopping: asyncio.Event) -> None:
    """Session after session of the model that stays."""
    while not stopping.is_set():
        lines.append(Line(seed, lstm()._replace(model="steady")))
        await run_session(client, lines[-1], after(SESSION_S))


async def run(
    count: int, idle_s: float, sessions: int, port: int
) -> tuple[list[Line], dict[str, list[float]], list[dict[str, float]]]:
    """The load of one model beside the cycles of the other. Raises what goes wrong in either."""
    lines: list[Line] = []
    async with (
        connect("lockstep") as client,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WITHIN_S) as http,
        asyncio.TaskGroup() as tasks,
    ):
        stopping = asyncio.Event()
        for seed in range(sessions):
            tasks.create_task(talk(client, seed, lines, stopping))
        await asyncio.sleep(SETTLED_S)
        found, by_process = await cycles(count, idle_s, client, Repository(http))
        stopping.set()
    return lines, found, by_process


@click.command()
@click.option("--cycles", "count", default=50, show_default=True, type=click.IntRange(4))
@click.option("--idle", "idle_s", default=0.0, help="Wait so many seconds instead of each cycle: what time alone does.")
@click.option("--sessions", default=100, show_default=True, type=click.IntRange(1))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--port", default=8000, show_default=True)
@json_option
def main(*, count: int, idle_s: float, sessions: int, device: str, port: int, json_file: Path | None) -> None:
    """Load and unload under load, and look at every output of the model that stays."""
    show_hardware()
    os.environ["RAY_SERVE_LOG_TO_STDERR"] = "0"
    with tempfile.TemporaryDirectory(prefix="ls", dir="/tmp") as folder:
        ray.init(
            num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=folder
        )
        try:
            serve.start(http_options={"port": port}, logging_config={"log_level": "ERROR"})
            share = {"num_gpus": 0.5} if device == "cuda" else {}
            models = {name: {"model": model, **share} for name, model in (("steady", STEADY), ("other", OTHER))}
            application = build({"models": models, "engine": {"device": device}})
            serve.run(application, name="lockstep", external_scaler_enabled=True)
            lines, found, by_process = asyncio.run(run(count, idle_s, sessions, port))
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
    late = np.concatenate([[late for _, late in line.delays] for line in lines])
    figures = {
        "cycles": count,
        "sessions": len(lines),
        "timesteps": sum(line.submitted for line in lines),
        "swap_lost": sum(line.submitted - line.received for line in lines),
        "swap_doubled": sum(line.doubled for line in lines),
        "swap_wrong": wrong(lines),
        "swap_moved": sum(len(line.epochs) - 1 for line in lines),
        "swap_delay_p99_s": float(np.percentile(late, 99)),
        "load_s": median(found["load_s"]),
        "unload_s": median(found["unload_s"]),
        "model_mib": median(found["loaded_mib"]) - median(found["unloaded_mib"]),
        "swap_growth_mib": found["unloaded_mib"][-1] - found["unloaded_mib"][0],
        "swap_mib_per_cycle": per_cycle(found["unloaded_mib"]),
    }
    if device == "cuda":
        figures |= {
            "model_gpu_mib": median(found["loaded_gpu_mib"]) - median(found["unloaded_gpu_mib"]),
            "swap_gpu_growth_mib": found["unloaded_gpu_mib"][-1] - found["unloaded_gpu_mib"][0],
        }
    growth = {what: [by_process[i].get(what, 0.0) for i in (0, count // 2, -1)] for what in sorted(by_process[-1])}
    click.echo(table(["MiB of", "first", "half way", "last"], [[what, *mib] for what, mib in growth.items()]))
    click.echo(table(["figure", ""], list(figures.items())))
    save(figures, json_file, by_cycle=found, growth_mib=growth)


if __name__ == "__main__":
    main()
