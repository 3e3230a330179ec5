"""Read rows of JSON files in place: files may be larger than memory, and partly invalid."""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

BOM = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 24
# The tokens that separate the elements of a JSON array: strings, brackets and commas.
PIECES = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]', re.DOTALL)


class JsonRows(Sequence[Any]):
    """The lines of a .jsonl file, or the elements of a .json file's array.

    A row that is not JSON is ``None``. Only the rows' offsets are kept in memory, 8 bytes each.
    Lines end at ``\\n`` only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, i: int) -> Any: ...
    @overload
    def __getitem__(self, i: slice) -> list[Any]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        try:
            return self.parse(i)
        except (ValueError, RecursionError):
            return None

    def parse(self, i: int) -> Any:
        """Parse row i; raises ValueError or RecursionError if it is not JSON."""
        i = range(len(self))[i]
        # One byte separates two rows: the end of the line, or the comma.
        piece = self._bytes[self._bounds[i] : self._bounds[i + 1] - 1]
        return json.loads(str(piece.removeprefix(BOM), "utf-8"))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle path and offsets: a worker process opens the file again, but does not scan it."""
        return {"path": self.path, "_bounds": self._bounds}

    @cached_property
    def _bytes(self) -> mmap.mmap | bytes:
        with self.path.open("rb") as file:
            if self.path.stat().st_size == 0:  # which mmap refuses
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Offsets of rows, (rows + 1,): row i ends one byte before ``bounds[i + 1]``."""
        data = self._bytes
        if self.path.suffix.lower() == ".json" and (opened := re.match(rb"\s*\[", self._head())):
            return _element_bounds(data, opened.end() + (len(BOM) if data[:3] == BOM else 0))
        ends = [_line_ends(data, start) for start in range(0, len(data), CHUNK_BYTES)]
        bounds = np.concatenate([np.zeros(1, np.int64), *ends])
        if bounds[-1] < len(data):  # the last line may have no end
            bounds = np.append(bounds, len(data) + 1)
        return bounds

    def _head(self) -> bytes:
        return self._bytes[:4096].removeprefix(BOM)


def _line_ends(data: mmap.mmap | bytes, start: int) -> np.ndarray:
    chunk = np.frombuffer(data[start : start + CHUNK_BYTES], dtype=np.uint8)
    return np.flatnonzero(chunk == ord("\n")) + start + 1


def _element_bounds(data: mmap.mmap | bytes, start: int) -> np.ndarray:
    """Return the offsets of an array's elements; the first is at ``start``.

    Raises:
        ValueError: if the array does not end, or something follows it.
    """
    bounds, depth = array("q", [start]), 1
    for match in PIECES.finditer(data, start):
        piece = match.group()
        if piece in b"[{":
            depth += 1
        elif piece in b"]}":
            depth -= 1
        if depth == 0 or (depth == 1 and piece == b","):
            bounds.append(match.end())
        if depth == 0:
            break
    if depth:
        raise ValueError("the array does not end")
    if data[bounds[-1] : bounds[-1] + CHUNK_BYTES].strip():
        raise ValueError("something follows the array")
    empty = len(bounds) == 2 and not data[bounds[0] : bounds[1] - 1].strip()
    return np.array(bounds[:1] if empty else bounds)
