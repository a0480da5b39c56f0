"""How long an owner may answer without asking the directory: after that others may have its sessions."""

import math
import time

LEASE_S = 1.5
MARGIN_S = 0.4
"""The directory gives an owner up so much later than the owner stops."""


def now() -> float:
    """Seconds on a clock that goes on while the machine is suspended, as an owner's lease does."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """Ends LEASE_S after the last time that the directory was asked, and agreed. Any thread may look."""

    def __init__(self) -> None:
        self._ends_at = 0.0

    def renew(self, asked_at: float) -> None:
        """The directory has agreed; it was asked then."""
        self._ends_at = asked_at + LEASE_S

    @property
    def holds(self) -> bool:
        """Whether the owner may launch and answer."""
        return now() < self._ends_at


class Freehold(Lease):
    """Of an engine without a directory: nobody else can have its sessions."""

    def __init__(self) -> None:
        self._ends_at = math.inf
