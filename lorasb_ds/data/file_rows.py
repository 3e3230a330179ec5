"""Rows of one file, read in place: files may be larger than memory."""

from __future__ import annotations

import codecs
import hashlib
import mmap
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

from lorasb_ds.errors import ConfigError

BOM = codecs.BOM_UTF8
# UTF-32 first: its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CHUNK_CHARACTERS = 1 << 20
OPENED = ("_bytes", "_parquet", "_batches")  # what a worker process opens for itself


class FileRows(Sequence[Any], ABC):
    """The rows of a file, which is mapped into memory; each is read when it is accessed.

    Nothing is kept from one process to the next. Worker processes get the path, and what was found
    by reading the file as a whole; they refuse a file that has been changed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] | None = None

    @abstractmethod
    def _row(self, i: int) -> Any:
        """Return row i; 0 <= i < len(self)."""

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> list[Any]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._row(range(len(self))[i])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in OPENED}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes that the rows are read from, in hex."""
        return hashlib.sha256(self._bytes).hexdigest()

    @cached_property
    def _bytes(self) -> mmap.mmap | bytes:
        """The file, mapped into memory; one that begins with a mark of UTF-16 or 32, in UTF-8."""
        with self.path.open("rb") as file:
            found = os.fstat(file.fileno())
            stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if self._stamp not in (None, stamp):
                raise ConfigError(f"{self.path} was changed while it was read. Start again.")
            self._stamp = stamp
            start = file.read(4)
            encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), None)
            if encoding is None:
                return _mapped(file)
            with tempfile.TemporaryFile() as aside:
                _to_utf8(self.path, encoding, aside)
                return _mapped(aside)


def _mapped(file: BinaryIO) -> mmap.mmap | bytes:
    if os.fstat(file.fileno()).st_size == 0:  # which mmap refuses
        return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _to_utf8(path: Path, encoding: str, out: BinaryIO) -> None:
    with path.open(encoding=encoding, errors="surrogatepass", newline="") as text:
        while piece := text.read(CHUNK_CHARACTERS):
            out.write(piece.encode("utf-8", "surrogatepass"))
    out.flush()
