"""Rows with a label: the columns of their text, or pair of texts, and of their label."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.formats import NO_COLUMNS, Row, is_missing
from lorasb_ds.data.turns import RowError, check_unicode, is_empty
from lorasb_ds.errors import ConfigError

# In the order of the search: GLUE's, and those that most data sets of one text have.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMN = "label"
UNLABELED = -1  # the label of rows whose label is not given: GLUE's test splits
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?")  # and not 007, which is a name


class Classified(NamedTuple):
    """What a row with a label says.

    Attributes:
        form: named by the columns.
        texts: one, or two.
        label: as JSON.
        left_out: the names of the other columns that hold something.
    """

    form: str
    texts: list[str]
    label: str
    left_out: tuple[str, ...]


def parse_classified(row: Any, options: DataOptions) -> Classified:
    """Find a row's text, or its pair of texts, and its label.

    Raises:
        RowError: if the row is to be skipped.
    """
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object")
    texts, label = _find_columns(row, options.prompt_column, options.response_column)
    for name in texts:
        if not isinstance(row[name], str) or not row[name].strip():
            raise RowError("no text")
        check_unicode(row[name])
    written = _written(row[label])
    used = {*texts, label}
    left_out = (str(n) for n, value in row.items() if n not in used and not is_empty(value))
    said = [row[name] for name in texts]
    return Classified("/".join([*texts, label]), said, written, tuple(left_out))


def _find_columns(row: Row, text: str | None, label: str | None) -> tuple[tuple[str, ...], str]:
    candidates: Iterable[tuple[str, ...]] = TEXT_COLUMNS if text is None else ((text,),)
    label = label or LABEL_COLUMN
    # In tables of rows of several forms, the other forms' columns are empty.
    filled = {name for name, value in row.items() if not is_missing(value)}
    for columns in (filled, {*row}):
        found = next((texts for texts in candidates if columns.issuperset(texts)), None)
        if found is not None and label in row:
            return found, label
    raise RowError(NO_COLUMNS)


def _written(value: Any) -> str:
    """Return a label as JSON: 1, 1.0 and "1" are the same, since all cells of a CSV are text."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, str) and value.strip():
        check_unicode(value)
        return json.dumps(value, ensure_ascii=False)
    if is_missing(value) or isinstance(value, str):
        raise RowError("no label")
    if not isinstance(value, bool | int | float | Decimal) or math.isinf(value):
        raise RowError("a label that is neither text nor a number")
    if isinstance(value, bool):
        return json.dumps(value)
    if value == UNLABELED:
        raise RowError(f"label {UNLABELED}, that of rows without one")
    return json.dumps(int(value) if value == int(value) else float(value))


def unknown_text_columns(option: str, row: Row, options: DataOptions) -> ConfigError:
    """Return the error for data without a text or a label; ``row`` is the first one."""
    known = ", ".join("/".join(texts) for texts in TEXT_COLUMNS)
    return ConfigError(
        f"{option}: no known columns of a text and its label. The first row has: "
        f"{', '.join(map(str, row))}. Name them by --prompt-column (the text; now "
        f"{options.prompt_column or 'by name'}) and --response-column (the label; now "
        f"{options.response_column or LABEL_COLUMN}). Known texts: {known}."
    )
