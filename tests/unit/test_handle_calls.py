"""Plain handle calls to a replica, without Ray."""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serve_app.config import AppConfig, EngineConfig
from serve_app.deployments.recurrent import Recurrent
from serve_app.errors import InvalidInput, LockstepError
from serve_app.segment import Outputs, Segment
from tests.fakes import SumModel
from tests.local import local

pytestmark = pytest.mark.asyncio

CONFIG = AppConfig(engine=EngineConfig(device="cpu", slots=4, max_batch_size=4, max_step_timesteps=4))
ONES = np.ones((3, 2), np.int64)


@asynccontextmanager
async def replica() -> AsyncIterator[Any]:
    async def lookup(session: str) -> Any:
        raise RuntimeError("of another process")

    async with local(SumModel(), config=CONFIG, ack_on_receipt=False) as (_, hub):
        sut: Any = SimpleNamespace(_hub=hub, _answering=Counter(), _directory=SimpleNamespace(lookup=lookup))
        sut._forward, sut._one = partial(Recurrent._forward, sut), partial(Recurrent._one, sut)
        yield sut


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment("b", [[0, 0]]), "whose x is a list arrived"),  # type: ignore[arg-type]
        (Segment("b", ONES, "0"), "whose start is '0' arrived"),  # type: ignore[arg-type]
        (Segment("b", ONES, 0.0), "whose start is 0.0 arrived"),  # type: ignore[arg-type]
    ],
)
async def test_what_is_no_segment_is_refused_to_its_caller_only(segment: Segment, message: str) -> None:
    async with replica() as sut:
        await sut._hub.open("a")
        await sut._hub.open("b")
        good, bad, also_good = await Recurrent.segments(sut, [Segment("a", ONES), segment, Segment("b", ONES, 0)])
        assert isinstance(bad, InvalidInput) and message in str(bad)
        for outputs in (good, also_good):
            assert isinstance(outputs, Outputs) and outputs.values["total"][-1].tolist() == [3, 3]


@pytest.mark.parametrize("segment", [Segment("elsewhere", ONES), Segment(["a"], ONES), ONES])  # type: ignore[arg-type]
async def test_an_unexpected_error_is_one_callers_and_logged(segment: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with replica() as sut:
        await sut._hub.open("a")
        good, bad = await Recurrent.segments(sut, [Segment("a", ONES), segment])
        assert isinstance(good, Outputs)
        assert isinstance(bad, LockstepError) and "the server's log has it" in str(bad)
        assert "a segment failed" in caplog.text
