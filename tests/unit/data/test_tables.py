"""Rows of .csv, .parquet and saved folders: what is written is what is read."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorasb_ds.data.formats import parse_row
from lorasb_ds.data.sources import load_rows, source_fingerprint
from lorasb_ds.data.tables import BATCH_ROWS, CsvRows, ParquetRows
from lorasb_ds.errors import ConfigError
from tests.runs import word_rows, write_jsonl

ROWS = word_rows(3)


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as what the path's end says: a file, or a folder saved by `datasets`."""
    table = datasets.Dataset.from_list(rows)
    writers = {".csv": table.to_csv, ".parquet": table.to_parquet, ".json": table.to_json}
    writers.get(path.suffix, table.save_to_disk)(str(path))
    return path


def response(row: Any) -> str:
    _, turns, *_ = parse_row(row)
    assert not isinstance(turns, str)
    return turns[-1]["content"]


WRITTEN = [
    "02108",
    "18",
    "123456789012345678",
    "1.50",
    "1e5",
    "NA",
    "None",
    "NULL",
    "nan",
    "True",
    "false",
    "2024-01-31",
]


def test_a_cell_of_a_csv_is_text(tmp_path: Path) -> None:
    """Whatever the other cells look like, ten thousand of them too; an empty one is missing."""
    path = tmp_path / "rows.csv"
    cells = [*WRITTEN, "", *map(str, range(10_001)), "red"]
    path.write_text("question,answer\n" + "".join(f"What?,{cell}\n" for cell in cells))
    rows = load_rows(str(path))
    assert [row["answer"] for row in rows] == [cell or None for cell in cells]
    assert [response(row) for row in rows[:12]] == WRITTEN


CSV_CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(
    cells=st.lists(st.tuples(CSV_CELLS, CSV_CELLS), max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
    start=st.sampled_from(["", "\ufeff"]),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-32"]),
)
@example(cells=[("a\r\nb", '"'), ("", ""), ("\u2028", "x")], end="\n", start="", encoding="utf-8")
def test_any_csv_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    cells: list[tuple[str, str]],
    end: str,
    start: str,
    encoding: str,
) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        file.write(start if encoding == "utf-8" else "")
        # The module leaves a line break as it is that is not its own.
        quoting = csv.QUOTE_MINIMAL if end == "\r\n" else csv.QUOTE_ALL
        writer = csv.writer(file, lineterminator=end, quoting=quoting)
        writer.writerows([("question", "answer"), *cells])
    rows = CsvRows(path)
    expected = [{"question": a or None, "answer": b or None} for a, b in cells]
    assert list(rows) == expected
    assert pickle.loads(pickle.dumps(rows))[:] == expected  # noqa: S301, our own


def test_records_of_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbf"a","b, c"\r\n\r\n"1\r\n2",3\r\n  \xc3\xa9 ," x "\n\n4,""')
    expected = [
        {"a": "1\r\n2", "b, c": "3"},
        {"a": "  \u00e9 ", "b, c": " x "},
        {"a": "4", "b, c": None},
    ]
    rows = CsvRows(path)
    assert list(rows) == expected
    assert (rows[-1], rows[1:]) == (expected[-1], expected[1:])
    with pytest.raises(IndexError):
        rows[3]
    path.write_text("a,b\n" + "x" * 300_000 + ",y\n")
    assert len(CsvRows(path)[0]["a"]) == 300_000
    path.write_text("question,answer,,\na,b,,\n")
    assert parse_row(CsvRows(path)[0])[0] == "question/answer", "columns that a spreadsheet adds"


BAD_CSV = {
    b"a,b\n1,2\n1,2,3\n": "line 3: it has 3 cells, and the header 2: a cell with a comma",
    b"a,b\n1,2\n1\n": "line 3: it has 1 cells",
    b'a,b\n1,"2\n3,4\n': "line 3: unexpected end of data",
    b'a,b\n1,"2" or 3\n': "line 2: ',' expected after '\"'",
    b"a,b,a\n1,2,3\n": "line 1: several columns are named 'a'",
    b"a,b\n\xe9,2\n": "line 2 is not UTF-8 .*save the file as UTF-8",
    b"a;b\n1;2\n": "line 1: the header has no comma, but ';'",
    b"a,b\r1,2\r": "line 1: new-line character",
    b"a,b\n": "has no rows",
    b"": "has no rows",
}


@pytest.mark.parametrize("content", BAD_CSV)
def test_a_csv_that_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--eval-data {path}.*{BAD_CSV[content]}"):
        load_rows(str(path), "--eval-data")


TYPED = {
    "text": (pa.array(["02108"]), "02108"),
    "whole": (pa.array([123456789012345678]), "123456789012345678"),
    "double": (pa.array([1.5]), "1.5"),
    "single": (pa.array([0.1], pa.float32()), "0.1"),
    "half": (pa.array(np.array([0.1], np.float16)), "0.1"),
    "bool": (pa.array([True]), "true"),
    "decimal": (pa.array([Decimal("1.50")]), "1.50"),
    "large decimal": (pa.array([Decimal("1000")], pa.decimal128(20, 0)), "1000"),
    "date": (pa.array([date(2024, 1, 31)]), "2024-01-31"),
    "time": (pa.array([datetime(2024, 1, 31, 12)]), "2024-01-31 12:00:00"),
    "infinity": (pa.array([-np.inf]), "-Infinity"),
}


@pytest.mark.parametrize("kind", TYPED)
def test_a_cell_of_a_parquet_has_a_type(tmp_path: Path, kind: str) -> None:
    column, expected = TYPED[kind]
    pq.write_table(pa.table({"question": ["What?"], "answer": column}), tmp_path / "a.parquet")
    assert response(load_rows(str(tmp_path / "a.parquet"))[0]) == expected


