"""Sessions that each keep one segment outstanding: how many segments a second that gives, and how long one takes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

INPUT = HIDDEN = 256
LAYERS = 2
SEED = 0
TOLERANCE = 1e-4

Call = Callable[[np.ndarray], Awaitable[np.ndarray]]
"""One session: its next segment x [T, INPUT] in, the outputs y [T, HIDDEN] out."""


@dataclass(frozen=True, slots=True)
class Load:
    """Segments a second, and percentiles of a segment's delay."""

    rate: float
    p50_s: float
    p99_s: float


class Inputs:
    """Segments of `num_timesteps`, a few of them in turn; each session begins at another."""

    def __init__(self, num_timesteps: int, num_segments: int = 7) -> None:
        shape = num_segments, num_timesteps, INPUT
        self._x = np.random.default_rng(SEED).standard_normal(shape, np.float32)

    def segment(self, session: int, index: int) -> np.ndarray:
        """x [T, INPUT], segment `index` of a session."""
        x: np.ndarray = self._x[(session + index) % len(self._x)]
        return x


async def run_load(
    calls: Sequence[Call],
    inputs: Inputs,
    seconds: float,
    warm_up_s: float,
    keep: Sequence[int] = (),
    max_kept: int = 50,
) -> tuple[Load, dict[int, list[np.ndarray]]]:
    """Drive all sessions for warm_up_s + seconds, of which the last `seconds` count.

    Also returns the first outputs, up to max_kept segments, of the sessions in `keep`: see `check_outputs`.
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
            if session in kept and len(kept[session]) < max_kept:
                kept[session].append(y)

    await asyncio.gather(*(drive(session) for session in range(len(calls))))
    return summarize(delays, seconds), kept


def summarize(delays: Sequence[float], seconds: float) -> Load:
    """The load of which these are the delays, of all segments answered within `seconds`."""
    if not delays:
        raise RuntimeError(f"no segment was answered within {seconds} s")
    p50_s, p99_s = np.percentile(delays, [50, 99]).tolist()
    return Load(len(delays) / seconds, p50_s, p99_s)


def plain_module() -> torch.nn.LSTM:
    """The LSTM, with the weights that model=rnn of Lockstep has from the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return torch.nn.LSTM(INPUT, HIDDEN, LAYERS).eval().requires_grad_(False)


def check_outputs(kept: Mapping[int, Sequence[np.ndarray]], inputs: Inputs) -> None:
    """Raise unless these outputs, of sessions from their start on, are those of the plain module."""
    module = plain_module()
    for session, outputs in kept.items():
        if not outputs:
            raise RuntimeError(f"session {session} has no output to check")
        state = None
        for index, y in enumerate(outputs):
            expected, state = module(torch.from_numpy(inputs.segment(session, index).copy())[:, None], state)
            off = float(np.abs(y - expected[:, 0].numpy()).max())
            if not off <= TOLERANCE:
                raise RuntimeError(f"segment {index} of session {session} is off by {off:.2g}, allowed is {TOLERANCE}")


def raw_rate(num_sessions: int, num_timesteps: int, seconds: float) -> float:
    """Segments a second of the plain module alone: one thread, all sessions in each step, states kept."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        module, x = plain_module(), torch.randn(num_timesteps, num_sessions, INPUT)
        with torch.inference_mode():
            _, state = module(x)
            steps, began = 0, time.monotonic()
            while time.monotonic() < began + seconds:
                _, state = module(x, state)
                steps += 1
            return steps * num_sessions / (time.monotonic() - began)
    finally:
        torch.set_num_threads(threads)
