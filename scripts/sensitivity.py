#!/usr/bin/env python
"""How much the init depends on its sample: samples of several sizes and seeds, compared.

    scripts/sensitivity.py --samples 8,64,512 --init-seeds 1,2 --output-dir runs/sensitivity \
        --num-procs 2 --eval-data FILE --max-steps 32

Every sample is one `lorasb init` and one `lorasb train --init-from`, on the same rows in the same
batches. Prints the held-out losses of the runs, and how much of their directions two bases share.
The same command goes on where it was stopped.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from launcher.options import CONTEXT, reports_problems
from launcher.text import markdown
from lorasb_ds.config.run_layout import REPORT
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.compare import read_runs
from lorasb_ds.runs.history import summarize

if TYPE_CHECKING:
    from lorasb_ds.export.inspection import Overlaps

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    *("rows", "loss after the init", "loss at the end"),
    *("A, between seeds", "B, between seeds", "A, with most rows", "B, with most rows"),
)


@dataclass(frozen=True)
class Sample:
    """One sample of the init: its number of rows, and the seed that draws them."""

    num_rows: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.num_rows}-rows-s{self.seed}"


def numbers(_context: click.Context, option: click.Parameter, text: str) -> list[int]:
    """Parse ``8,64,512``: ascending, each number once."""
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise click.BadParameter("give whole numbers with commas between", param=option) from None


@click.command(context_settings={**CONTEXT, "ignore_unknown_options": True})
@click.option("--samples", default="8,64,512", show_default=True, callback=numbers)
@click.option("--init-seeds", default="1,2,3", show_default=True, callback=numbers)
@click.option("--output-dir", type=click.Path(path_type=Path), required=True)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@reports_problems
def main(
    samples: Sequence[int], init_seeds: Sequence[int], output_dir: Path, options: Sequence[str]
) -> None:
    """Compare inits from samples of several sizes, each drawn with several seeds.

    Takes the options of `lorasb train` as well; held-out rows (--eval-data or --val-set-size) are
    needed for the losses.
    """
    drawn = [Sample(num_rows, seed) for num_rows in samples for seed in init_seeds]
    if len(drawn) < 2:
        raise ConfigError("One sample cannot be compared. Give --samples or --init-seeds two.")
    losses = {sample: run(sample, output_dir, options) for sample in drawn}
    from lorasb_ds.export.inspection import basis_overlaps  # torch, which --help need not wait for

    overlaps = basis_overlaps([output_dir / sample.name / "init" for sample in drawn])
    click.echo("\n".join(["", *markdown(COLUMNS, table(losses, overlaps)), "", legend(overlaps)]))


def run(sample: Sample, output_dir: Path, options: Sequence[str]) -> tuple[float, float]:
    """Make the init of a sample and train from it, as far as that is not done yet.

    Returns:
        The held-out losses after the init and at the end.
    """
    folders = {verb: output_dir / sample.name / verb for verb in ("init", "train")}
    # `train` checks that an init that is there was made with these options.
    inits = ["init"] if not (folders["init"] / REPORT).is_file() else []
    for verb in (*inits, "train"):
        command = [sys.executable, str(ROOT / "launcher/cli.py"), verb, *options]
        command += ["--init-samples", str(sample.num_rows), "--init-seed", str(sample.seed)]
        command += ["--output-dir", str(folders[verb]), "--resume", "auto"]
        if verb == "train":
            command += ["--init-from", str(folders["init"])]
        click.echo(f"{sample.name}: lorasb {verb}")
        status = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
        if status:
            sys.exit(status)
    (trained,) = read_runs([str(folders["train"])])
    return summarize(trained.rows).init_loss, trained.loss


def table(losses: Mapping[Sample, tuple[float, float]], overlaps: Overlaps) -> list[list[str]]:
    """Make the cells under ``COLUMNS``: a row for each size, "-" where nothing is known.

    Args:
        losses: of all samples, smaller ones first, in the order of the overlaps' rows.
    """
    drawn = list(losses)
    largest = [(i, one) for i, one in enumerate(drawn) if one.num_rows == drawn[-1].num_rows]
    rows = []
    for num_rows in dict.fromkeys(sample.num_rows for sample in drawn):
        own = [(i, one) for i, one in enumerate(drawn) if one.num_rows == num_rows]
        between = [(i, j) for (i, _), (j, _) in combinations(own, 2)]
        with_largest = [(i, j) for i, one in own for j, two in largest if one.seed != two.seed]
        if not with_largest:  # one seed only
            with_largest = [(i, j) for i, _ in own for j, _ in largest if i != j]
        rows.append(
            [
                f"{num_rows:,}",
                *(mean([losses[one][k] for _, one in own], deviation=True) for k in (0, 1)),
                *(mean([side[i][j] for i, j in between]) for side in (overlaps.A, overlaps.B)),
                *(mean([side[i][j] for i, j in with_largest]) for side in (overlaps.A, overlaps.B)),
            ]
        )
    return rows


def mean(values: Sequence[float], deviation: bool = False) -> str:
    if not values or math.isnan(average := statistics.fmean(values)):
        return "-"
    if not deviation:
        return f"{average:.3f}"
    return f"{average:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def legend(overlaps: Overlaps) -> str:
    A, B = overlaps.chance
    return (
        "Losses are held out, mean ± standard deviation over seeds. Overlap: mean squared cosine "
        "of the principal angles between the row spaces of A, or the column spaces of B, averaged "
        f"over layers. It is 1 for the same subspace, and {A:.3f} (A) and {B:.3f} (B) for random "
        "ones. With most rows: with the largest sample, drawn by another seed if there is one."
    )


if __name__ == "__main__":
    main()
