"""Rows that a program gives: their file, and what cannot be written to it."""

from __future__ import annotations

import math
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import check_output_dir, given_rows
from lorasb_ds.data.given_rows import write_given_rows
from lorasb_ds.data.sources import load_rows
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.output_dir import remove_given_rows
from tests.runs import word_rows, write_jsonl


def test_rows_of_all_kinds_are_read_as_they_were_given(tmp_path: Path) -> None:
    rows = [*word_rows(3), {"text": "é\u2028\ud800 \n"}]
    kinds: list[Any] = [rows, tuple(rows), lambda: (MappingProxyType(row) for row in rows)]
    paths = {write_given_rows(tmp_path / "new", kind, "rows") for kind in kinds}
    assert len(paths) == 1, "the same rows have the same file"
    (path,) = paths
    assert path.is_absolute()
    assert list(load_rows(str(path))) == rows
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(tmp_path)
    table = datasets.Dataset.from_list(word_rows(3))
    frame = pd.DataFrame(word_rows(3)).to_dict("records")
    assert write_given_rows(tmp_path, table, "rows") == write_given_rows(tmp_path, frame, "rows")
    assert write_given_rows(tmp_path, table, "rows") != path
    assert not list(tmp_path.rglob("*.tmp"))


def _umask(folder: Path) -> int:
    (folder / "probe").touch()
    return 0o666 & ~((folder / "probe").stat().st_mode & 0o777)


def test_cells_become_what_a_file_would_have(tmp_path: Path) -> None:
    row = {
        "number": np.float64(0.5),
        "count": np.int64(3),
        "list": np.array([1, 2]),
        "day": date(2026, 1, 2),
        "price": Decimal("1.50"),
        "missing": math.nan,
        "inner": MappingProxyType({"a": None}),
    }
    path = write_given_rows(tmp_path, [row], "rows")
    (found,) = load_rows(str(path))
    assert math.isnan(found.pop("missing"))
    assert found == {
        "number": 0.5,
        "count": 3,
        "list": [1, 2],
        "day": "2026-01-02",
        "price": "1.50",
        "inner": {"a": None},
    }


CYCLE: dict[str, Any] = {}
CYCLE["self"] = CYCLE


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "eval_rows: there are none"),
        ("train.jsonl", "eval_rows, row 1, is a str, and not a dict .* named by `data`"),
        (pd.DataFrame(word_rows(2)), r'is a str, .* df.to_dict\("records"\)'),
        ([{"a": "b"}, ["a", "b"]], "row 2, is a list"),
        ([{"image": b"\x89PNG"}], "row 1, .* a value of the type bytes"),
        ([{("a", "b"): 1}], "row 1, cannot be written as JSON: keys must be str"),
        ([CYCLE], "row 1, cannot be written as JSON: Circular"),
    ],
)
def test_rows_that_cannot_be_written(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_given_rows(tmp_path, rows, "eval_rows")
    assert not list(tmp_path.iterdir())


def test_what_the_rows_of_a_program_raise_is_raised(tmp_path: Path) -> None:
    def broken() -> Any:
        yield {"text": "one"}
        raise FileNotFoundError("the program's own")

    with pytest.raises(FileNotFoundError, match="the program's own"):
        write_given_rows(tmp_path, broken, "rows")
    assert not list(tmp_path.iterdir())


def test_rows_of_an_earlier_run_are_removed_unless_they_are_used(tmp_path: Path) -> None:
    used, held_out, old = (
        write_given_rows(tmp_path, [{"text": name}], "rows") for name in ("a", "b", "c")
    )
    write_jsonl(tmp_path / "rows-own.jsonl", word_rows(1))
    (tmp_path / "rows-123.tmp").touch()
    config = RunConfig(
        data=(str(used),), eval_data=str(held_out), output_dir=str(tmp_path), overwrite=True
    )
    remove_given_rows(tmp_path, config)
    assert used.is_file()
    assert held_out.is_file()
    assert not old.exists()
    assert sorted(given_rows(tmp_path)) == sorted([used, held_out])
    with pytest.raises(ConfigError, match=r"does not touch what is there \(rows-own.jsonl\)"):
        check_output_dir(config)
    (tmp_path / "rows-own.jsonl").unlink()
    check_output_dir(RunConfig(output_dir=str(tmp_path)))  # a run that was refused left only rows
