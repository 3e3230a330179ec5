"""Rows that a program gives, written to a file of the run's folder: from there on they are data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import GIVEN_ROWS
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.files import publish

# Each row maps columns to values, as a line of a .jsonl does (docs/data.md); or what makes them.
Rows = Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]]


def write_given_rows(folder: Path, rows: Rows, name: str) -> Path:
    """Write rows to a file of a folder, which is made if need be; one row is in memory at a time.

    The file is named by its content: the same rows have the same file, whoever writes it, and other
    ones never take the place of those that a run was made from.

    Args:
        name: of the argument that gave the rows, for messages.
    Returns:
        The absolute path of the file.
    Raises:
        ConfigError: if there are no rows, or one of them cannot be written as JSON.
        OSError: if the file cannot be written.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    aside = folder / GIVEN_ROWS.format(f"{os.getpid()}.tmp")
    number = 0
    try:
        with aside.open("wb") as file:
            for number, row in enumerate(rows() if callable(rows) else rows, 1):
                line = _line(row, f"{name}, row {number},").encode()
                digest.update(line)
                file.write(line)
        if number == 0:
            raise ConfigError(f"{name}: there are none. Give at least one row.")
        path = folder / GIVEN_ROWS.format(f"{digest.hexdigest()[:16]}.jsonl")
        publish(aside, path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return path


def _line(row: Any, where: str) -> str:
    if not isinstance(row, Mapping):
        raise ConfigError(
            f"{where} is a {type(row).__name__}, and not a dict of columns. Give a list of dicts, "
            'a data set of `datasets`, or df.to_dict("records") of a DataFrame; files are named by '
            "`data`."
        )
    try:
        return json.dumps(dict(row), default=_as_json) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where} cannot be written as JSON: {error}. Give texts, numbers, and lists and dicts "
            "of them."
        ) from None


def _as_json(value: Any) -> Any:
    """Return what JSON has for a value: numpy's numbers and arrays, other mappings; or its text."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, date | time):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"it has a value of the type {type(value).__name__}")
