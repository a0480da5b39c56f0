"""Real speech: 4 s out of tests/data/test.wav in the source package of silero-vad 6.2.3 (MIT), with a pause in it."""

from pathlib import Path

import numpy as np

from clients.audio import read_wav


def speech() -> np.ndarray:
    """Samples [64000] at 16 kHz, in -1 … 1."""
    samples, rate = read_wav(Path(__file__).parent / "data/speech.wav")
    assert rate == 16000
    return samples


def takes(count: int, samples: int) -> np.ndarray:
    """[count, samples]: cut from different places."""
    whole = np.concatenate([speech()] * (samples // 64000 + 2))
    return np.stack([whole[start : start + samples] for start in np.arange(count) * 7919 % 64000])
