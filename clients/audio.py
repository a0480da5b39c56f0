"""Samples out of WAV files."""

import wave
from pathlib import Path

import numpy as np

from serve_app.errors import InvalidInput


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """(samples in -1 … 1 as float32 [N], sampling rate in Hz) of a 16-bit WAV file; of several channels, the first.

    Raises InvalidInput for other formats.
    """
    try:
        with wave.open(str(path)) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError, OSError) as error:
        raise InvalidInput(f"{path} cannot be read as WAV: {error}") from error
    if width != 2:
        raise InvalidInput(f"{path} has {8 * width} bits a sample, only 16 are understood: convert it first")
    samples = np.frombuffer(data, "<i2").reshape(-1, channels)[:, 0]
    return samples.astype(np.float32) / 32768, rate
