"""Read rows of JSON files in place: files may be larger than memory, and partly invalid."""

from __future__ import annotations

import json
import mmap
import re
from array import array
from functools import cached_property
from typing import Any

import numpy as np

from lorasb_ds.data.file_rows import BOM, FileRows

CHUNK_BYTES = 1 << 22
NEWLINE = ord("\n")
IS_BLANK = np.isin(np.arange(256), list(b" \t\r\n"))
ARRAY = re.compile(rb"\s*\[")
# The tokens that separate the elements of a JSON array: strings, brackets and commas. A string
# without an end reaches to the end of the file: else the search would start again at every quote.
PIECES = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[][{},]', re.DOTALL)


class WrittenNumber(float):
    """A number whose text is what is written in the file: 1.50, 1e400, Infinity."""

    _text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number._text = text
        return number

    def __str__(self) -> str:
        return self._text


DECODER = json.JSONDecoder(parse_float=WrittenNumber, parse_constant=WrittenNumber)


class JsonRows(FileRows):
    """The lines of a file, or the elements of its array.

    A row that is not JSON is ``None``. Only the rows' offsets are kept in memory, 8 bytes each.
    Lines end at ``\\n`` only, may have a comma at their end, and are no rows if they are blank.
    """

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def _row(self, i: int) -> Any:
        try:
            return self.parse(i)
        except (ValueError, RecursionError):
            return None

    def parse(self, i: int) -> Any:
        """Parse row i; raises ValueError or RecursionError if it is not JSON."""
        # One byte separates two rows: the end of the line, or the comma.
        piece = self._bytes[self._bounds[i] : self._bounds[i + 1] - 1]
        text = str(piece.removeprefix(BOM), "utf-8").strip(" \t\r\n")
        return DECODER.decode(text.removesuffix(","))

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Offsets of rows, (rows + 1,): row i ends one byte before ``bounds[i + 1]``."""
        data = self._bytes
        start = len(BOM) if data[:3] == BOM else 0
        if opened := ARRAY.match(data, start):
            try:
                return _element_bounds(data, opened.end())
            except ValueError:
                # Lines may begin with a list, too; those of a torn array are counted.
                if self.path.suffix.lower() == ".json":
                    raise
        return _line_bounds(data)


def _line_bounds(data: mmap.mmap | bytes) -> np.ndarray:
    """Return where the lines begin that are not blank, and the end of the last one.

    Blank lines belong to the line before them.
    """
    ends, solid_before, num_solid = [], [], 0
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = np.frombuffer(data[start : start + CHUNK_BYTES], dtype=np.uint8)
        solid = np.cumsum(~IS_BLANK[chunk], dtype=np.int64) + num_solid
        at = np.flatnonzero(chunk == NEWLINE)
        ends.append(at + start + 1)
        solid_before.append(solid[at])
        num_solid = solid[-1]
    if len(data) and data[len(data) - 1] != NEWLINE:  # the last line may have no end
        ends.append(np.array([len(data) + 1]))
        solid_before.append(np.array([num_solid]))
    if num_solid == 0:
        return np.zeros(1, np.int64)
    is_blank = np.diff(np.concatenate([[0], *solid_before])) == 0
    bounds = np.concatenate([[0], *ends])
    return np.append(bounds[:-1][~is_blank], bounds[-1])


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
        raise ValueError("it is not a JSON array: the array does not end")
    if data[bounds[-1] : bounds[-1] + CHUNK_BYTES].strip():
        raise ValueError("it is not a JSON array: something follows the array")
    empty = len(bounds) == 2 and not data[bounds[0] : bounds[1] - 1].strip()
    return np.array(bounds[:1] if empty else bounds)
