"""A file for this user's eyes only. Standard library only: its source is run on other hosts."""

from __future__ import annotations

import os


def write_private(path: str, text: str) -> None:
    """Write a file for this user's eyes only.

    The file is not replaced: on NFS, whoever opens it after this reads what is in it now.
    """
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(file, 0o600)
        os.write(file, text.encode())
        os.fsync(file)
    finally:
        os.close(file)
