"""Say what of the rows that are kept is not learned as they have it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lorasb_ds.config.data_options import REASONING_GYM
from lorasb_ds.data.chat import WARNINGS

LISTED = 12  # names in a list for the user
LEFT_OUT, WARNING = "left out of the rows: ", "warning: "


def notes_on(table: Any, kept: np.ndarray) -> list[str]:
    """Return notes with counts: columns that are left out, and remarks on rows.

    Args:
        table: with ``dataset.COLUMNS``.
        kept: (rows,), int64, its rows that are kept.
    """
    notes = []
    columns = (table.data.column(name) for name in ("row", "left_out", "remarks"))
    numbers, left_out, remarks = (column.take(pa.array(kept)) for column in columns)
    names = count_values(pc.list_flatten(left_out)).most_common()
    if names:
        listed = ", ".join(f"{name} ({n:,} rows)" for name, n in names[:LISTED])
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        notes.append(f"{LEFT_OUT}{listed}{more}")
    remarks = remarks.combine_chunks()
    said, having = pc.list_flatten(remarks), pc.list_parent_indices(remarks)
    for remark, count in count_values(said).most_common():
        first = having[pc.index(said, remark).as_py()].as_py()
        number = numbers[first].as_py() + 1
        warning = WARNING if remark in WARNINGS else ""
        notes.append(f"{warning}{count:,} rows {remark} (row {number}, for example)")
    return notes


def of_source(source: str, notes: Sequence[str]) -> list[str]:
    """Return notes on the rows of a source, with its name.

    The columns of generated rows are the generator's: they are not listed.
    """
    generated = source.startswith(REASONING_GYM)
    kept = [note for note in notes if not (generated and note.startswith(LEFT_OUT))]
    warned = [(WARNING if note.startswith(WARNING) else "", note) for note in kept]
    return [f"{warning}{source}: {note.removeprefix(warning)}" for warning, note in warned]


def count_values(column: Any) -> Counter[str]:
    """Return how often each value is in a column of pyarrow's."""
    return Counter({v["values"]: v["counts"] for v in pc.value_counts(column).to_pylist()})
