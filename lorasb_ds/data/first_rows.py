"""Look at the first rows of a source, without a tokenizer: can they be read and learned from?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.data.formats import check_columns, parse_row
from lorasb_ds.data.labelled_rows import parse_classified
from lorasb_ds.data.outcomes import KEPT, SKIPPED, Outcomes, listed, too_many_skipped
from lorasb_ds.data.sources import load_rows
from lorasb_ds.data.turns import RowError

LOOKED_AT = 1000


def describe_first_rows(
    source: str, options: DataOptions, option: str = "--data", *, held_out: bool = False
) -> str:
    """Parse the first rows of a source, and say what they are.

    What a chat template refuses, or a tokenizer cuts, is not seen.

    Raises:
        ConfigError: if the source cannot be read, or ``tokenize_sources`` would refuse it for these
            rows.
    """
    check_columns(options.prompt_column, options.response_column)
    rows = load_rows(source, option, held_out=held_out)
    found = _outcomes(rows, options)
    is_whole = found.num_rows == len(rows)
    if is_whole and (error := too_many_skipped(found, rows, options, f"{option} {source}")):
        raise error
    skipped = found.counts - Counter({KEPT: found.counts[KEPT]})
    of_them = "" if is_whole else f"; of the first {found.num_rows:,}"
    return (
        f"{option} {source}: {len(rows):,} rows{of_them}: {listed(found.forms)}"
        f"{f', {listed(skipped)}' if skipped else ''}"
    )


def _outcomes(rows: Sequence[Any], options: DataOptions) -> Outcomes:
    """Parse ``LOOKED_AT`` rows; all where none is kept, or more are skipped than allowed."""
    allowed = options.skippable_rows(len(rows))
    counts: Counter[str] = Counter()
    forms: Counter[str] = Counter()
    first: dict[str, int] = {}
    for i in range(len(rows)):
        if i >= LOOKED_AT and counts[KEPT] and i - counts[KEPT] <= allowed:
            break
        outcome = KEPT
        try:
            forms[_form(rows[i], options)] += 1
        except RowError as error:
            outcome = f"{SKIPPED}{error}"
        except RecursionError:
            outcome = f"{SKIPPED}nested too deeply"
        counts[outcome] += 1
        first.setdefault(outcome, i + 1)
    return Outcomes(counts, forms, first)


def _form(row: Any, options: DataOptions) -> str:
    if options.classifies:
        return parse_classified(row, options).form
    return parse_row(row, options.prompt_column, options.response_column).form
