"""That the directory's bench runs and reports; never how fast anything is."""

from collections.abc import Callable
from typing import Any

import pytest
from ray.serve.handle import DeploymentHandle

from bench.directory import APP, APPLICATION, measure

pytestmark = [pytest.mark.serve, pytest.mark.timeout(120)]


async def test_a_directory_is_filled_and_asked_and_its_owner_killed(
    run_app: Callable[..., DeploymentHandle[Any]],
) -> None:
    run_app(APP, **APPLICATION)
    figures = await measure(idle=2000, moving=50, seconds=0.2)
    assert figures["failover_sessions"] == 50
    assert figures["directory_sessions"] >= 2000
    assert figures["failover_directory_calls"] >= 50, "each session moves by one call"
    claimed = ("directory_opens_per_s", "failover_10k_s", "failover_directory_p99_s", "failover_lookup_p99_s")
    assert all(figures[name] > 0 for name in claimed)
