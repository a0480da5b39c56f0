"""Operators take as many threads as are configured, also oneDNN's, on whichever thread of ours they run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = """
from serve_app.engine.engine import Engine
from serve_app.engine.loop import EngineLoop
from tests.fakes import SumModel
from tests.unit.test_loop import CONFIG, Collector, frame

class Asking(SumModel):
    def forward(self, x, state):
        ask()
        return super().forward(x, state)

torch.set_num_threads(1)
collector = Collector()
loop = EngineLoop(Engine(Asking(), CONFIG, "local"), collector)
loop.call(frame(1, 3), "a")
collector.wait("a")
loop.stop()
"""
BATCHER = """
import asyncio
import numpy as np
from serve_app.config import AppConfig, BatchingConfig, EngineConfig, ModelConfig
from serve_app.engine.batcher import build_batcher
from serve_app.rows import RowsRequest
from tests import stateless

class Asking(stateless.MaskedSum):
    def forward(self, *args, **more):
        ask()
        return super().forward(*args, **more)

stateless.MaskedSum = Asking

async def main():
    model = ModelConfig("tests.stateless:MaskedSum")
    config = AppConfig(model=model, engine=EngineConfig(device="cpu"), batching=BatchingConfig())
    batcher = build_batcher(config)
    found.clear()
    await batcher.infer(RowsRequest({"ids": np.array([[3, 4]])}))
    await batcher.stop()

asyncio.run(main())
"""
ASK = """
import ctypes, torch
library = next(line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1])
found = []
def ask():
    found.append(ctypes.CDLL(library).omp_get_max_threads())
"""


@pytest.mark.parametrize("code", [ENGINE, BATCHER], ids=["engine", "batcher"])
def test_operators_take_as_many_threads_as_are_configured(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{ASK}\n{code}\nprint(sorted(set(found)))"],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "3"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout == "[1]\n", done.stdout + done.stderr
