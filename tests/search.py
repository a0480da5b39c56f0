"""Looks for a list of events after which the world is as it must never be."""

import logging
import math
import random
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tests.world import MAX_EVENTS, TIME_PASSES, Violation, World


@dataclass
class Found:
    """What a search has looked at, and the events that lead to what must not be: None if it has found nothing."""

    states: int
    runs: int
    seconds: float
    trace: list[str] | None = None
    error: str = ""

    def __str__(self) -> str:
        told = f"{self.states} states, {self.runs} runs, {self.seconds:.1f} s"
        if self.trace is None:
            return told
        return "\n".join([f"{self.error}\nafter {len(self.trace)} events ({told}); replay(…) them:", *self.trace])


def replay(world: World, trace: list[str]) -> None:
    """Let these events happen, then the usual ones to the end. Raises Violation."""
    try:
        for event in trace:
            world.do(event)
        while not is_finished(world):
            world.do(world.events()[0])
    finally:
        world.end()


def usual_until(world: World, *events: str) -> list[str]:
    """Let what is usual happen until the first of these has, then until the next has, …; the trace up to there."""
    for event in events:
        happened = ""
        while happened != event:
            happened = world.events()[0]
            world.do(happened)
            assert not is_finished(world), f"{event!r} does not happen"
    return world.trace


Deviations = tuple[tuple[int, str], ...]
"""After how many events which one happens that is not the usual."""


def depart(world: World, deviations: Deviations) -> None:
    for at, event in deviations:
        while len(world.trace) < at:
            world.do(world.events()[0])
        world.do(event)


def is_finished(world: World) -> bool:
    usual = world.events()[0]
    if len(world.trace) > MAX_EVENTS:
        raise Violation(f"nothing comes of it: {[client.progress for client in world.clients.values()]}")
    return world.is_over and usual == TIME_PASSES


def search(new: Callable[[], World], max_deviations: int, within_s: float = math.inf) -> Found:
    """Try every list of events that departs from the usual at most so often, be it by a fault or another order.

    A world in which the same has happened to every process as in one before is not looked at again.
    """
    began = time.monotonic()
    seen: dict[int, int] = {}  # with how many deviations a state is reached
    todo: deque[Deviations] = deque([()])
    found = Found(0, 0, 0.0)
    while todo and time.monotonic() - began < within_s:
        deviations = todo.popleft()
        used = len(deviations)
        world = new()
        found.runs += 1
        try:
            depart(world, deviations)
            if used and seen[world.state] < used:
                continue
            while not is_finished(world):
                usual, *others = world.events()
                if used < max_deviations:
                    for event in [*others, *world.faults()]:
                        state = world.after(event)
                        if state not in seen:
                            seen[state] = used + 1
                            todo.append((*deviations, (len(world.trace), event)))
                state = world.after(usual)
                if seen.get(state, used + 1) <= used:
                    break
                seen[state] = used
                world.do(usual)
        except Exception as error:
            found.trace, found.error = world.trace, f"{type(error).__name__}: {error}"
            break
        finally:
            world.end()
    found.states, found.seconds = len(seen), time.monotonic() - began
    return found


def walk(new: Callable[[], World], seed: int, num_walks: int = 10**9, within_s: float = math.inf) -> Found:
    """Let what can happen happen at random, many times: some messages are slow, and there are a few faults."""
    began = time.monotonic()
    found = Found(0, 0, 0.0)
    while found.runs < num_walks and time.monotonic() - began < within_s:
        world = new()
        try:
            stroll(world, random.Random(seed + found.runs))
        except Exception as error:
            found.trace, found.error = world.trace, f"{type(error).__name__}: {error} (seed {seed + found.runs})"
            break
        finally:
            world.end()
            found.runs += 1
            found.states += len(world.trace)
    found.seconds = time.monotonic() - began
    return found


def stroll(world: World, rng: random.Random) -> None:
    """One walk to the end."""
    num_faults, disorder, slowness = rng.randint(1, 6), rng.choice([0.0, 0.1, 0.3]), rng.choice([0.0, 0.1, 0.2])
    is_slow: dict[str, bool] = {}
    while not is_finished(world):
        events = world.events()
        for key in (key for event in events for key in (event, re.sub("[0-9]+ ", "", event))):
            is_slow.setdefault(key, rng.random() < slowness)
        quick = [event for event in events if not (is_slow[event] or is_slow[re.sub("[0-9]+ ", "", event)])]
        if quick and quick[0] != TIME_PASSES and rng.random() < 0.97:
            events = quick
        if num_faults and rng.random() < 0.05:
            event, num_faults = rng.choice(world.faults()), num_faults - 1
        else:
            event = rng.choice(events) if rng.random() < disorder else events[0]
        world.do(event)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.stdout.write(f"{walk(World, seed=int(sys.argv[1]))}\n")
