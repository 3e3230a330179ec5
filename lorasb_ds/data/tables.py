"""Read rows of tables: .csv, .parquet, and folders saved by `datasets`."""

from __future__ import annotations

import csv
import json
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np

from lorasb_ds.data.file_rows import BOM, FileRows
from lorasb_ds.errors import ConfigError

BATCH_ROWS = 1024  # of a .parquet file, decoded at a time
OTHER_DELIMITERS = ";\t|"


class CsvRows(FileRows):
    """The records of a .csv file: every cell is the text that is written; None if it is empty.

    Only the records' offsets are kept in memory, 8 bytes each. Blank lines are no records.
    """

    def __len__(self) -> int:
        return len(self._scanned[1])

    def _row(self, i: int) -> dict[str, str | None]:
        columns, starts = self._scanned
        end = starts[i + 1] if i + 1 < len(starts) else len(self._bytes)
        piece = str(self._bytes[starts[i] : end], "utf-8")
        record = next(_records(StringIO(piece, newline="")))
        return {name: cell or None for name, cell in zip(columns, record, strict=True)}

    @cached_property
    def _scanned(self) -> tuple[list[str], array[int]]:
        """The names of the columns, and where each record begins.

        Raises:
            ValueError: if a record is malformed, or has not one cell for each column.
        """
        data = self._bytes
        lines = BytesIO(data) if isinstance(data, bytes) else data
        lines.seek(len(BOM) if data[:3] == BOM else 0)
        records = _records(str(line, "utf-8") for line in iter(lines.readline, b""))
        columns: list[str] = []
        starts = array("q")
        at = lines.tell()
        try:
            for record in records:
                if columns and record:
                    starts.append(at)
                elif record:
                    columns = _checked(record)
                if record and len(record) != len(columns):
                    raise ValueError(
                        f"it has {len(record)} cells, and the header {len(columns)}: a cell with a "
                        'comma, a quote or a line break is written in quotes, a quote in it as ""'
                    )
                at = lines.tell()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {records.line_num + 1} is not UTF-8 ({error.reason}): save the file as UTF-8"
            ) from None
        except (ValueError, csv.Error) as error:
            raise ValueError(f"line {records.line_num}: {error}") from None
        return columns, starts


def _records(lines: Iterable[str]) -> Any:
    """Return a reader of records. Strict: a stray quote would swallow the rows behind it."""
    csv.field_size_limit(sys.maxsize)  # of the process; 128 KiB at first
    return csv.reader(lines, strict=True)


def _checked(columns: list[str]) -> list[str]:
    """Return the names of columns; raises ValueError if two are equal, or commas are missing."""
    _check_unique(columns)
    if len(columns) == 1 and (found := [c for c in OTHER_DELIMITERS if c in columns[0]]):
        raise ValueError(f"the header has no comma, but {found[0]!r}: separate cells by commas")
    return columns


def _check_unique(columns: Iterable[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise ValueError(f"several columns are named {twice[0]!r}: give each its own name")


class ParquetRows(FileRows):
    """The rows of a .parquet file, of which a thousand are in memory.

    Rows are decoded in order: reading on is fast, going back starts at a row group again.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        _check_unique(self._parquet.schema_arrow.names)

    def __len__(self) -> int:
        return self._parquet.metadata.num_rows

    def _row(self, i: int) -> dict[str, Any]:
        import pyarrow as pa

        try:
            return self._decoded(i)
        except (pa.ArrowException, OSError) as error:
            # Not as an OSError: those of the cache are passed over.
            raise ConfigError(f"{self.path}: row {i + 1} cannot be read: {error}") from error

    def _decoded(self, i: int) -> dict[str, Any]:
        start, rows, following = self._batches
        group = int(np.searchsorted(self._group_starts, i, side="right")) - 1
        if i < start or self._group_starts[group] > start + len(rows):
            start, rows, following = self._group_starts[group], [], self._from_group(group)
        while i >= start + len(rows):
            start, rows = start + len(rows), next(following)
        self._batches = start, rows, following
        return rows[i - start]

    @cached_property
    def _parquet(self) -> Any:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        return ParquetFile(pa.BufferReader(self._bytes), buffer_size=1 << 20)

    @cached_property
    def _group_starts(self) -> list[int]:
        """The first row of each row group."""
        meta = self._parquet.metadata
        sizes = [meta.row_group(k).num_rows for k in range(meta.num_row_groups)]
        return [0, *np.cumsum(sizes[:-1]).tolist()]

    @cached_property
    def _batches(self) -> tuple[int, list[dict[str, Any]], Iterator[list[dict[str, Any]]]]:
        """The rows that are decoded, the number of the first one, and those that follow."""
        return 0, [], self._from_group(0)

    def _from_group(self, group: int) -> Iterator[list[dict[str, Any]]]:
        groups = list(range(group, self._parquet.metadata.num_row_groups))
        for batch in self._parquet.iter_batches(BATCH_ROWS, groups, use_threads=False):
            columns = [_cells(column) for column in batch.columns]
            names = batch.schema.names
            yield [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _cells(column: Any) -> list[Any]:
    """Return a column's cells. A number of 32 bits is the shortest that is it: 0.1."""
    import pyarrow as pa

    cells = column.to_pylist()
    if pa.types.is_float32(column.type) or pa.types.is_float16(column.type):
        kind = column.type.to_pandas_dtype()
        return [None if cell is None else float(str(kind(cell))) for cell in cells]
    return cells


def saved_tables(folder: Path) -> dict[str, Any] | Any:
    """Return a folder's table as `datasets` saved it, memory-mapped; or those of its splits.

    Its own reader takes some paths for addresses.

    Raises:
        ValueError: if `datasets` did not save the folder.
    """
    import datasets

    splits, state = folder / "dataset_dict.json", folder / "state.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        return {name: saved_tables(folder / name) for name in names}
    if not state.is_file():
        raise ValueError(f"there is no {state.name}, which save_to_disk writes, in {folder}")
    files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    tables = [datasets.Dataset.from_file(str(folder / file["filename"])) for file in files]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
