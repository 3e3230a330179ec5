"""How much an init depends on its sample: samples of several sizes, each drawn by several seeds.

Torch-free.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import INIT_REPORT, REPORT
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.compare import known, read_runs
from lorasb_ds.runs.history import summarize

SHARES = "0.0001,0.001,0.005,0.01"  # of the rows: 0.01 %, 0.1 %, 0.5 %, 1 %
MIN_ROWS = 2  # of a sample: one for the gradient, one to measure eta on
SIDES = ("A", "B")
Pair = tuple[float, float]  # of a number for A, and one for B
COLUMNS = (
    "rows",
    "share",
    "loss after the init",
    "loss at the end",
    "A, between seeds",
    "B, between seeds",
    "A, with most rows",
    "B, with most rows",
)
RUN_COLUMNS = ("run", "rows", "seed", "eta", "loss after the init", "loss at the end")


@dataclass(frozen=True)
class Draw:
    """A sample: so many rows, drawn by this seed."""

    num_rows: int
    seed: int

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{self.num_rows}-rows-s{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """As fields of RunConfig."""
        return {"init_samples": self.num_rows, "init_seed": self.seed}


@dataclass(frozen=True)
class Result:
    """What a finished run came to. A loss that is not known is nan.

    Attributes:
        init_lr: eta, given or measured on the sample's held-back rows.
        init_loss: held out, after the init.
        loss: held out, of the adapter.
    """

    draw: Draw
    init_lr: float
    init_loss: float
    loss: float

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.draw.name,
            "num_rows": self.draw.num_rows,
            "seed": self.draw.seed,
            "init_lr": known(self.init_lr),
            "init_loss": known(self.init_loss),
            "loss": known(self.loss),
        }


@dataclass(frozen=True)
class Size:
    """All samples of one size: a row of the table. Overlaps are (A, B), nan where there is none.

    Attributes:
        share: of all rows.
        between: mean overlap of the bases of two of them.
        with_largest: mean overlap of one of them and one of most rows, drawn by another seed (by
            the same one where there is no other).
    """

    num_rows: int
    share: float
    results: Sequence[Result]
    between: Pair
    with_largest: Pair

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        init, final = ([getattr(r, name) for r in self.results] for name in ("init_loss", "loss"))
        return {
            "num_rows": self.num_rows,
            "share": self.share,
            "seeds": [result.draw.seed for result in self.results],
            "init_loss": known(statistics.fmean(init)),
            "init_loss_std": known(_deviation(init)),
            "loss": known(statistics.fmean(final)),
            "loss_std": known(_deviation(final)),
            "overlap_between_seeds": _by_side(self.between),
            "overlap_with_largest": _by_side(self.with_largest),
        }


def sample_sizes(shares: Sequence[float], num_rows: int) -> dict[int, float]:
    """Rows of a sample -> the share that it is of, ascending; the smallest share where several
    come to the same number.

    Raises:
        ConfigError: for shares that are none, or too few rows.
    """
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise ConfigError(
            f"--share {wrong[0]:g} is not a share of the rows: give numbers above 0 and at most 1, "
            f"such as {SHARES}."
        )
    if num_rows < MIN_ROWS:
        raise ConfigError(f"{num_rows} row is too few to draw samples from. Give more rows.")
    sizes: dict[int, float] = {}
    for share in sorted(shares):
        sizes.setdefault(max(MIN_ROWS, round(share * num_rows)), share)
    return sizes


def told_sizes(shares: Sequence[float], num_rows: int) -> list[str]:
    """What every share came to, a sentence each."""
    sizes = sample_sizes(shares, num_rows)
    lines = []
    for share in sorted(set(shares)):
        size = max(MIN_ROWS, round(share * num_rows))
        text = f"{share:.4g} of {num_rows:,} rows: samples of {size:,}"
        if share * num_rows < MIN_ROWS - 0.5:
            text += f" (the fewest that there can be; the share is {share * num_rows:.2g})"
        if sizes[size] != share:
            text += f", as for {sizes[size]:.4g}: taken once"
        lines.append(text)
    return lines


def read_result(folder: Path, draw: Draw) -> Result | None:
    """Of a run's folder; None if that is no finished run."""
    if not (folder / REPORT).is_file():
        return None
    (run,) = read_runs([str(folder)])
    if run.problem:
        return None
    try:
        content = json.loads((folder / INIT_REPORT).read_text(encoding="utf-8"))
        init_lr = float(content["step"]["init_lr"])
    except (OSError, ValueError, LookupError, TypeError):  # a method without a step
        init_lr = math.nan
    return Result(draw, init_lr, summarize(run.rows).init_loss, run.loss)


