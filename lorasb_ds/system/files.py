"""Write files atomically: to a temporary name, fsynced and renamed. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasb_ds.errors import ConfigError

SUMS_FILE = "SHA256SUMS"


def write_text(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    publish(aside, path)


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def check_replaceable(
    out: Path, overwrite: bool, is_ours: Callable[[Path], bool], what: str
) -> None:
    """Refuse to write into a folder that is not empty, unless it is one of ours to overwrite.

    Args:
        overwrite: whether the folder's content may be replaced.
        is_ours: returns whether a folder's content is of the kind that may be replaced.
        what: name of that kind, for messages.
    Raises:
        ConfigError: if the folder may not be written.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file. Name a folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"--out {out} is not empty. Name another folder, or give --overwrite.")
    if not is_ours(out):
        raise ConfigError(
            f"--out {out} is not empty, and is not a {what}: --overwrite would delete its content. "
            "Name another folder, or empty it."
        )


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
