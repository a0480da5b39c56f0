"""Compiled functions check their indices here, and are kept apart from those that do not."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["NUMBA_BOUNDSCHECK"] = "1"
os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[2] / ".pytest_cache" / "numba")

import pytest
import torch
from hypothesis import settings

settings.register_profile("lockstep", deadline=None)  # a compiled function's first call takes its time
settings.load_profile("lockstep")


@pytest.fixture
def quiet_torch() -> Iterator[None]:
    """One thread, no gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)
