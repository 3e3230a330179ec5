"""One job for each folder: a lock that ends with the process that holds it. Torch-free.

It is ``flock``'s, which NFS and cluster file systems pass on to other hosts. The file stays when
the job ends: whoever removed it might remove the lock of the next job.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO

from lorasb_ds.errors import ConfigError

PATIENCE_S = 2.0  # somebody may just be looking; a holder that was killed may not be quite gone
LOST_HOST_S = 150.0  # for what goes on elsewhere: NFS keeps the locks of a lost host for 90
# How file systems say that they have no locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class InUseError(ConfigError):
    """Another process has the lock.

    Attributes:
        host: the holder's; None where it is not known.
    """

    def __init__(self, message: str, host: str | None) -> None:
        super().__init__(message)
        self.host = host


class FolderLock:
    """The lock of a folder, until ``release`` or the end of this process.

    Attributes:
        is_held: False where the file system has no locks.
    """

    def __init__(self, path: Path, patience_s: float | None = None) -> None:
        """Take the lock, and write down who has it.

        Args:
            path: of the lock's file, in the folder.
            patience_s: how long to wait for another holder. [default: ``PATIENCE_S``]
        Raises:
            InUseError: naming the holder, if another process has it.
            OSError: if the lock's file cannot be written.
        """
        self._file: IO[str] = path.open("a+", encoding="utf-8")
        try:
            is_held = _try(self._file, fcntl.LOCK_EX, patience_s)
            if is_held is None:
                raise _in_use(path, self._file)
            self.is_held = is_held
            holder = {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "since": f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
            }
            self._file.truncate(0)
            self._file.write(json.dumps(holder) + "\n")
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def release(self) -> None:
        self._file.close()


def lock_folder(path: Path, goes_on: bool, say: Callable[[str], None]) -> FolderLock:
    """Lock the folder of a run; one that goes on there waits for another host, which may be lost.

    Args:
        path: of the lock's file, in the folder.
        say: gets a line before it waits.
    Raises:
        InUseError: naming the holder.
    """
    try:
        return FolderLock(path)
    except InUseError as error:
        if not goes_on or error.host == socket.gethostname():  # where locks end with processes
            raise
        say(f"{error} Waiting {LOST_HOST_S:g} s, in case that host was lost")
        return FolderLock(path, LOST_HOST_S)


def check_not_in_use(path: Path) -> None:
    """Refuse a folder that a running job has locked.

    Args:
        path: as of ``FolderLock``.
    Raises:
        InUseError: naming the holder.
    """
    try:
        file = path.open(encoding="utf-8")
    except OSError:
        return  # there is none, or `FolderLock` will say what is wrong
    with file:
        if _try(file, fcntl.LOCK_SH) is None:
            raise _in_use(path, file)


def _try(file: IO[str], kind: int, patience_s: float | None = None) -> bool | None:
    """Lock a file; return None if it is locked, and False if it cannot be."""
    deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # as SMB has it
            if time.monotonic() > deadline:
                return None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            return False
        else:
            return True
        time.sleep(0.1)


def _in_use(path: Path, file: IO[str]) -> InUseError:
    host = None
    try:
        file.seek(0)
        holder = json.loads(file.read(1 << 10))
        who = f"process {holder['pid']:d} on {holder['host']!r} since {holder['since']!r}"
        host = holder["host"]
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return InUseError(
        f"{path.parent} is in use: {who} is writing there. Stop it or wait for its end, or name "
        "another --output-dir.",
        host,
    )
