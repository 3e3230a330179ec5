"""Tokenize rows into a table of examples, and count what became of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow.compute as pc

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.classification import Classes, read_classified
from lorasb_ds.data.formats import check_columns, parse_row
from lorasb_ds.data.notes import count_values, notes_on
from lorasb_ds.data.outcomes import KEPT, SKIPPED, TRUNCATED, Outcomes, listed, too_many_skipped
from lorasb_ds.data.sources import source_path
from lorasb_ds.data.tokenization import Example, encode
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError

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
    "left_out": "names",
    "remarks": "names",
    "label": "string",
    "token_type_ids": "list",
}


def tokenize_columns(
    rows: Sequence[Any], indices: Iterable[int], tokenizer: Any, options: DataOptions
) -> dict[str, list[Any]]:
    """Tokenize some rows into the columns of a table: a row's example, or why it is skipped.

    ``digest`` is a hash of ids and labels, to compare examples without reading them.
    """
    read = read_classified if options.classifies else _read_said
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for i in indices:
        example, form, outcome = Example([], []), "", KEPT
        left_out: tuple[str, ...] = ()
        try:
            form, example, left_out = read(rows[i], tokenizer, options)
        except RowError as error:
            outcome = f"{SKIPPED}{error}"
        except RecursionError:
            outcome = f"{SKIPPED}nested too deeply"
        ids, labels = (np.array(x, np.int32) for x in (example.input_ids, example.labels))
        types = np.array(example.token_type_ids, np.int32)
        of_row = types.tobytes() + example.label.encode()
        whole = hashlib.sha256(ids.tobytes() + labels.tobytes() + of_row).digest()
        values = {
            "input_ids": ids,
            "labels": labels,
            "truncated": example.truncated,
            "row": i,
            "outcome": outcome,
            "form": form,
            "length": len(ids),
            "num_labels": example.num_label_tokens,
            "first_label": example.first_label,
            "digest": int.from_bytes(whole[:8], "little", signed=True),
            "left_out": [*left_out, *example.left_out],
            "remarks": list(example.remarks),
            "label": example.label,
            "token_type_ids": types,
        }
        for name, value in values.items():
            columns[name].append(value)
    return columns


def _read_said(
    row: Any, tokenizer: Any, options: DataOptions
) -> tuple[str, Example, tuple[str, ...]]:
    """Tokenize what a row says; returns and raises as ``read_classified``."""
    parsed = parse_row(row, options.prompt_column, options.response_column)
    return parsed.form, encode(tokenizer, parsed.said, options, parsed.tools), parsed.left_out


def features() -> Any:
    import datasets

    lists = {"list": "int32", "names": "string"}
    return datasets.Features(
        {
            name: datasets.List(datasets.Value(lists[t])) if t in lists else datasets.Value(t)
            for name, t in COLUMNS.items()
        }
    )


class Examples(Sequence[Example]):
    """Examples of a table, read one by one; with classes, each has its ``target``."""

    def __init__(self, table: Any, index: np.ndarray, classes: Classes | None = None) -> None:
        self._table, self._index, self._classes = table, index, classes

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
        example = Example(row["input_ids"], row["labels"], row["truncated"])
        if self._classes is None:
            return example
        label, types = row["label"], tuple(row["token_type_ids"])
        target = self._classes.target(label)
        return replace(example, label=label, target=target, token_type_ids=types)


class Found(NamedTuple):
    """Where a row's text was found, and what became of the rest of it."""

    form: str
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class TokenizedRows:
    """Examples, source after source, and what became of every row.

    Attributes:
        table: a ``datasets.Dataset`` with ``COLUMNS``, in order and memory-mapped if large.
        index: (examples,), int64, the examples' rows in the table.
        counts: how many rows are ``kept``, ``truncated`` (also kept), or skipped for which reason.
        forms: how many of the rows that are kept have which form.
        sources: each source as given, and where in the table it ends.
        notes: what the user should know of the rows that are kept; see ``notes.notes_on``.
        classes: what the rows' labels are; None: tokens are learned.
    """

    table: Any
    index: np.ndarray
    counts: Counter[str]
    forms: Counter[str]
    sources: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()
    classes: Classes | None = None

    @property
    def use_template(self) -> bool:
        """Whether any of them is rendered by the chat template: plain text is not."""
        return self.classes is None and set(self.forms) != {"text"}

    @property
    def examples(self) -> Examples:
        return Examples(self.table, self.index, self.classes)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, (examples,), int32."""
        return self._column("length")

    @cached_property
    def num_labels(self) -> np.ndarray:
        """``Example.num_label_tokens`` of each example, (examples,), int32."""
        return self._column("num_labels")

    @cached_property
    def first_labels(self) -> np.ndarray:
        """``Example.first_label`` of each example, (examples,), int32."""
        return self._column("first_label")

    @cached_property
    def digest(self) -> str:
        """Digest of all examples in their order."""
        return hashlib.sha256(self.row_digests.tobytes()).hexdigest()

    @cached_property
    def row_digests(self) -> np.ndarray:
        """Digest of each example's ids and labels, (examples,), int64."""
        return self._column("digest")

    @cached_property
    def row_numbers(self) -> np.ndarray:
        """Each example's row in its source, counted from 1, (examples,), int64."""
        return self._column("row") + 1

    @property
    def source_sizes(self) -> tuple[int, ...]:
        """Number of examples of each source."""
        return tuple(np.bincount(self._source_of(self.index), minlength=len(self.sources)).tolist())

    def row_id(self, i: int) -> str:
        """Return an example's source and row, counted from 1: ``rows.jsonl:17``."""
        at = int(self.index[i])
        source = self.sources[int(self._source_of(np.array([at]))[0])][0]
        name = Path(source).name
        same_name = sum(Path(other).name == name for other, _ in self.sources) > 1
        is_file = not same_name and source_path(source).is_file()
        return f"{name if is_file else source}:{self.row_numbers[i]}"

    def found(self, i: int) -> Found:
        """Return where an example's text was found, and what became of the rest of its row."""
        row = self.table[int(self.index[i])]
        return Found(row["form"], tuple(row["left_out"]), tuple(row["remarks"]))

    def select(self, indices: Sequence[int] | np.ndarray) -> TokenizedRows:
        """Return some of the examples, in this order, without the counts of skipped rows."""
        index = self.index[np.asarray(indices, dtype=np.int64)]
        part = replace(self, index=index, counts=Counter(), forms=Counter())
        part.counts.update({KEPT: len(index), TRUNCATED: int(part._column("truncated").sum())})
        return replace(part, counts=+part.counts)

    def describe(self) -> str:
        by_form = f"; kept by form: {listed(self.forms)}" if len(self.forms) > 1 else ""
        return listed(self.counts) + by_form

    def _column(self, name: str) -> np.ndarray:
        return self.table.data.column(name).to_numpy()[self.index]

    def _source_of(self, index: np.ndarray) -> np.ndarray:
        return np.searchsorted([end for _, end in self.sources], index, side="right")


