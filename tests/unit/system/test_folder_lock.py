"""One job for each folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lorasb_ds.errors import ConfigError
from lorasb_ds.system import folder_lock
from lorasb_ds.system.folder_lock import FolderLock, check_not_in_use, lock_folder

HOLD = """
import sys, time
from pathlib import Path
from lorasb_ds.system.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_lock, "PATIENCE_S", 0.2)
    return tmp_path / "run.lock"


def test_it_ends_with_its_process(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            for attempt in (FolderLock, check_not_in_use):
                with pytest.raises(ConfigError) as error:
                    attempt(path)
                who = f"process {holder.pid} on {socket.gethostname()!r} since '20"
                assert f"{path.parent} is in use: {who}" in str(error.value)
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    check_not_in_use(path)
    lock = FolderLock(path)
    assert lock.is_held
    assert f'"pid": {os.getpid()}' in path.read_text()
    assert path.read_text().count("\n") == 1, "the dead holder's line is gone"
    lock.release()
    FolderLock(path).release()


def test_somebody_who_looks_refuses_nobody(path: Path) -> None:
    check_not_in_use(path)
    assert not path.exists(), "looking makes no file"
    path.touch()
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        check_not_in_use(path)  # two may look at the same time


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x\\u001b[2J"}', '{"pid": 1}'])
def test_what_is_written_there_is_not_trusted(path: Path, content: str) -> None:
    path.write_text(content)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is in use: another process is writing there"):
            FolderLock(path)
    assert path.read_text() == content


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_file_systems_without_locks(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            FolderLock(path)
    else:
        lock = FolderLock(path)
        assert not lock.is_held
        lock.release()
        check_not_in_use(path)


def test_a_run_that_goes_on_waits_for_a_lost_host(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file system may still have that host's lock; one of this host ends with its process."""
    monkeypatch.setattr(folder_lock, "LOST_HOST_S", 5.0)
    said: list[str] = []
    holder = FolderLock(path)
    with pytest.raises(ConfigError, match="in use"):
        lock_folder(path, True, said.append)
    assert said == []
    with path.open("r+") as file:
        file.write(path.read_text().replace(socket.gethostname(), "elsewhere"))
    with pytest.raises(ConfigError, match="in use"):
        lock_folder(path, False, said.append)
    assert said == [], "a new run does not wait"
    threading.Timer(0.5, holder.release).start()
    lock_folder(path, True, said.append).release()
    (line,) = said
    assert "on 'elsewhere' since" in line
    assert line.endswith("Waiting 5 s, in case that host was lost")
