"""A live session, as its user sees it: submit segments, wait for a timestep, read outputs, close."""

from collections.abc import AsyncIterator
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from serve_app.errors import InvalidInput
from serve_app.segment import Outputs
from serve_app.session import Session as Line
from serve_app.spec import ModelSpec


class Session:
    """One session of a served model; made by `Client.open`, the same over every transport.

    Where a timestep of the model is a run of audio samples (`spec.sample_rate` is set), any number of samples can be
    submitted: they are cut into timesteps here, and on close the last is filled up with zeros.

    As a context manager it is closed at the end of the block, or aborted when the block raises.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._is_audio = line.spec.sample_rate is not None
        self._samples = np.empty(0, line.spec.input.dtype)  # of a timestep that is not complete

    @property
    def name(self) -> str:
        """The session's id."""
        return self._line.name

    @property
    def epoch(self) -> int:
        """Higher when the session has got another owner; over a WebSocket, when it has got another connection."""
        return self._line.epoch

    @property
    def spec(self) -> ModelSpec:
        """What the model takes and gives."""
        return self._line.spec

    @property
    def progress(self) -> int:
        """Timesteps whose outputs are here."""
        return self._line.progress

    @property
    def submitted(self) -> int:
        """Timesteps submitted."""
        return self._line.next

    def submit(self, x: ArrayLike) -> int:
        """Queue a segment, without waiting for anything; returns the timestep it ends at.

        x: [T, *features] in the model's dtype; or, for audio, any number of samples in -1 … 1. Raises InvalidInput,
        WindowFull (read outputs first), SessionEnded, and once StepFailed: what was submitted from its `expected` on
        is lost, and the next segment starts there.
        """
        if not self._is_audio:
            return self._line.submit(np.asarray(x))
        samples = np.concatenate([self._samples, _as_samples(x, self._samples.dtype)])
        (size,) = self.spec.input.shape
        end, most = self._line.next, self._line.limits.max_segment * size
        for at in range(0, len(samples) - len(samples) % size, most):
            whole = samples[at : at + most]
            end = self._line.submit(whole[: len(whole) // size * size].reshape(-1, size))
        self._samples = samples[len(samples) - len(samples) % size :]
        return end

    async def wait(self, timestep: int | None = None) -> int:
        """Wait until `progress` reaches the timestep (None: all that is submitted); returns `progress`."""
        return await self._line.wait(timestep)

    def outputs(self) -> AsyncIterator[Outputs]:
        """Outputs in order, each timestep once, as they come; ends with the session."""
        return self._line.outputs()

    def read(self) -> Outputs | None:
        """The outputs that are here and were not read yet, without waiting; None without any."""
        return self._line.read()

    async def export(self) -> bytes:
        """A checkpoint of the session, to go on from with `Client.open`, in this application or another.

        It has all that is submitted by now, or more where more is submitted meanwhile; of audio, all complete
        timesteps. The session goes on. Raises the error that ended the session.
        """
        return (await self._line.export()).record

    async def close(self) -> str:
        """End the session when everything submitted has run; returns the reason it ended for. Outputs stay readable."""
        if len(self._samples):
            (size,) = self.spec.input.shape
            last = np.pad(self._samples, (0, size - len(self._samples)))
            self._samples = self._samples[:0]
            self._line.submit(last.reshape(1, size))
        self._line.close()
        return await self._line.closed()

    async def abort(self) -> None:
        """End the session at once; what is pending is dropped."""
        self._line.abort()
        await self._line.closed()

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line.end_reason is not None:
            return
        if error is None:
            await self.close()
        else:
            self._line.abort()


def _as_samples(x: ArrayLike, dtype: np.dtype) -> np.ndarray:
    samples = np.asarray(x)
    if samples.ndim != 1 or samples.dtype != dtype:
        raise InvalidInput(
            f"samples of {samples.dtype} {list(samples.shape)} arrived, expected {dtype} [N] in -1 … 1: one channel, "
            "16-bit samples divided by 32768"
        )
    return samples
