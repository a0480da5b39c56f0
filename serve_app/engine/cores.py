"""Cores of a machine that replicas share: each takes some for its own, by locks that end with its process."""

import fcntl
import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_claimed: list[int] = []  # file descriptors, open for as long as this process lives


def pin_thread(count: int, folder: Path | None = None) -> list[int]:
    """Let this thread, and threads that it starts later, run on `count` cores that no other process has claimed here.

    folder: where the locks lie, the same for all. Returns the cores; none, and nothing has changed, when there are
    fewer left, or where the system has no such call.
    """
    if not hasattr(os, "sched_setaffinity"):
        logger.warning("engine.pin_threads: this system has no way to pin threads, they run anywhere")
        return []
    folder = folder or Path(tempfile.gettempdir())
    cores: list[int] = []
    locks: list[int] = []
    for core in sorted(os.sched_getaffinity(0)):
        if len(cores) < count and (lock := _claim(folder / f"lockstep-core-{core}.lock")) is not None:
            cores.append(core)
            locks.append(lock)
    if len(cores) < count:
        for lock in locks:
            os.close(lock)
        logger.warning(
            "engine.pin_threads: %d cores are wanted and %d are free, threads run anywhere", count, len(cores)
        )
        return []
    _claimed.extend(locks)
    os.sched_setaffinity(0, cores)  # 0 is this thread
    return cores


def _claim(path: Path) -> int | None:
    """Lock the file; its descriptor, or None when another process has it, or it cannot be opened."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except OSError as error:  # another user's, in a folder for all
        logger.info("engine.pin_threads: a core is left out: %s", error)
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