def test_rows_of_a_parquet_in_any_order(tmp_path: Path) -> None:
    """Row groups that are larger and smaller than what is decoded at a time."""
    path = tmp_path / "rows.parquet"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"id": i, "messages": turns} for i in range(3 * BATCH_ROWS)]
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, size in ((0, 2500), (2500, 7), (2507, 565)):
            writer.write_table(table.slice(start, size))
    found = ParquetRows(path)
    assert list(found) == rows
    order = np.random.default_rng(0).permutation(len(rows))[:20].tolist()
    assert [found[i]["id"] for i in order] == order
    assert pickle.loads(pickle.dumps(found))[-1] == rows[-1]  # noqa: S301, our own


def test_a_parquet_that_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["x", "x"]), path)
    with pytest.raises(ConfigError, match="several columns are named 'x'"):
        load_rows(str(path))
    pq.write_table(pa.table({"x": [f"{i} {i * i}" for i in range(9000)]}), path)
    content = bytearray(path.read_bytes())
    content[100:9000] = bytes(8900)
    path.write_bytes(content)
    rows = load_rows(str(path))
    with pytest.raises(ConfigError, match=rf"{path}: row 1 cannot be read: "):
        rows[0]
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="cannot be read as a file"):
        load_rows(str(path))
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="has no rows"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.json", "rows"])
def test_rows_that_changed_are_read_again(tmp_path: Path, name: str) -> None:
    """Also where the path, the size and the time are those of the old ones."""
    path = save(tmp_path / name, ROWS)
    before = load_rows(str(path))
    fingerprint = source_fingerprint(str(path), before)
    files = [path] if path.is_file() else list(path.iterdir())
    times = {file: file.stat().st_mtime_ns for file in files}
    changed = [row | {"answer": row["answer"][::-1]} for row in ROWS]
    if path.is_dir():
        shutil.copy(path / "state.json", tmp_path / "state.json")
        shutil.rmtree(path)
    save(path, changed)
    if path.is_dir():  # which has the fingerprint that `datasets` gave the old rows
        shutil.copy(tmp_path / "state.json", path / "state.json")
    for file, time in times.items():
        os.utime(file, ns=(time, time))
    after = load_rows(str(path))
    assert [dict(row) for row in after] == changed
    assert source_fingerprint(str(path), after) != fingerprint


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\na\n")
    rows = CsvRows(path)
    assert list(rows) == [{"text": "a"}]
    stored = pickle.dumps(rows)
    digest = rows.digest
    (tmp_path / "new.csv").write_text("text\nb\n")
    (tmp_path / "new.csv").replace(path)
    assert (rows[0], CsvRows(path).digest == digest) == ({"text": "a"}, False)
    with pytest.raises(ConfigError, match=r"rows\.csv was changed while it was read"):
        pickle.loads(stored)[0]  # noqa: S301, our own


NAMES = ["rows[12]", "*", "a?", "**", "a::b", "$HOME", "~rows", "a b", "%41", "#x", "{a,b}", "-n"]


@pytest.mark.parametrize("kind", [".csv", ".parquet", ".json", ""])
def test_a_path_is_a_path(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("rows1", "ab", "b"):  # what these names would match
        save(tmp_path / f"{other}{kind}", word_rows(1))
    for name in NAMES:
        save(tmp_path / f"aside{kind}", ROWS).rename(tmp_path / f"{name}{kind}")
        for source in (f"{tmp_path}/{name}{kind}", f"./{name}{kind}", f"{name}{kind}"):
            assert [dict(row) for row in load_rows(source)] == ROWS, source


@settings(max_examples=50, deadline=None)
@given(name=st.text(st.sampled_from("[]*?:$~{}!#%&;\\'\"@+-. a1\u00e9\n"), min_size=1, max_size=12))
def test_any_name_is_a_path(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("names")
    (folder / f"{name}.csv").write_text("question,answer\na,b\n")
    (folder / f"{name}.jsonl").write_text('{"question": "a", "answer": "b"}')
    for end in (".csv", ".jsonl"):
        assert list(load_rows(f"{folder}/{name}{end}")) == [{"question": "a", "answer": "b"}]
    pq.write_table(pa.table({"text": ["c"]}), folder / "aside")
    (folder / "aside").rename(folder / f"{name}.parquet")
    assert list(load_rows(f"{folder}/{name}.parquet")) == [{"text": "c"}]


def test_no_cache_of_datasets_is_needed(tmp_path: Path) -> None:
    sources = [str(save(tmp_path / name, ROWS)) for name in ("a.csv", "b.parquet", "c")]
    sources.append(write_jsonl(tmp_path / "d.jsonl", ROWS))
    code = (
        "import sys\n"
        "from lorasb_ds.data.sources import load_rows\n"
        "print(sum(len(load_rows(source)) for source in sys.argv[1:]))"
    )
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "file/none")}
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code, *sources]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout == f"{4 * len(ROWS)}\n"


def test_a_saved_folder(tmp_path: Path) -> None:
    """In several files, and formatted as tensors; what is none is refused."""
    table = datasets.Dataset.from_list([{"question": str(i), "answer": i} for i in range(10)])
    table.with_format("numpy").save_to_disk(tmp_path / "saved", num_shards=3)
    rows = load_rows(str(tmp_path / "saved"))
    assert [row["answer"] for row in rows] == list(range(10))
    assert response(rows[3]) == "3"
    with pytest.raises(ConfigError, match=r"as a saved folder: there is no state\.json"):
        load_rows(str(tmp_path))
