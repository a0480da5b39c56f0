"""Checkpoints as records, and the stores that keep them."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from serve_app import checkpoint as checkpoint_module
from serve_app.checkpoint import Checkpoint, decode_checkpoint, encode_checkpoint
from serve_app.checkpoint_store import CheckpointStore, FileStore, MemoryStore, key_of, open_store
from serve_app.errors import ConfigError, Overloaded, StateLost, Unavailable, UnknownSession

NAMES = st.text(min_size=1, max_size=300)
STATES = st.lists(
    arrays.arrays(st.sampled_from(["f4", "f2", "i8", "?"]), arrays.array_shapes(min_dims=0, max_dims=3, max_side=4)),
    max_size=3,
)
SMALL = Checkpoint("a", "sum", "f" * 32, 2**40, 7, (np.arange(3.0), np.ones((1, 2), np.int64)))

Make = Callable[[int], CheckpointStore]
counted = itertools.count()


def in_memory(max_bytes: int) -> CheckpointStore:
    return open_store("", "app", max_bytes)


def at_a_url(max_bytes: int) -> CheckpointStore:
    """A file system of fsspec's that is not the local one."""
    return open_store(f"memory://store{next(counted)}", "app", max_bytes)


@pytest.fixture(params=["memory", "folder", "url"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    makes: dict[str, Make] = {
        "memory": in_memory,
        "folder": lambda max_bytes: open_store(str(tmp_path), "app", max_bytes),
        "url": at_a_url,
    }
    return makes[request.param]


@given(NAMES, NAMES, NAMES, st.integers(0, 2**62), st.integers(0, 2**40), st.none() | STATES.map(tuple))
def test_a_record_comes_back_as_it_was(
    session: str, model: str, fingerprint: str, epoch: int, at: int, state: tuple[np.ndarray, ...] | None
) -> None:
    checkpoint = Checkpoint(session, model, fingerprint, epoch, at, state)
    found = decode_checkpoint(encode_checkpoint(checkpoint), session)
    assert dataclasses.replace(found, state=None) == dataclasses.replace(checkpoint, state=None)
    assert (found.state is None) == (state is None)
    for one, other in zip(found.state or (), state or (), strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)


def test_a_record_with_any_byte_changed_is_refused() -> None:
    record = encode_checkpoint(SMALL)
    for at in range(len(record)):
        for change in (1, 0x80, 0xFF):
            damaged = bytearray(record)
            damaged[at] ^= change
            with pytest.raises(StateLost, match="'a'"):
                decode_checkpoint(bytes(damaged), "a")


def test_a_record_that_is_cut_or_too_long_is_refused() -> None:
    record = encode_checkpoint(SMALL)
    for length in range(len(record)):
        with pytest.raises(StateLost, match="truncated"):
            decode_checkpoint(record[:length], "a")
    with pytest.raises(StateLost, match="damaged"):
        decode_checkpoint(record + b"\0", "a")


def test_a_record_of_another_version_or_session_or_of_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StateLost, match="what is kept of session 'b' is one of session 'a': open a new session"):
        decode_checkpoint(encode_checkpoint(SMALL), "b")
    with pytest.raises(StateLost, match="is no checkpoint: it begins with"):
        decode_checkpoint(b"something else, which is long enough", "a")
    monkeypatch.setattr(checkpoint_module, "VERSION", 2)
    newer = encode_checkpoint(SMALL)
    monkeypatch.undo()
    with pytest.raises(StateLost, match="is of format 2, this version of Lockstep reads 1"):
        decode_checkpoint(newer, "a")


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["keep", "drop", "get"]),
        st.lists(st.tuples(st.sampled_from("abcde"), st.binary(max_size=40)), max_size=4),
    ),
    max_size=20,
)


@pytest.mark.parametrize("make", [in_memory, at_a_url])
@given(operations=OPERATIONS)
def test_a_store_is_a_dict_with_a_bound(make: Make, operations: list[tuple[str, list[tuple[str, bytes]]]]) -> None:
    store, expected = make(100), dict[str, bytes]()
    for kind, items in operations:
        slab = dict(items)
        if kind == "keep":
            refused = store.keep(slab)
            expected |= {key: record for key, record in slab.items() if key not in refused}
        elif kind == "drop":
            store.drop(list(slab))
            expected = {key: record for key, record in expected.items() if key not in slab}
        assert set(store.keys()) == set(expected)
        assert sum(map(len, expected.values())) <= 100
        for key in "abcde":
            if key in expected:
                assert store.get(key) == expected[key]
            else:
                with pytest.raises(UnknownSession, match="open a new session"):
                    store.get(key)


