"""`lorasb data preview`: rows as the model sees them, with the tokens that are trained on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import click

from launcher.options import CONTEXT, field_options
from launcher.workers.common import find_home
from launcher.workers.quiet import quiet_libraries
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError

if TYPE_CHECKING:
    from lorasb_ds.data.dataset import TokenizedRows
    from lorasb_ds.data.tokenization import Example


FIELDS = (
    "model",
    "task_type",
    "data",
    "prompt_column",
    "response_column",
    "chat_template",
    "template_date",
    "max_length",
    "loss_on",
    "truncation",
    "max_skipped_rows",
    "dataset_num_proc",
    "trust_remote_code",
)


@click.command(context_settings=CONTEXT)
@field_options(*FIELDS)
@click.option("-n", "--num-rows", type=click.IntRange(min=0), default=3, show_default=True)
@click.option(
    "--row", type=click.IntRange(min=1), help="Show this row of each --data, counted from 1."
)
@click.option("--color/--no-color", default=None, help="[default: color on a terminal]")
def main(num_rows: int, row: int | None, color: bool | None, **given: Any) -> None:
    """Show rows as the model sees them, and statistics of their lengths.

    Tokens that are not trained on are dimmed; without color, those that are stand between ⟦ and ⟧.
    """
    find_home()
    quiet_libraries()
    try:
        config = load_run_config(given)
        color = sys.stdout.isatty() if color is None else color
        for line in preview(config, num_rows, row, color):
            click.echo(line, color=color)
    except ConfigError as error:
        click.echo(f"lorasb: error: {error}", err=True)
        sys.exit(2)


def preview(config: RunConfig, num_rows: int, row: int | None, color: bool) -> Iterator[str]:
    import numpy as np

    from lorasb_ds.data.cache import tokenize_sources
    from lorasb_ds.data.classification import find_classes
    from lorasb_ds.data.template import template_note
    from lorasb_ds.models.base import open_base

    tokenizer = open_base(config)[0].tokenizer
    rows, notes = tokenize_sources(config.data, tokenizer, config, refuse=False)
    if config.classifies:
        try:
            classes = find_classes(rows)
            rows = replace(rows, classes=classes)
            notes.append(classes.describe())
        except ConfigError as error:  # all of one class: they are shown all the same
            notes.append(f"warning: {error}")
    note = template_note(tokenizer) if rows.use_template else None
    yield from [*filter(None, [note]), *notes]
    if row is None:
        chosen = list(range(min(num_rows, len(rows.examples))))
    else:
        chosen = np.flatnonzero(rows.row_numbers == row).tolist()
        yield from why_skipped(config, tokenizer, row)
    for i in chosen:
        example, found = rows.examples[i], rows.found(i)
        left = f"; left out: {', '.join(found.left_out)}" if found.left_out else ""
        learned = f"{example.num_label_tokens} learned"
        if example.label:
            learned = f"label {example.label}"
        yield (
            f"--- {rows.row_id(i)}: {len(example.input_ids)} tokens, {learned}"
            f"{', truncated' if example.truncated else ''}; from {found.form}{left}"
        )
        yield from (f"rows like this one {remark}" for remark in found.remarks)
        yield show(tokenizer, example, color)
    yield "---"
    yield rows.describe()
    yield statistics(rows)


def why_skipped(config: RunConfig, tokenizer: Any, row: int) -> Iterator[str]:
    """Say of each source why it has no such row, or why the row was skipped."""
    from lorasb_ds.data.dataset import tokenize_columns
    from lorasb_ds.data.outcomes import KEPT
    from lorasb_ds.data.sources import load_rows

    for source in config.data:
        rows = load_rows(source)
        if row > len(rows):
            yield f"--- {source} has {len(rows)} rows"
            continue
        outcome = tokenize_columns(rows, [row - 1], tokenizer, config)["outcome"][0]
        if outcome != KEPT:
            yield f"--- {source}:{row}: {outcome}"


def show(tokenizer: Any, example: Example, color: bool) -> str:
    """Return an example's text with special tokens; masked parts dimmed, or the others in ⟦⟧.

    In rows that are classified there is nothing to be marked.
    """
    if example.label:
        return str(tokenizer.decode(example.input_ids))
    shown, end, so_far = "", 0, ""
    for masked, group in groupby(label < 0 for label in example.labels):
        end += len(list(group))
        # Cut out of the whole: alone, a part of a sentencepiece text would lose its first space.
        text = tokenizer.decode(example.input_ids[:end])
        part, so_far = text[len(so_far) :], text
        if color:
            shown += click.style(part, dim=True) if masked else part
        else:
            shown += part if masked else f"⟦{part}⟧"
    return shown


def statistics(rows: TokenizedRows) -> str:
    import numpy as np

    half, most = np.percentile(rows.lengths, [50, 95])
    lengths = (
        f"tokens of a row: {half:.0f} at the median, {most:.0f} at 95 %, {rows.lengths.max()} at "
        "most"
    )
    if rows.classes is not None:
        return lengths
    return f"{lengths}; {rows.num_labels.sum() / rows.lengths.sum():.1%} of all are learned"


if __name__ == "__main__":
    main(prog_name="lorasb data preview")
