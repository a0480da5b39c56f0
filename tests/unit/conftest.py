"""Compiled functions check their indices here, and are kept apart from those that do not."""

import os
from pathlib import Path

os.environ["NUMBA_BOUNDSCHECK"] = "1"
os.environ["NUMBA_CACHE_DIR"] = str(Path(__file__).parents[2] / ".pytest_cache" / "numba")

from hypothesis import settings

settings.register_profile("lockstep", deadline=None)  # a compiled function's first call takes its time
settings.load_profile("lockstep")
