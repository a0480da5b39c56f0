"""Sessions that each keep one segment outstanding: how many segments a second that gives, and how long one takes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np

Call = Callable[[np.ndarray], Awaitable[np.ndarray]]
"""One session: its next segment x [T, *features] in, the outputs y [T, *features] out."""


@dataclass(frozen=True, slots=True)
class Load:
    """Segments a second, and percentiles of a segment's delay."""

    rate: float
    p50_s: float
    p99_s: float


class Inputs:
    """Segments [num_timesteps, features], a few of them in turn; each session begins at another."""

    def __init__(self, num_timesteps: int, features: int, num_segments: int = 7) -> None:
        shape = num_segments, num_timesteps, features
        self._x = np.random.default_rng(0).standard_normal(shape, np.float32)

    def segment(self, session: int, index: int) -> np.ndarray:
        """Segment `index` of a session."""
        x: np.ndarray = self._x[(session + index) % len(self._x)]
        return x


async def run_load(
    calls: Sequence[Call],
    inputs: Inputs,
    seconds: float,
    warm_up_s: float,
    keep: Sequence[int] = (),
    num_kept: int = 50,
) -> tuple[Load, dict[int, list[np.ndarray]]]:
    """Drive all sessions for warm_up_s + seconds, of which the last `seconds` count.

    Also returns the first `num_kept` outputs of the sessions in `keep`, for whoever wants to check them.
    """
    kept: dict[int, list[np.ndarray]] = {session: [] for session in keep}
    delays: list[float] = []
    began = time.monotonic() + warm_up_s
    stop = began + seconds

    async def drive(session: int) -> None:
        call, index, now = calls[session], 0, time.monotonic()
        while now < stop:
            sent = now
            y = await call(inputs.segment(session, index))
            now = time.monotonic()
            index += 1
            if began <= now < stop:
                delays.append(now - sent)
            if session in kept and len(kept[session]) < num_kept:
                kept[session].append(y)

    await asyncio.gather(*(drive(session) for session in range(len(calls))))
    return summarize(delays, seconds), kept


def summarize(delays: Sequence[float], seconds: float) -> Load:
    """The load that these delays, of all segments answered within `seconds`, are."""
    if not delays:
        raise RuntimeError(f"no segment was answered within {seconds} s")
    p50, p99 = np.percentile(delays, [50, 99]).tolist()
    return Load(len(delays) / seconds, p50, p99)
