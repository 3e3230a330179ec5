"""What became of rows: kept, or skipped for which reason; and how many may be skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.formats import NO_COLUMNS, unknown_columns
from lorasb_ds.data.json_rows import JsonRows
from lorasb_ds.data.labelled_rows import UNLABELED, unknown_text_columns
from lorasb_ds.errors import ConfigError

KEPT = "kept"
TRUNCATED = "truncated"  # of those that are kept
SKIPPED = "skipped: "
NOT_JSON = "not a JSON object"
LISTED = 12
ASKED_FOR = "longer than --max-length"  # by --truncation skip: may be any number


@dataclass(frozen=True)
class Outcomes:
    """What became of the rows of one source.

    Attributes:
        counts: how many rows are ``KEPT``, ``TRUNCATED``, or skipped for which reason.
        forms: how many of the rows that are kept have which form.
        first: the first row that is skipped for each reason, counted from 1.
    """

    counts: Counter[str]
    forms: Counter[str]
    first: Mapping[str, int]

    @property
    def num_rows(self) -> int:
        return self.counts.total() - self.counts[TRUNCATED]

    @property
    def skipped(self) -> Counter[str]:
        """How many rows are skipped for which reason, without what a reason has behind a colon."""
        kinds: Counter[str] = Counter()
        for outcome, count in self.counts.items():
            if outcome.startswith(SKIPPED):
                kinds[_kind(outcome)] += count
        return kinds


def _kind(outcome: str) -> str:
    return outcome.removeprefix(SKIPPED).partition(": ")[0]


def listed(counts: Counter[str]) -> str:
    """List counts; of many only the largest, since templates give reasons in their own words."""
    kept = counts if len(counts) <= LISTED else dict(counts.most_common(LISTED))
    rest = counts.total() - sum(kept.values())
    more = f", {rest} for {len(counts) - len(kept)} other reasons" if rest else ""
    return ", ".join(f"{n} {what}" for what, n in kept.items()) + more


def too_many_skipped(
    found: Outcomes, rows: Sequence[Any], options: DataOptions, option: str
) -> ConfigError | None:
    """Return the error if too many rows are skipped: all, or more than --max-skipped-rows."""
    if found.counts[KEPT] == 0:
        return _no_rows_left(found, rows, options, option)
    allowed = options.skippable_rows(found.num_rows)
    too_many = [
        (kind, count)
        for kind, count in found.skipped.most_common()
        if count > allowed and kind != ASKED_FOR
    ]
    if not too_many:
        return None
    first = min(row for outcome, row in found.first.items() if _kind(outcome) == too_many[0][0])
    return ConfigError(
        f"{option}: {too_many[0][1]} of {found.num_rows} rows would be skipped ({too_many[0][0]}), "
        f"and --max-skipped-rows allows {allowed} for one reason. All: {listed(found.counts)}. "
        f"{' '.join(_advice(kind, options) for kind, _ in too_many)} `lorasb data preview --row "
        f"{first}` shows the first of them; --max-skipped-rows {too_many[0][1]} goes on without "
        "them."
    )


def _no_rows_left(
    found: Outcomes, rows: Sequence[Any], options: DataOptions, option: str
) -> ConfigError:
    kinds = [kind for kind, _ in found.skipped.most_common()]
    if kinds == [NOT_JSON]:
        return ConfigError(
            f"{option}: no row is a JSON object; the first is not: {_problem_of_first(rows)}. "
            f"{_advice(NOT_JSON, options)}"
        )
    if not set(kinds) - {NOT_JSON, NO_COLUMNS}:
        first = next(row for row in rows if isinstance(row, Mapping))
        if options.classifies:
            return unknown_text_columns(option, first, options)
        return unknown_columns(option, first, options.prompt_column, options.response_column)
    advice = dict.fromkeys(_advice(kind, options) for kind in kinds)
    return ConfigError(
        f"{option}: no row is left to learn from ({listed(found.counts)}). {' '.join(advice)}"
    )


def _advice(reason: str, options: DataOptions) -> str:
    """Return what to do about rows that are skipped for a reason."""
    columns = (
        "--prompt-column/--response-column (now "
        f"{options.prompt_column or 'by name'}/{options.response_column or 'by name'})"
    )
    cells = f"Fill them in, or check {columns}."
    length = (
        f"Raise --max-length (now {options.max_length}), or choose another --truncation (now "
        f"{options.truncation})."
    )
    by_start = {
        NOT_JSON: "Write an object on each line of a .jsonl file, or an array of them into a .json "
        "file.",
        NO_COLUMNS: f"Check {columns}.",
        ASKED_FOR: length,
        "no response token left": length,
        "no response with a weight": "The rows themselves exclude every response.",
        **dict.fromkeys(("no prompt", "no response", "no text", "no messages"), cells),
        **dict.fromkeys(("no label", "a label that"), cells),
        f"label {UNLABELED}": "Only rows with a label can be learned from, or measured on: of "
        f"GLUE those of train and validation. If {UNLABELED} is a class of yours, rename it.",
        "the chat template": "Change what the template refuses (for some, a turn of the system), "
        "or choose a --model whose template takes it.",
    }
    advice = (text for start, text in by_start.items() if reason.startswith(start))
    return next(advice, "docs/data.md describes the rows that are taken.")


def _problem_of_first(rows: Sequence[Any]) -> str:
    if not isinstance(rows, JsonRows):
        kind = type(rows[0]).__name__
        return "it is not valid JSON" if rows[0] is None else f"it is a {kind}"
    try:
        return f"row 1 of {rows.path.name} is of type {type(rows.parse(0)).__name__}"
    except (ValueError, RecursionError) as error:
        return f"row 1 of {rows.path.name}: {error}"
