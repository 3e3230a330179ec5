"""What `lorasb sensitivity` asks of torch: how many rows there are, and what bases share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from launcher.options import CONTEXT, field_options, reports_problems
from launcher.workers.quiet import quiet_libraries
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig

OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="A JSON file.")


@click.group(context_settings=CONTEXT)
def main() -> None:
    """Parts of `lorasb sensitivity`."""
    quiet_libraries()


@main.command(context_settings=CONTEXT)
@OUT
@field_options(*RunConfig.model_fields)
@reports_problems
def rows(out: Path, **given: Any) -> None:
    """Count the rows that the init's sample of such a run would be drawn from."""
    from lorasb_ds.data.cache import load_data
    from lorasb_ds.models.base import Base

    config = load_run_config(given)
    tokenizer = Base(config.model, config.trust_remote_code).tokenizer
    out.write_text(json.dumps(len(load_data(config, tokenizer).init.examples)))


@main.command(context_settings=CONTEXT)
@OUT
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@reports_problems
def overlaps(out: Path, folders: Sequence[Path]) -> None:
    """Compare the bases in some runs' folders."""
    from lorasb_ds.export.inspection import basis_overlaps

    out.write_text(json.dumps(asdict(basis_overlaps(folders))))


if __name__ == "__main__":
    main(prog_name="lorasb")