def by_size(results: Sequence[Result], overlaps: Mapping[str, Any], all_rows: int) -> list[Size]:
    """The rows of the table, fewest rows first.

    Args:
        results: of the runs that have one, in the order of the matrices.
        overlaps: ``A`` and ``B``: (runs, runs), of every pair's bases.
        all_rows: that samples are drawn from, so many.
    """
    numbered = list(enumerate(results))
    numbered.sort(key=lambda entry: entry[1].draw.num_rows)
    groups = [list(group) for _, group in groupby(numbered, lambda e: e[1].draw.num_rows)]
    rows = []
    for group in groups:
        (num_rows,) = {result.draw.num_rows for _, result in group}
        others = [(i, j) for i, one in group for j, two in groups[-1] if _apart(one, two)]
        same_seed = [(i, j) for i, _ in group for j, _ in groups[-1] if i != j]
        rows.append(
            Size(
                num_rows,
                num_rows / all_rows,
                [result for _, result in group],
                _mean_of(overlaps, [(i, j) for i, _ in group for j, _ in group if i < j]),
                _mean_of(overlaps, others or same_seed),
            )
        )
    return rows


def _apart(one: Result, two: Result) -> bool:
    return one.draw.seed != two.draw.seed


def _mean_of(overlaps: Mapping[str, Any], pairs: Sequence[tuple[int, int]]) -> Pair:
    """Over some pairs of runs."""
    if not pairs:
        return math.nan, math.nan
    A, B = (statistics.fmean(overlaps[side][i][j] for i, j in pairs) for side in SIDES)
    return A, B


def table(sizes: Iterable[Size]) -> list[list[str]]:
    """A row of text for each, under ``COLUMNS``; what is not known is a "-"."""
    return [
        [
            f"{size.num_rows:,}",
            f"{100 * size.share:.3g} %",
            _with_deviation([result.init_loss for result in size.results]),
            _with_deviation([result.loss for result in size.results]),
            *(_number(overlap, ".3f") for overlap in (*size.between, *size.with_largest)),
        ]
        for size in sizes
    ]


def run_table(results: Iterable[Result]) -> list[list[str]]:
    """A row of text for each run, under ``RUN_COLUMNS``."""
    return [
        [
            result.draw.name,
            f"{result.draw.num_rows:,}",
            str(result.draw.seed),
            _number(result.init_lr, ".3g"),
            _number(result.init_loss, ".4f"),
            _number(result.loss, ".4f"),
        ]
        for result in results
    ]


def as_dict(
    num_rows: int, results: Sequence[Result], sizes: Iterable[Size], overlaps: Mapping[str, Any]
) -> dict[str, Any]:
    """All numbers.

    Args:
        num_rows: that samples are drawn from.
    """
    return {
        "num_rows": num_rows,
        "sizes": [size.describe() for size in sizes],
        "runs": [result.describe() for result in results],
        "overlaps": {side: overlaps[side] for side in SIDES},  # of every pair of those runs
        "overlap_by_chance": _by_side(overlaps["chance"]),
    }


def _with_deviation(values: Sequence[float]) -> str:
    text = _number(statistics.fmean(values), ".4f")
    return text if len(values) < 2 else f"{text} ± {_number(_deviation(values), '.4f')}"


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation; nan of one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _by_side(pair: Pair) -> dict[str, float | None]:
    return {side: known(value) for side, value in zip(SIDES, pair, strict=True)}


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
