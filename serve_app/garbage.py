"""How often Python looks for garbage in a process of Lockstep's."""

import gc

THRESHOLDS = 50_000, 20, 100
"""Objects more than there were, before the young are looked through; and how many such looks, before the older are.
With Python's own (700, 10, 10), to move ten thousand sessions took twice as long: each has dozens of objects, and all
were looked through again and again (`failover_10k_s` of bench.directory)."""


def collect_seldom() -> None:
    """For processes that have many sessions or requests, and hardly any cycles of objects."""
    gc.set_threshold(*THRESHOLDS)