def outcomes_of(table: Any) -> tuple[np.ndarray, Outcomes]:
    """Return the rows of a table that are kept, and what became of all rows."""
    outcomes = table.data.column("outcome")
    is_kept = pc.equal(outcomes, KEPT)
    counts = count_values(outcomes)
    truncated = int(table.data.column("truncated").to_numpy().sum())
    counts = Counter({KEPT: counts.pop(KEPT, 0), TRUNCATED: truncated}) + counts
    forms = count_values(table.data.column("form").filter(is_kept))
    first = {what: pc.index(outcomes, what).as_py() + 1 for what in counts if what != TRUNCATED}
    return np.flatnonzero(is_kept.to_numpy()), Outcomes(counts, forms, first)


def check_tokenizer(tokenizer: Any, options: DataOptions) -> None:
    """Check columns and tokenizer before rows are tokenized.

    Raises:
        ConfigError: if two columns contradict each other, or the tokenizer is not a fast one.
    """
    check_columns(options.prompt_column, options.response_column)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"--model: the tokenizer ({type(tokenizer).__name__}) does not report which part of a "
            "text a token comes from, so responses cannot be marked. It needs a tokenizer.json: "
            "save_pretrained of the model's fast tokenizer writes one."
        )


def tokenize_rows(
    rows: Sequence[Any], tokenizer: Any, options: DataOptions, option: str = "--data"
) -> TokenizedRows:
    """Tokenize all rows in memory; rows that are skipped are counted.

    Raises:
        ConfigError: if no row is left, or more are skipped than --max-skipped-rows allows.
    """
    import datasets

    check_tokenizer(tokenizer, options)
    columns = tokenize_columns(rows, range(len(rows)), tokenizer, options)
    table = datasets.Dataset.from_dict(columns, features=features())
    kept, found = outcomes_of(table)
    if error := too_many_skipped(found, rows, options, option):
        raise error
    notes = tuple(notes_on(table, kept))
    return TokenizedRows(table, kept, found.counts, found.forms, ((option, len(table)),), notes)
