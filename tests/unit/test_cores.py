import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.engine import cores
from serve_app.engine.cores import pin_thread

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned on this system")
CLAIM = "import sys; from pathlib import Path; from serve_app.engine.cores import pin_thread; "


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    while cores._claimed:
        os.close(cores._claimed.pop())


def in_thread(count: int, folder: Path) -> tuple[list[int], set[int]]:
    """What a thread is given, and where it may run then: the test's own stays as it is."""
    found: list[tuple[list[int], set[int]]] = []
    thread = threading.Thread(target=lambda: found.append((pin_thread(count, folder), os.sched_getaffinity(0))))
    thread.start()
    thread.join()
    return found[0]


def test_each_thread_has_cores_of_its_own(tmp_path: Path) -> None:
    everywhere = os.sched_getaffinity(0)
    claimed: list[int] = []
    for _ in everywhere:
        given, runs_on = in_thread(1, tmp_path)
        assert runs_on == set(given)
        claimed += given
    assert sorted(claimed) == sorted(everywhere)
    assert os.sched_getaffinity(0) == everywhere


def test_without_enough_cores_nothing_is_claimed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    everywhere = os.sched_getaffinity(0)
    assert in_thread(len(everywhere) + 1, tmp_path) == ([], everywhere)
    assert f"{len(everywhere) + 1} cores are wanted and {len(everywhere)} are free" in caplog.text
    assert len(in_thread(len(everywhere), tmp_path)[0]) == len(everywhere)


def test_another_process_keeps_its_cores_until_it_ends(tmp_path: Path) -> None:
    everywhere = os.sched_getaffinity(0)
    hold = f"{CLAIM}print(len(pin_thread({len(everywhere)}, Path(sys.argv[1])))); sys.stdout.flush(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == f"{len(everywhere)}\n"
        assert in_thread(1, tmp_path)[0] == []
        other.kill()
        other.wait()
    assert len(in_thread(1, tmp_path)[0]) == 1


def test_a_lock_that_cannot_be_opened_leaves_its_core_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one of another user, in a folder for all."""
    everywhere, open_file = os.sched_getaffinity(0), os.open

    def refuse(path: Path, *args: int) -> int:
        if path.name == f"lockstep-core-{min(everywhere)}.lock":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open_file(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    with caplog.at_level(logging.INFO, cores.__name__):
        assert in_thread(len(everywhere), tmp_path) == ([], everywhere)
    assert f"a core is left out: [Errno 13] Permission denied: '{tmp_path}" in caplog.text
    assert in_thread(1, tmp_path)[0] == sorted(everywhere)[1:2]
