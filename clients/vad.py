"""What to make of a voice detector's probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """Speech from `start_s` to `end_s`."""

    start_s: float
    end_s: float


def speech_intervals(
    probabilities: Sequence[float],
    timestep_s: float,
    *,
    threshold: float = 0.5,
    min_speech_s: float = 0.25,
    min_silence_s: float = 0.1,
) -> list[Interval]:
    """Where there is speech, after the rule of silero-vad's get_speech_timestamps.

    Speech begins at a probability of `threshold` and ends once it was below `threshold` - 0.15 for `min_silence_s`;
    what is shorter than `min_speech_s` does not count.
    """
    intervals: list[Interval] = []
    start: int | None = None
    silence: int | None = None
    for t, probability in enumerate(probabilities):
        if probability >= threshold:
            start = t if start is None else start
            silence = None
        elif start is not None and (silence is not None or probability < threshold - 0.15):
            silence = t if silence is None else silence
            if (t + 1 - silence) * timestep_s >= min_silence_s:
                intervals.append(Interval(start * timestep_s, silence * timestep_s))
                start = silence = None
    if start is not None:
        intervals.append(Interval(start * timestep_s, len(probabilities) * timestep_s))
    return [interval for interval in intervals if interval.end_s - interval.start_s >= min_speech_s]


def timeline(intervals: Sequence[Interval], length_s: float, width: int = 60) -> str:
    """`·` for silence and `█` for speech, `width` characters for `length_s` seconds."""
    cells = ["·"] * width
    for interval in intervals:
        first, last = (min(width - 1, int(at / length_s * width)) for at in (interval.start_s, interval.end_s))
        cells[first : last + 1] = "█" * (last + 1 - first)
    return "".join(cells)
