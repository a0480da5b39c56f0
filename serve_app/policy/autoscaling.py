"""How many replicas a model is to have: by their sessions, how near they are to their highest rate, and how late.

Pure. Requests that Serve sees mean nothing here: frames go past it, and a session is one call, or none, for hours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KEEP = 0.8
"""Replicas go when the others are then at most at this share of their targets: as much has to come again before they
are missed."""
AVERAGED_S = 5.0
"""About so far back reaches what a replica says of itself."""
NEW_FULL = 0.1
"""Weight of the last full steps beside those before them."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Bounds on the replicas of a model, and what each is to have at most.

    target_sessions: share of the sessions that it takes; target_load: of its highest rate; max_delay_s: how long any of
    its sessions waits for its step (0: however long).
    """

    min_replicas: int
    max_replicas: int
    target_sessions: float
    target_load: float
    max_delay_s: float = 0.0


class Load(NamedTuple):
    """What a replica says of itself.

    sessions: that are open. share: of its highest rate, from 0 to 1; delay_s: for how long who waits longest for a step
    has waited; both as they were on the average of the last seconds.
    """

    sessions: int = 0
    share: float = 0.0
    delay_s: float = 0.0


IDLE = Load()


class Demand(NamedTuple):
    """Of a model. loads: of its replicas, which take `max_sessions` each; waiting: sessions that wait for a place.

    is_refusing: sessions were refused of late since all were full. is_level: no sessions are to move between replicas.
    """

    loads: Sequence[Load]
    max_sessions: int
    waiting: int = 0
    is_refusing: bool = False
    is_level: bool = True


def wanted_replicas(demand: Demand, scaling: Scaling, target: int) -> int:
    """How many replicas there should be where `target` are meant to be by now, some of which may be starting.

    Fewer only where what there is would fit into them with room to spare (KEEP), so that a little more does not undo
    it; never so few that open sessions have no place, unless max_replicas are. As rates above the highest cannot be
    seen, replicas that are at it are joined by 1 / target_load times as many at a time. One more is wanted where
    sessions are refused, or late though all have as many; not before that, since moving them may be all it takes.
    """
    least = _needed(demand, scaling, 1.0)
    is_late = 0 < scaling.max_delay_s < max((load.delay_s for load in demand.loads), default=0.0)
    if demand.is_refusing or (is_late and demand.is_level):
        least = max(least, len(demand.loads) + 1)
    wanted = max(least, min(target, max(least, _needed(demand, scaling, KEEP))))
    return min(scaling.max_replicas, max(scaling.min_replicas, wanted))


def _needed(demand: Demand, scaling: Scaling, keep: float) -> int:
    sessions = sum(load.sessions for load in demand.loads) + demand.waiting
    share = sum(load.share for load in demand.loads)
    places = keep * scaling.target_sessions * demand.max_sessions
    return max(math.ceil(sessions / places), math.ceil(share / (keep * scaling.target_load) - 1e-9))


class LoadMeter:
    """How near a replica is to its highest rate, out of the steps that it makes.

    An engine batches whatever is ready, so it may be busy all the time and still have room: steps grow with the load,
    and on a GPU one of many sessions takes hardly longer than one of few. So the time that it is busy counts for as
    much as its timesteps would have taken in full steps.
    """

    def __init__(self, timesteps: Sequence[int] | np.ndarray, max_batch_size: int, now: float) -> None:
        """timesteps: how many a step may take of a session, rising; max_batch_size: sessions of a full step."""
        self._timesteps = np.array(timesteps, np.int64)
        self._max_batch_size = max_batch_size
        self._full_s = np.zeros(len(timesteps))  # seconds of full steps, by their timesteps; 0: there was none
        self._at, self._idle_s = now, 0.0
        self._share = self._delay_s = 0.0

    def add(self, steps: np.ndarray, idle_s: float, delay_s: float, now: float) -> None:
        """Since the last time there were these steps [n, 3]: of so many sessions, so many timesteps of each, so long.

        idle_s: for how long the engine has had nothing to do, in all. delay_s: see Load, as of now.
        """
        passed_s = max(1e-9, now - self._at)
        busy = min(1.0, max(0.0, 1 - (idle_s - self._idle_s) / passed_s))
        self._at, self._idle_s = now, idle_s
        sizes, timesteps, seconds = steps.reshape(-1, 3).T
        which = np.searchsorted(self._timesteps, timesteps)
        is_full = sizes >= self._max_batch_size
        for i in np.unique(which[is_full]).tolist():
            before, found = self._full_s[i], seconds[is_full & (which == i)].mean()
            self._full_s[i] = before + NEW_FULL * (found - before) if before else found
        known = np.flatnonzero(self._full_s)
        if not len(sizes):
            busy = 0.0
        elif len(known):
            full_s = np.interp(timesteps, self._timesteps[known], self._full_s[known])
            busy *= min(1.0, float((full_s * sizes).sum() / self._max_batch_size / seconds.sum().clip(1e-9)))
        weight = 1 - math.exp(-passed_s / AVERAGED_S)
        self._share += weight * (busy - self._share)
        self._delay_s += weight * (delay_s - self._delay_s)

    def load(self, sessions: int) -> Load:
        """What there is to say of a replica with so many sessions."""
        return Load(sessions, self._share, self._delay_s)
