"""Rows -> a table of examples, and what became of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.compute as pc

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.formats import NO_COLUMNS, RowError, check_columns, no_columns, parse_row
from lorasb_ds.data.json_rows import JsonRows
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example, encode
from lorasb_ds.errors import ConfigError

KEPT = "kept"
NOT_JSON = "skipped: not a JSON object"

# The types of a table of examples, as Arrow calls them.
COLUMNS = {
    "input_ids": "list",
    "labels": "list",
    "truncated": "bool",
    "row": "int64",
    "outcome": "string",
    "form": "string",
    "length": "int32",
    "num_labels": "int32",
    "first_label": "int32",
    "digest": "int64",
}


def columns_of(
    rows: Sequence[Any], indices: Iterable[int], tokenizer: Any, config: RunConfig
) -> dict[str, list[Any]]:
    """Some rows as the columns of a table: a row's example, or why it is skipped.

    ``digest`` is a hash of ids and labels, for comparisons without reading them.
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for i in indices:
        example, form, outcome = Example([], []), "", KEPT
        try:
            form, said = parse_row(rows[i], config.prompt_column, config.response_column)
            example = encode(tokenizer, said, config)
        except RowError as error:
            outcome = f"skipped: {error}"
        ids, labels = (np.array(x, np.int32) for x in (example.input_ids, example.labels))
        whole = hashlib.sha256(ids.tobytes() + labels.tobytes()).digest()
        values = {
            "input_ids": ids,
            "labels": labels,
            "truncated": example.truncated,
            "row": i,
            "outcome": outcome,
            "form": form,
            "length": len(ids),
            "num_labels": int((labels[1:] != IGNORE_INDEX).sum()),
            "first_label": example.first_label,
            "digest": int.from_bytes(whole[:8], "little", signed=True),
        }
        for name, value in values.items():
            columns[name].append(value)
    return columns


def features() -> Any:
    import datasets

    ids = datasets.List(datasets.Value("int32"))
    return datasets.Features(
        {name: ids if t == "list" else datasets.Value(t) for name, t in COLUMNS.items()}
    )


class Examples(Sequence[Example]):
    """Examples of a table, made when they are asked for."""

    def __init__(self, table: Any, index: np.ndarray) -> None:
        self._table, self._index = table, index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = self._table[int(self._index[i])]
        return Example(row["input_ids"], row["labels"], row["truncated"])


@dataclass(frozen=True)
class TokenizedRows:
    """Examples, source after source, and what became of every row.

    Attributes:
        table: a ``datasets.Dataset`` with ``COLUMNS``, in order and memory-mapped if large.
        index: (examples,), int64: which of the table's rows these are.
        counts: ``kept``, ``truncated`` (also kept), and the reasons why rows are skipped.
        forms: the forms of the rows that are kept.
        sources: as given, and where in the table each of them ends.
    """

    table: Any
    index: np.ndarray
    counts: Counter[str]
    forms: Counter[str]
    sources: tuple[tuple[str, int], ...]

    @property
    def examples(self) -> Examples:
        return Examples(self.table, self.index)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(examples,), int32: tokens."""
        return self._column("length")

    @cached_property
    def num_labels(self) -> np.ndarray:
        """(examples,), int32: tokens that are learned; see ``Example.num_label_tokens``."""
        return self._column("num_labels")

    @cached_property
    def first_labels(self) -> np.ndarray:
        """(examples,), int32: see ``Example.first_label``."""
        return self._column("first_label")

    @cached_property
    def digest(self) -> str:
        """Equal for equal examples in equal order."""
        return hashlib.sha256(self.row_digests.tobytes()).hexdigest()

    @cached_property
    def row_digests(self) -> np.ndarray:
        """(examples,), int64: of each one's ids and labels."""
        return self._column("digest")

    @cached_property
    def row_numbers(self) -> np.ndarray:
        """(examples,), int64: which row of its source each is, counted from 1."""
        return self._column("row") + 1

    @property
    def source_sizes(self) -> tuple[int, ...]:
        """Examples of each source."""
        return tuple(np.bincount(self._source_of(self.index), minlength=len(self.sources)).tolist())

    def row_id(self, i: int) -> str:
        """Where an example comes from, rows counted from 1: ``rows.jsonl:17``."""
        at = int(self.index[i])
        source = self.sources[int(self._source_of(np.array([at]))[0])][0]
        name = Path(source).name
        same_name = sum(Path(other).name == name for other, _ in self.sources) > 1
        is_file = not same_name and Path(source).expanduser().is_file()
        return f"{name if is_file else source}:{self.row_numbers[i]}"

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedRows:
        """Some of the examples, in this order. Rows that were skipped are counted no longer."""
        index = self.index[np.asarray(indices, dtype=np.int64)]
        part = replace(self, index=index, counts=Counter(), forms=Counter())
        part.counts.update({KEPT: len(index), "truncated": int(part._column("truncated").sum())})
        return replace(part, counts=+part.counts)

    def describe(self) -> str:
        by_form = f"; kept by form: {told(self.forms)}" if len(self.forms) > 1 else ""
        return told(self.counts) + by_form

    def _column(self, name: str) -> np.ndarray:
        return self.table.data.column(name).to_numpy()[self.index]

    def _source_of(self, index: np.ndarray) -> np.ndarray:
        return np.searchsorted([end for _, end in self.sources], index, side="right")


