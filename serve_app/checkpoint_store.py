"""Where the session directory keeps checkpoints: as bytes, by key, within a bound."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from serve_app.errors import ConfigError, Overloaded, Unavailable, UnknownSession

UNFINISHED = ".new"


def key_of(session: str) -> str:
    """Under which a session is stored: ids may be longer than names of files, and hold what these may not."""
    return hashlib.blake2b(session.encode(), digest_size=20).hexdigest()


class CheckpointStore(ABC):
    """One record a key; a later one takes the place of the one before. What does not fit is refused, nothing is lost.

    One object a session and not one a slab: it is overwritten by the session's next checkpoint and read when that
    session comes back, so there is nothing to compact and no index to lose. All of a slab are written with one call.
    """

    def __init__(self, max_bytes: int, sizes: Mapping[str, int] | None = None) -> None:
        self._max_bytes = max_bytes
        self._sizes = dict(sizes or {})
        self._nbytes = sum(self._sizes.values())
        self._over: set[str] = set()  # keys of records that could not be deleted

    def keep(self, slab: Mapping[str, bytes]) -> dict[str, Overloaded]:
        """Write records; what was refused, and why. Raises Unavailable when none of them is certain to be there."""
        refused: dict[str, Overloaded] = {}
        fitting: dict[str, bytes] = {}
        num_kept, nbytes = len(self._sizes), self._nbytes
        for key, record in slab.items():
            grown = nbytes + len(record) - self._sizes.get(key, 0)
            if grown > self._max_bytes:
                refused[key] = Overloaded(
                    f"a checkpoint of {len(record)} bytes does not fit: {num_kept} checkpoints have "
                    f"{nbytes} bytes, the limit is {self._max_bytes}: raise durability.max_bytes"
                )
            else:
                fitting[key] = record
                num_kept, nbytes = num_kept + (key not in self._sizes), grown
        if fitting:
            self._write(fitting)
            self._nbytes = nbytes
            self._sizes |= {key: len(record) for key, record in fitting.items()}
            self._over -= fitting.keys()
        return refused

    def get(self, key: str) -> bytes:
        """Read a record. Raises UnknownSession without any, Unavailable when it cannot be read now."""
        found = self.find([key])
        if key not in found:
            raise UnknownSession("no checkpoint of the session is kept: open a new session")
        return found[key]

    @abstractmethod
    def find(self, keys: Collection[str]) -> Mapping[str, bytes]:
        """Read the records that there are. Raises Unavailable when they cannot be read now."""

    def drop(self, keys: Collection[str]) -> None:
        """Delete records; where there is none it is no error. Raises Unavailable: what is left goes with the next."""
        self._over |= self._sizes.keys() & set(keys)
        failed: Unavailable | None = None
        for key in tuple(self._over):
            try:
                self._delete(key)
            except Unavailable as error:
                failed = error
            else:
                self._over.remove(key)
                self._nbytes -= self._sizes.pop(key)
        if failed is not None:
            raise failed

    def keys(self) -> Collection[str]:
        """Of all records."""
        return self._sizes.keys()

    @abstractmethod
    def _write(self, slab: Mapping[str, bytes]) -> None: ...

    @abstractmethod
    def _delete(self, key: str) -> None: ...


class MemoryStore(CheckpointStore):
    """In this process: gone with it."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._records: dict[str, bytes] = {}

    def _write(self, slab: Mapping[str, bytes]) -> None:
        self._records.update(slab)

    def find(self, keys: Collection[str]) -> Mapping[str, bytes]:
        return {key: self._records[key] for key in keys if key in self._records}

    def _delete(self, key: str) -> None:
        del self._records[key]


class FileStore(CheckpointStore):
    """A file a record, in one folder. Each is written aside, and moved into its place when it is whole."""

    def __init__(self, file_system: Any, folder: str, max_bytes: int) -> None:
        """file_system: one of fsspec's. Finds what is in the folder already."""
        self._file_system, self._folder = file_system, folder
        file_system.makedirs(folder, exist_ok=True)
        sizes: dict[str, int] = {}
        for file in file_system.ls(folder, detail=True):
            if file["name"].endswith(UNFINISHED):
                with suppress(FileNotFoundError):  # whoever was writing it has just finished
                    file_system.rm_file(file["name"])
            elif file["type"] == "file":
                sizes[file["name"].rpartition("/")[2]] = file["size"]
        super().__init__(max_bytes, sizes)

    def _write(self, slab: Mapping[str, bytes]) -> None:
        paths = {self._path(key): record for key, record in slab.items()}
        try:
            self._file_system.pipe({path + UNFINISHED: record for path, record in paths.items()})
            for path in paths:
                self._file_system.mv(path + UNFINISHED, path)
        except OSError as error:
            raise Unavailable(f"{len(slab)} checkpoints cannot be written to {self._folder}: {error}") from error

    def find(self, keys: Collection[str]) -> Mapping[str, bytes]:
        paths = {self._path(key): key for key in keys}
        found: dict[str, bytes] = {}
        for path, record in self._file_system.cat(list(paths), on_error="return").items():
            if isinstance(record, bytes):
                found[paths[path]] = record
            elif not isinstance(record, FileNotFoundError):
                raise Unavailable(f"a checkpoint cannot be read from {self._folder}: {record}") from record
        return found

    def _delete(self, key: str) -> None:
        try:
            with suppress(FileNotFoundError):
                self._file_system.rm_file(self._path(key))
        except OSError as error:
            raise Unavailable(f"a checkpoint cannot be deleted from {self._folder}: {error}") from error

    def _path(self, key: str) -> str:
        return f"{self._folder}/{key}"


def open_store(url: str, folder: str, max_bytes: int) -> CheckpointStore:
    """The store at a URL or path, in a folder of its own there; without a URL in memory. Raises ConfigError."""
    if not url:
        return MemoryStore(max_bytes)
    import fsspec  # which takes its time, and only the directory needs it

    try:
        file_system, path = fsspec.core.url_to_fs(url)
        return FileStore(file_system, f"{path.rstrip('/')}/{folder}", max_bytes)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"durability.store={url} cannot be used: {error}") from error
