"""System shared memory of the Open Inference Protocol: regions that clients on this machine have made, by name."""

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.errors import InvalidInput, RegionExists, UnknownRegion

FOLDER = Path("/dev/shm")
"""Where POSIX shared memory lies on Linux."""


@dataclass(frozen=True, slots=True)
class Region:
    """`byte_size` bytes from `offset` on of the shared memory `key`."""

    key: str
    offset: int
    byte_size: int
    memory: mmap.mmap


class SharedMemory:
    """The regions that are registered."""

    def __init__(self) -> None:
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Map a region. Raises RegionExists, InvalidInput."""
        if name in self._regions:
            raise RegionExists(f"shared memory region '{name}' already in manager")
        file = key.lstrip("/")
        if not name or not file or "/" in file or file in (".", ".."):
            raise InvalidInput(f"a region {name!r} with the key {key!r} was registered: both need a name, without '/'")
        try:
            handle = os.open(FOLDER / file, os.O_RDWR)
        except OSError as error:
            raise InvalidInput(f"Unable to open shared memory region: '{key}' ({error.strerror})") from error
        try:
            size = os.fstat(handle).st_size
            if offset < 0 or byte_size <= 0 or offset + byte_size > size:
                raise InvalidInput(
                    f"failed to register shared memory region '{name}': {byte_size} bytes from {offset} on were "
                    f"named, '{key}' has {size}"
                )
            self._regions[name] = Region(key, offset, byte_size, mmap.mmap(handle, size))
        finally:
            os.close(handle)

    def unregister(self, name: str) -> None:
        """Forget a region, or all where no name is given. One that is not there is no error."""
        for each in [name] if name else list(self._regions):
            self._regions.pop(each, None)  # unmapped when the last view of it is gone

    def part(self, parameters: Mapping[str, Any]) -> memoryview | None:
        """What a tensor's parameters name of a region; None: they name none. Raises InvalidInput, UnknownRegion."""
        name = parameters.get("shared_memory_region")
        if name is None:
            return None
        offset, byte_size = parameters.get("shared_memory_offset", 0), parameters.get("shared_memory_byte_size")
        if not isinstance(name, str) or type(offset) is not int or type(byte_size) is not int:
            raise InvalidInput("a tensor in shared memory needs shared_memory_region and shared_memory_byte_size")
        region = self._get(name)
        if offset < 0 or byte_size < 0 or offset + byte_size > region.byte_size:
            raise InvalidInput(
                f"{byte_size} bytes from {offset} on of the shared memory region '{name}' were named, the region has "
                f"{region.byte_size}"
            )
        begin = region.offset + offset
        return memoryview(region.memory)[begin : begin + byte_size]

    def status(self, name: str) -> dict[str, dict[str, str | int]]:
        """What is registered, of that name or all. Raises UnknownRegion."""
        regions = {name: self._get(name)} if name else self._regions
        return {
            each: {"name": each, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}
            for each, region in regions.items()
        }

    def _get(self, name: str) -> Region:
        if name not in self._regions:
            raise UnknownRegion(f"Unable to find shared memory region: '{name}'")
        return self._regions[name]


def write(part: memoryview, output: str, data: bytes) -> None:
    """Put an output there. Raises InvalidInput where it does not fit."""
    if len(data) > len(part):
        raise InvalidInput(
            f"shared memory size specified with the request for output '{output}' ({len(part)} bytes) should be at "
            f"least {len(data)} bytes to hold the results"
        )
    part[: len(data)] = data