def told(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def count(table: Any) -> tuple[np.ndarray, Counter[str], Counter[str]]:
    """Which rows of a table are kept, what became of all of them, and the forms of those kept."""
    outcomes = table.data.column("outcome")
    is_kept = pc.equal(outcomes, KEPT)
    counts = _count_values(outcomes)
    truncated = int(table.data.column("truncated").to_numpy().sum())
    counts = Counter({KEPT: counts.pop(KEPT, 0), "truncated": truncated}) + counts
    forms = _count_values(table.data.column("form").filter(is_kept))
    return np.flatnonzero(is_kept.to_numpy()), counts, forms


def _count_values(column: Any) -> Counter[str]:
    return Counter({v["values"]: v["counts"] for v in pc.value_counts(column).to_pylist()})


def check_tokenizer(tokenizer: Any, config: RunConfig) -> None:
    """What has to hold before rows are tokenized.

    Raises:
        ConfigError: if it does not.
    """
    check_columns(config.prompt_column, config.response_column)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"--model {config.model}: its tokenizer ({type(tokenizer).__name__}) does not tell "
            "where in a text its tokens lie, so what is learned cannot be marked. It needs a "
            "tokenizer.json: save_pretrained of the model's fast tokenizer writes one."
        )


def nothing_left(
    rows: Sequence[Any], counts: Counter[str], config: RunConfig, option: str
) -> ConfigError:
    """What to say where every row is skipped."""
    if counts[NOT_JSON] == counts.total():
        return ConfigError(
            f"{option}: no row is a JSON object; the first is not: {_problem_of_first(rows)}. "
            "Write an object on each line of a .jsonl file, or an array of them into a .json file."
        )
    if counts[NOT_JSON] + counts[f"skipped: {NO_COLUMNS}"] == counts.total():
        first = next(row for row in rows if isinstance(row, Mapping))
        return no_columns(option, first, config.prompt_column, config.response_column)
    named = f"{config.prompt_column or 'by name'}/{config.response_column or 'by name'}"
    return ConfigError(
        f"{option}: no row is left to learn from ({told(counts)}). Check --prompt-column/"
        f"--response-column (now {named}), --max-length (now {config.max_length}) and --truncation "
        f"(now {config.truncation})."
    )


def _problem_of_first(rows: Sequence[Any]) -> str:
    if not isinstance(rows, JsonRows):
        return f"it is a {type(rows[0]).__name__}"
    try:
        return f"line 1 of {rows.path.name} is of type {type(rows.parse(0)).__name__}"
    except (ValueError, RecursionError) as error:
        return f"line 1 of {rows.path.name}: {error}"


def tokenize_rows(
    rows: Sequence[Any], tokenizer: Any, config: RunConfig, option: str = "--data"
) -> TokenizedRows:
    """All rows as examples, in memory; every row is kept or counted.

    Raises:
        ConfigError: if nothing is left.
    """
    import datasets

    check_tokenizer(tokenizer, config)
    columns = columns_of(rows, range(len(rows)), tokenizer, config)
    table = datasets.Dataset.from_dict(columns, features=features())
    kept, counts, forms = count(table)
    if not len(kept):
        raise nothing_left(rows, counts, config, option)
    return TokenizedRows(table, kept, counts, forms, ((option, len(table)),))
