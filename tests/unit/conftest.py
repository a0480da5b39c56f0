"""Compiled functions check their indices here, and are kept apart from those that do not."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["NUMBA_BOUNDSCHECK"] = "1"
os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[2] / ".pytest_cache" / "numba")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # as in a replica; and the tests may run side by side

settings.register_profile("lockstep", deadline=None)  # a compiled function's first call takes its time
settings.load_profile("lockstep")


@pytest.fixture
def quiet_torch() -> Iterator[None]:
    """No gradients."""
    with torch.inference_mode():
        yield
