"""Rows with a label as the model sees them, and the classes that their labels are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.labelled_rows import parse_classified
from lorasb_ds.data.tokenization import Example
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError

if TYPE_CHECKING:
    from lorasb_ds.data.dataset import TokenizedRows

LISTED = 12  # classes in a list for the user


@dataclass(frozen=True)
class Classes:
    """What labels are: classes, or a number to be predicted.

    Attributes:
        labels: each class's label as JSON has it, in the order of the classes' numbers; () for
            numbers (a regression).
    """

    labels: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Return the number of outputs of the classification head."""
        return len(self.labels) or 1

    @property
    def names(self) -> list[str]:
        """Return the labels as text, for config.json's ``id2label``."""
        values = [json.loads(label) for label in self.labels]
        return [value if isinstance(value, str) else str(value) for value in values]

    def target(self, label: str) -> int | float:
        """Return the number of a label's class, or the number itself.

        Raises:
            ValueError: if it is no class.
        """
        return float(json.loads(label)) if self.is_regression else self.labels.index(label)

    def describe(self) -> str:
        """Return what the user should know of them."""
        if self.is_regression:
            return "labels are numbers: a regression, with the mean squared error as loss"
        more = ", …" if len(self.labels) > LISTED else ""
        return f"{len(self.labels)} classes: {', '.join(self.names[:LISTED])}{more}"


def read_classified(
    row: Any, tokenizer: Any, options: DataOptions
) -> tuple[str, Example, tuple[str, ...]]:
    """Tokenize a row's text, or its pair of texts, as the tokenizer itself does.

    Returns:
        The form; the example, with its label; and the columns that are left out.
    Raises:
        RowError: if the row is to be skipped.
    """
    found = parse_classified(row, options)
    example = replace(_encode(tokenizer, found.texts, options), label=found.label)
    return found.form, example, found.left_out


def _encode(tokenizer: Any, texts: Sequence[str], options: DataOptions) -> Example:
    """Tokenize one text or two, cut to ``--max-length``: of two the longer one first."""
    found = tokenizer(*texts)
    too_long = len(found["input_ids"]) > options.max_length
    if too_long and options.truncation == "skip":
        raise RowError("longer than --max-length")
    if too_long:
        side, tokenizer.truncation_side = tokenizer.truncation_side, options.truncation
        try:
            found = tokenizer(*texts, truncation="longest_first", max_length=options.max_length)
        finally:
            tokenizer.truncation_side = side
    return Example(
        found["input_ids"],
        [],
        truncated=too_long,
        token_type_ids=tuple(found.get("token_type_ids", ())),
    )


def find_classes(rows: TokenizedRows, option: str = "--data") -> Classes:
    """Find the classes of some rows' labels: numbers in their order, then text in the alphabet's.

    If all are numbers, and one has a fraction, it is a regression.

    Raises:
        ConfigError: if all rows have the same label.
    """
    found = [json.loads(label) for label in _distinct(rows)]
    kinds = {type(value) for value in found}
    if float in kinds and str not in kinds:
        return Classes(())
    if len(found) == 1:
        raise ConfigError(
            f"{option}: all {len(rows.index)} rows have the label {found[0]!r}. There is nothing "
            "to learn: give rows of at least two classes."
        )
    in_order = sorted(found, key=lambda value: (isinstance(value, str), value))
    return Classes(tuple(json.dumps(value, ensure_ascii=False) for value in in_order))


def check_labels(rows: TokenizedRows, classes: Classes, option: str) -> None:
    """Refuse rows with a label that is no class.

    Raises:
        ConfigError: naming the label and its row.
    """
    if classes.is_regression:
        texts = [label for label in _distinct(rows) if isinstance(json.loads(label), str)]
    else:
        texts = [label for label in _distinct(rows) if label not in classes.labels]
    if texts:
        column = rows.table.data.column("label").take(rows.index)
        row = rows.row_id(pc.index(column, texts[0]).as_py())
        raise ConfigError(
            f"{option}: the label {texts[0]} of {row} is none of the training rows' "
            f"({classes.describe()}). Correct it, or leave such rows out."
        )


def _distinct(rows: TokenizedRows) -> list[str]:
    labels: list[str] = pc.unique(rows.table.data.column("label").take(rows.index)).to_pylist()
    return labels