def test_what_does_not_fit_is_refused_and_nothing_is_lost(make: Make) -> None:
    store = make(20)
    assert store.keep({"a": b"x" * 12}) == {}
    refused = store.keep({"b": b"y" * 9, "c": b"z" * 8})
    assert list(refused) == ["b"] and isinstance(refused["b"], Overloaded)
    assert "1 checkpoints have 12 bytes, the limit is 20: raise durability.max_bytes" in refused["b"].message
    assert list(store.keep({"a": b"x" * 13})) == ["a"], "the one before stays"
    assert (store.get("a"), store.get("c")) == (b"x" * 12, b"z" * 8)
    assert store.keep({"a": b"w"}) == {}
    assert store.keep({"b": b"y" * 9}) == {}


def test_many_are_read_at_once(make: Make) -> None:
    store = make(100)
    store.keep({"a": b"1", "b": b"", "c": b"333"})
    assert store.find(["a", "b", "x"]) == {"a": b"1", "b": b""}
    assert store.find(["x"]) == {}


def test_a_record_that_cannot_be_read_now_is_told(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "app", 100)
    (tmp_path / "app" / "a").mkdir()
    with pytest.raises(Unavailable, match=r"cannot be read from .*app: .*directory"):
        store.get("a")


def test_a_folder_is_found_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "app", 100)
    store.keep({key_of("a"): b"1", key_of("b/../c"): b"22", key_of("n" * 300): b"333"})
    store.drop([key_of("a"), key_of("never")])
    again = open_store(f"file://{tmp_path}", "app", 10)
    assert set(again.keys()) == {key_of("b/../c"), key_of("n" * 300)}
    assert again.get(key_of("b/../c")) == b"22"
    assert list(again.keep({"d": b"x" * 6})) == ["d"], "what was there counts"
    assert set(open_store(str(tmp_path), "other app", 100).keys()) == set()


def broken(*_: Any, **__: Any) -> None:
    raise OSError("no space left")


def test_a_write_that_was_broken_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path), "app", 100)
    store.keep({"a": b"before"})
    files = fsspec.filesystem("file")
    monkeypatch.setattr(files, "mv", broken)
    with pytest.raises(Unavailable, match=r"1 checkpoints cannot be written to .*: no space left"):
        FileStore(files, f"{tmp_path}/app", 100).keep({"a": b"after"})
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "app").iterdir()) == ["a", "a.new"]
    again = open_store(str(tmp_path), "app", 100)
    assert list(again.keys()) == ["a"]
    assert again.get("a") == b"before"


@pytest.mark.parametrize("url", ["nothing://there", "/proc/no/folder", "s3://bucket"])
def test_a_store_that_cannot_be_used_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match=f"durability.store={url} cannot be used: "):
        open_store(url, "app", 100)


def test_without_a_url_it_is_in_memory() -> None:
    assert isinstance(in_memory(1), MemoryStore)


def test_what_could_not_be_written_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("file")
    store = FileStore(files, f"{tmp_path}/app", 20)
    store.keep({"a": b"x" * 4})
    monkeypatch.setattr(files, "pipe", broken)
    for key in "abc":
        with pytest.raises(Unavailable):
            store.keep({key: b"y" * 12})
    monkeypatch.undo()
    assert list(store.keys()) == ["a"]
    assert list(store.keep({"b": b"y" * 12, "c": b"z" * 5, "d": b"w" * 4})) == ["c"], "a slab counts while it grows"


def test_what_cannot_be_deleted_now_is_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("file")
    store = FileStore(files, f"{tmp_path}/app", 6)
    store.keep(dict.fromkeys("abcde", b"1"))
    delete = files.rm_file

    def failing(path: str) -> None:
        if path[-1] in "ac":
            broken()
        delete(path)

    monkeypatch.setattr(files, "rm_file", failing)
    with pytest.raises(Unavailable, match=r"a checkpoint cannot be deleted from .*: no space left"):
        store.drop("abcd")
    assert set(store.keys()) == set("ace"), "the others are deleted"
    assert list(store.keep({"f": b"1234"})) == ["f"], "what is there counts"
    store.keep({"c": b"2"})  # of a session that has the name now
    monkeypatch.undo()
    store.drop("e")
    assert list(store.keys()) == ["c"]
    assert [path.name for path in (tmp_path / "app").iterdir()] == ["c"]
    assert store.keep({"f": b"12345"}) == {}
