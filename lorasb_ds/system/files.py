"""Write files atomically: to a temporary name, fsynced and renamed. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SUMS_FILE = "SHA256SUMS"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give the name under which to write a file, which then takes the place of ``path``.

    A crash leaves the old file or the new one, never a part of it. The file gets the mode that the
    umask says, although some writers (safetensors) make theirs readable for its owner only.

    Raises:
        OSError: naming the file, if it cannot be written; nothing is left of it.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.unlink(missing_ok=True)
        aside.touch()
        mode = stat.S_IMODE(aside.stat().st_mode)
        yield aside
        if stat.S_IMODE(aside.stat().st_mode) != mode:
            aside.chmod(mode)
        publish(aside, path)
    except BaseException as error:
        with suppress(OSError):  # room for others
            aside.unlink()
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of it."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def append_text(path: Path, text: str) -> None:
    """Append to a file; it is with the operating system when this returns.

    Raises:
        OSError: if it cannot be written, as on a full disk; nothing of the text is in it then.
    """
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    end = os.fstat(descriptor).st_size
    try:
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)  # NFS writes only now
    except OSError as error:
        os.truncate(path, end)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_sums(folder: Path, names: Sequence[str]) -> None:
    """Write ``SHA256SUMS`` of some files of a folder, in the format of ``sha256sum -c``."""
    write_text(folder / SUMS_FILE, _sums(folder, names))


def check_sums(folder: Path, names: Sequence[str]) -> str | None:
    """Return what is wrong with files that ``write_sums`` was given; None if they are unchanged."""
    try:
        stored = (folder / SUMS_FILE).read_bytes()
        found = _sums(folder, names).encode()
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    if stored == found:
        return None
    lines = stored.splitlines()
    changed = [n for n, line in zip(names, found.splitlines(), strict=True) if line not in lines]
    return f"{', '.join(changed) or SUMS_FILE} is not what was written (by {SUMS_FILE})"


def _sums(folder: Path, names: Sequence[str]) -> str:
    return "".join(f"{file_digest(folder / name)}  {name}\n" for name in names)


def publish(aside: Path, path: Path) -> None:
    """Rename a complete file or folder to its final name, and fsync both it and its parent."""
    fsync(aside)
    aside.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
