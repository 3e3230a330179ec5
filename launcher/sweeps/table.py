"""The table of a sweep: the best learning rate of each method, and the best method. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from launcher.sweeps.grid import Sweep, Trial, label, short
from launcher.sweeps.results import TrialResult, base_loss, describe_accuracy
from lorasb_ds.evaluation.proportions import Proportion
from lorasb_ds.runs.compare import known
from lorasb_ds.system.units import GIB

COLUMNS = (
    "method",
    "r",
    "trainable",
    "best lr",
    "held-out loss",
    "accuracy (95 %)",
    "time",
    "init",
    "GiB",
    "loss of each lr",
)
LEGEND = (
    "Held-out loss: mean ± standard deviation over n seeds at the best learning rate; ↑ and ↓: the "
    "best is the largest or smallest of its list (↕: the only one), and may not be the best there "
    "is; n of m: other seeds have no result. Accuracy: of the same runs together. Time: training "
    "without the init, mean of a run. GiB: most of rank 0."
)


@dataclass(frozen=True)
class Rate:
    """A learning rate of a row, over the seeds that all its learning rates were asked for.

    Attributes:
        loss: held out, mean over the seeds that have a result; nan where there is none.
        seeds: number of seeds that have a result.
        asked: number of all of them.
    """

    loss: float
    seeds: int
    asked: int

    @property
    def order(self) -> tuple[int, float]:
        """Sort key, best first: a rate that fails on a seed comes after those that do not."""
        return -self.seeds, self.loss

    def __str__(self) -> str:
        missing = f" ({self.seeds} of {self.asked})" if 0 < self.seeds < self.asked else ""
        return f"{self.loss:.4f}{missing}" if self.seeds else "-"


@dataclass(frozen=True)
class MethodResult:
    """The results of a method with one r: a row of the table.

    Attributes:
        rates: learning rate -> its results.
        best_lr: the first of those with most seeds and lowest loss; None if no run is finished.
        results: at that learning rate, of all seeds that have one.
        asked: number of seeds of that learning rate, with or without a result.
    """

    method: str
    r: int | None
    rates: Mapping[float, Rate]
    best_lr: float | None
    results: Sequence[TrialResult]
    asked: int

    @property
    def edge(self) -> str:
        """Mark of a best learning rate at an end of its list, where a better one may lie beyond."""
        if self.best_lr is None:
            return ""
        if len(self.rates) == 1:
            return "↕"
        at_end = {min(self.rates): "↓", max(self.rates): "↑"}
        return at_end.get(self.best_lr, "")

    @property
    def loss(self) -> float:
        """Held-out loss, mean over the seeds at the best learning rate."""
        return _mean(result.loss for result in self.results)

    @property
    def spread(self) -> float:
        """Standard deviation of the loss over seeds; nan with one seed."""
        found = [result.loss for result in self.results]
        return statistics.stdev(found) if len(found) > 1 else math.nan

    @property
    def accuracy(self) -> Proportion | None:
        """Accuracy over the rows of all seeds together."""
        found = [result.accuracy for result in self.results if result.accuracy is not None]
        if not found:
            return None
        return Proportion(sum(share.right for share in found), sum(share.rows for share in found))

    @property
    def trainable(self) -> int | None:
        return next((result.trainable for result in self.results), None)

    @property
    def seconds(self) -> float:
        return _mean(result.seconds for result in self.results)

    @property
    def init_seconds(self) -> float:
        return _mean(result.init_seconds for result in self.results)

    @property
    def memory_bytes(self) -> int | None:
        return max((result.memory_bytes or 0 for result in self.results), default=0) or None

    def describe(self) -> dict[str, Any]:
        """Return its numbers, for JSON."""
        return {
            "method": self.method,
            "r": self.r,
            "sweep": [
                {"lr": lr, "loss": known(rate.loss), "seeds": rate.seeds, "seeds_asked": rate.asked}
                for lr, rate in self.rates.items()
            ],
            "best_lr": self.best_lr,
            "at_edge": {"↓": "lower", "↑": "upper", "↕": "only"}.get(self.edge),
            "runs": [result.trial.name for result in self.results],
            "seeds_asked": self.asked,
            "loss": known(self.loss),
            "loss_std": known(self.spread),
            "accuracy": describe_accuracy(self.accuracy),
            "trainable_parameters": self.trainable,
            "seconds": known(self.seconds),
            "init_seconds": known(self.init_seconds),
            "memory_bytes": self.memory_bytes,
        }


def method_results(sweep: Sweep, results: Mapping[Trial, TrialResult]) -> list[MethodResult]:
    """Return a row for each method and r: the best first, those without a result last."""
    rows = [
        _method_result(method, r, sweep.rates(method, r), results) for method, r in sweep.contenders
    ]
    return sorted(rows, key=lambda row: (math.isnan(row.loss), row.loss))


def ranking(rows: Iterable[MethodResult]) -> list[tuple[str, int | None, float]]:
    """Rank methods for ``Sweep.then``, by the losses that chose their learning rates.

    The mean over all seeds would not do: the best have more seeds, and the ranking must not change
    when these are finished.
    """
    best = [
        (row.rates[row.best_lr].loss, row.method, row.r, row.best_lr)
        for row in rows
        if row.best_lr is not None
    ]
    return [(method, r, lr) for _, method, r, lr in sorted(best, key=lambda entry: entry[0])]


def _method_result(
    method: str, r: int | None, lrs: Sequence[float], results: Mapping[Trial, TrialResult]
) -> MethodResult:
    by_lr: dict[float, dict[int, TrialResult]] = {lr: {} for lr in lrs}
    for trial, result in results.items():
        if (trial.method, trial.r) == (method, r):
            by_lr[trial.lr][trial.seed] = result
    # The best have more seeds, and means over different seeds must not be compared.
    compared = set.intersection(*(set(found) for found in by_lr.values()))
    rates = {}
    for lr, found in by_lr.items():
        losses = [found[seed].loss for seed in compared if math.isfinite(found[seed].loss)]
        rates[lr] = Rate(_mean(losses), len(losses), len(compared))
    with_loss = [lr for lr, rate in rates.items() if rate.seeds]
    best_lr = min(with_loss, key=lambda lr: rates[lr].order, default=None)
    chosen = by_lr[best_lr].values() if best_lr is not None else ()
    finished = [result for result in chosen if math.isfinite(result.loss)]
    return MethodResult(method, r, rates, best_lr, finished, len(chosen))


def table(rows: Iterable[MethodResult]) -> list[list[str]]:
    """Return cells under ``COLUMNS`` for each row; "-" stands for what is not known."""
    return [_cells(row) for row in rows]


def _cells(row: MethodResult) -> list[str]:
    loss = "" if math.isnan(row.loss) else f"{row.loss:.4f}"
    if len(row.results) > 1:
        loss += f" ± {row.spread:.4f}"
    if row.asked > 1:
        missing = f" of {row.asked}" if len(row.results) < row.asked else ""
        loss += f" (n = {len(row.results)}{missing})"
    accuracy = row.accuracy
    cells = [
        label(row.method),
        str(row.r or ""),
        f"{row.trainable:,}" if row.trainable else "",
        f"{short(row.best_lr)}{row.edge}" if row.best_lr is not None else "",
        loss,
        _accuracy_text(accuracy) if accuracy else "",
        _time(row.seconds),
        _time(row.init_seconds),
        f"{row.memory_bytes / GIB:.2f}" if row.memory_bytes else "",
        ", ".join(f"{short(lr)}: {rate}" for lr, rate in row.rates.items()),
    ]
    return [cell or "-" for cell in cells]


def as_dict(sweep: Sweep, results: Mapping[Trial, TrialResult]) -> dict[str, Any]:
    """Return all numbers, for JSON."""
    return {
        "sweep": sweep.describe(),
        "base_loss": known(base_loss(results.values())),
        "runs": [result.describe() for result in results.values()],
        "results": [row.describe() for row in method_results(sweep, results)],
    }


def _accuracy_text(accuracy: Proportion) -> str:
    low, high = accuracy.interval
    return f"{accuracy.value:.1%} ({low:.1%} to {high:.1%})"


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else math.nan
