"""Follow the ``metrics.jsonl`` of a run that other processes write. Torch-free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lorasb_ds.config.overwriting import read_object
from lorasb_ds.config.run_layout import METRICS, RUN_JSON
from lorasb_ds.runs.history import Row, read_row


class FollowedLog:
    """Find the rows that are written from now on.

    A run that goes on from a checkpoint replaces the file by one with the rows up to there, which
    are not new. Those after it are, even if there have been others of the same steps.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._steps: list[int] = []  # of every row of the file so far
        self._open(already_there=True)

    def new_rows(self) -> list[Row]:
        """Return the rows that have been written since the last call, without a torn last line."""
        rows = self._read()
        if self._is_replaced():
            self._open()
            rows += self._read()
        return rows

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _is_replaced(self) -> bool:
        try:
            found = (self._folder / METRICS).stat()
        except OSError:  # not there yet
            return False
        return self._file is None or found.st_ino != os.fstat(self._file.fileno()).st_ino

    def _open(self, already_there: bool = False) -> None:
        """Open the file that is there now, and pass by the rows in it that are not new."""
        self.close()
        try:
            self._file = (self._folder / METRICS).open("rb")
        except OSError:
            self._file = None
        resumed_at = read_object(self._folder / RUN_JSON).get("resumed_at")  # written before it
        kept = [step for step in self._steps if resumed_at is not None and step <= resumed_at]
        self._steps = []
        self._read(None if already_there else len(kept))

    def _read(self, most: int | None = None) -> list[Row]:
        rows: list[Row] = []
        while self._file is not None and len(rows) != most:
            line = self._file.readline()
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), os.SEEK_CUR)
                break
            row = read_row(line)
            if row is not None:
                rows.append(row)
        self._steps += [row["step"] for row in rows]
        return rows
