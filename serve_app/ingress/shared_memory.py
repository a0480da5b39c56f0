"""System shared memory of the Open Inference Protocol: regions that clients on this machine have made, by name."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from serve_app.errors import InvalidInput, RegionExists, UnknownRegion

FOLDER = Path("/dev/shm")
"""Where POSIX shared memory lies on Linux."""
MAX_READ_BYTES = 256 * 2**20
"""Of one tensor."""


class Region:
    """`byte_size` bytes from `offset` on of the shared memory `key`, which is open at `handle`."""

    def __init__(self, key: str, offset: int, byte_size: int, handle: int) -> None:
        self.key, self.offset, self.byte_size, self.handle = key, offset, byte_size, handle

    def __del__(self) -> None:
        os.close(self.handle)


class Part(NamedTuple):
    """`byte_size` bytes from `offset` on of the shared memory of the region `name`.

    They are read and written by calls: to touch what is mapped of a file that its client has made shorter ends the
    process.
    """

    region: Region
    offset: int
    byte_size: int
    name: str

    def read(self) -> bytes:
        """The bytes there. Raises InvalidInput."""
        if self.byte_size > MAX_READ_BYTES:
            raise InvalidInput(
                f"{self.byte_size} bytes of the shared memory region '{self.name}' were named for an input, the limit "
                f"is {MAX_READ_BYTES}: send it in parts"
            )
        data = os.pread(self.region.handle, self.byte_size, self.offset)
        if len(data) < self.byte_size:
            raise InvalidInput(
                f"the memory of the shared memory region '{self.name}' was made shorter since it was registered: "
                f"of {self.byte_size} bytes {len(data)} are left"
            )
        return data

    def check_room(self, output: str, size: int) -> None:
        """Raise InvalidInput where an output of that size does not fit."""
        if size > self.byte_size:
            raise InvalidInput(
                f"shared memory size specified with the request for output '{output}' ({self.byte_size} bytes) should "
                f"be at least {size} bytes to hold the results"
            )

    def write(self, output: str, data: bytes) -> None:
        """Put an output there. Raises InvalidInput."""
        self.check_room(output, len(data))
        try:
            os.pwrite(self.region.handle, data, self.offset)
        except OSError as error:
            raise InvalidInput(f"output '{output}' does not go into the region '{self.name}': {error}") from error


class SharedMemory:
    """The regions that are registered."""

    def __init__(self) -> None:
        #: Which memory it is: processes on other machines, and in other containers, have another.
        self.identity = socket.gethostname()
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
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise InvalidInput(f"Unable to open shared memory region: {key!r} ({error})") from error
        region = Region(key, offset, byte_size, handle)
        size = os.fstat(handle).st_size
        if offset < 0 or byte_size <= 0 or offset + byte_size > size:
            raise InvalidInput(
                f"failed to register shared memory region '{name}': {byte_size} bytes from {offset} on were named, "
                f"'{key}' has {size}"
            )
        self._regions[name] = region

    def unregister(self, name: str) -> None:
        """Forget a region, or all where no name is given. One that is not there is no error."""
        for each in [name] if name else list(self._regions):
            self._regions.pop(each, None)  # closed when the last part of it is gone

    def part(self, parameters: Mapping[str, Any]) -> Part | None:
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
        return Part(region, region.offset + offset, byte_size, name)

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
