"""What the environment of a process with an engine must hold when it starts."""

REPLICA_ENV: dict[str, str] = {
    # glibc gives large blocks back to the kernel at once, and each forward then faults them in again.
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}
