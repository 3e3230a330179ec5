"""What the runs of a sweep came to: read from their folders, ranked, as a table. Torch-free."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lorasb_ds.compare import Run, read_runs
from lorasb_ds.history import summarize
from lorasb_ds.plan import GIB
from lorasb_ds.shares import Share
from lorasb_ds.sweep import Sweep, Trial, label, short

EVALUATION = Path("eval", "eval.json")  # in a run's folder
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
    "is. Accuracy: of the same runs together. Time: training without the init, mean of a run. GiB: "
    "most of rank 0."
)


@dataclass(frozen=True)
class Result:
    """A trial's folder, as far as there is one. What is not known is nan, or None."""

    trial: Trial
    finished: bool
    problem: str  # why it is not; empty if it is, or has not begun
    loss: float  # held out, of the adapter
    base_loss: float
    trainable: int | None
    seconds: float  # of training
    init_seconds: float
    memory_bytes: int | None
    accuracy: Share | None

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {
            "loss": self.loss,
            "base_loss": self.base_loss,
            "seconds": self.seconds,
            "init_seconds": self.init_seconds,
        }
        return {
            "name": self.trial.name,
            **asdict(self.trial),
            "finished": self.finished,
            "problem": self.problem or None,
            **{name: _known(value) for name, value in numbers.items()},
            "trainable_parameters": self.trainable,
            "memory_bytes": self.memory_bytes,
            "accuracy": _describe_share(self.accuracy),
        }


@dataclass(frozen=True)
class Outcome:
    """A method with an r: a row of the table.

    Attributes:
        losses: learning rate -> mean held-out loss over the seeds that all of them have; nan where
            there is none.
        best_lr: the one with the least; None if no run has come to an end.
        results: at that learning rate, of all seeds.
    """

    method: str
    r: int | None
    losses: Mapping[float, float]
    best_lr: float | None
    results: Sequence[Result]

    @property
    def edge(self) -> str:
        """Where the best learning rate is at an end of the list, so that it is not tuned."""
        if self.best_lr is None:
            return ""
        if len(self.losses) == 1:
            return "↕"
        at_end = {min(self.losses): "↓", max(self.losses): "↑"}
        return at_end.get(self.best_lr, "")

    @property
    def loss(self) -> float:
        """Over the seeds, at the best learning rate."""
        return _mean(result.loss for result in self.results)

    @property
    def spread(self) -> float:
        """Standard deviation of a seed's loss; nan with one seed."""
        found = [result.loss for result in self.results]
        return statistics.stdev(found) if len(found) > 1 else math.nan

    @property
    def accuracy(self) -> Share | None:
        """Of all seeds together, none of which counts for more than its rows."""
        found = [result.accuracy for result in self.results if result.accuracy is not None]
        if not found:
            return None
        return Share(sum(share.right for share in found), sum(share.rows for share in found))

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
        """For JSON."""
        return {
            "method": self.method,
            "r": self.r,
            "sweep": [{"lr": lr, "loss": _known(loss)} for lr, loss in self.losses.items()],
            "best_lr": self.best_lr,
            "at_edge": {"↓": "lower", "↑": "upper", "↕": "only"}.get(self.edge),
            "runs": [result.trial.name for result in self.results],
            "loss": _known(self.loss),
            "loss_std": _known(self.spread),
            "accuracy": _describe_share(self.accuracy),
            "trainable_parameters": self.trainable,
            "seconds": _known(self.seconds),
            "init_seconds": _known(self.init_seconds),
            "memory_bytes": self.memory_bytes,
        }


def read_result(folder: Path, trial: Trial) -> Result:
    """What the folder of a trial's run says, whatever state it is in."""
    run = Run(trial.name, {}, (), "")
    if (folder / "run.json").is_file():
        (run,) = read_runs([str(folder)])
    found = summarize(run.rows)
    config = run.description.get("config", {})
    takes_best = config.get("load_best_model_at_end") or config.get("early_stopping_patience")
    finished = bool(run.rows) and not run.problem
    return Result(
        trial=trial,
        finished=finished,
        problem=run.problem,
        loss=(found.best_loss if takes_best else found.last_loss) if finished else math.nan,
        base_loss=found.base_loss,
        trainable=run.description.get("trainable_parameters"),
        seconds=found.seconds if finished else math.nan,
        init_seconds=_init_seconds(folder),
        memory_bytes=run.peak_memory_bytes or None,
        accuracy=_accuracy(folder),
    )


def outcomes(sweep: Sweep, results: Mapping[Trial, Result]) -> list[Outcome]:
    """A row for each method and r: the best first, those without a result last."""
    rows = [_outcome(method, r, sweep.lrs[method], results) for method, r in sweep.contenders]
    return sorted(rows, key=lambda row: (math.isnan(row.loss), row.loss))


def ranking(rows: Iterable[Outcome]) -> list[tuple[str, int | None, float]]:
    """``Sweep.then``'s: by the losses that chose the learning rates, which all have seeds for.

    Not by the mean over all seeds, of which the best have more: what is best must not change
    when these are there.
    """
    best = [
        (row.losses[row.best_lr], row.method, row.r, row.best_lr)
        for row in rows
        if row.best_lr is not None
    ]
    return [(method, r, lr) for _, method, r, lr in sorted(best, key=lambda entry: entry[0])]


def _outcome(
    method: str, r: int | None, lrs: Sequence[float], results: Mapping[Trial, Result]
) -> Outcome:
    by_lr: dict[float, dict[int, Result]] = {lr: {} for lr in lrs}
    for trial, result in results.items():
        if (trial.method, trial.r) == (method, r) and math.isfinite(result.loss):
            by_lr.setdefault(trial.lr, {})[trial.seed] = result
    seeds = [set(found) for found in by_lr.values() if found]
    # A mean over other seeds would be compared with one over these.
    common = set.intersection(*seeds) if seeds else set()
    losses = {
        lr: _mean(result.loss for seed, result in found.items() if seed in common or not common)
        for lr, found in by_lr.items()
    }
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    best_lr = min(finite, key=lambda lr: finite[lr]) if finite else None
    chosen = by_lr[best_lr] if best_lr is not None else {}
    return Outcome(method, r, losses, best_lr, list(chosen.values()))


def table(rows: Iterable[Outcome]) -> list[list[str]]:
    """A row of text for each, under ``COLUMNS``; what is not known is a "-"."""
    return [_cells(row) for row in rows]


def _cells(row: Outcome) -> list[str]:
    loss = "" if math.isnan(row.loss) else f"{row.loss:.4f}"
    if loss and len(row.results) > 1:
        loss += f" ± {row.spread:.4f} (n = {len(row.results)})"
    accuracy = row.accuracy
    cells = [
        label(row.method),
        str(row.r or ""),
        f"{row.trainable:,}" if row.trainable else "",
        f"{short(row.best_lr)}{row.edge}" if row.best_lr is not None else "",
        loss,
        _share(accuracy) if accuracy else "",
        _time(row.seconds),
        _time(row.init_seconds),
        f"{row.memory_bytes / GIB:.2f}" if row.memory_bytes else "",
        ", ".join(
            f"{short(lr)}: {'-' if math.isnan(loss) else format(loss, '.4f')}"
            for lr, loss in row.losses.items()
        ),
    ]
    return [cell or "-" for cell in cells]


def as_dict(sweep: Sweep, results: Mapping[Trial, Result]) -> dict[str, Any]:
    """All numbers."""
    return {
        "sweep": sweep.describe(),
        "base_loss": _known(base_loss(results.values())),
        "runs": [result.describe() for result in results.values()],
        "results": [row.describe() for row in outcomes(sweep, results)],
    }


def base_loss(results: Iterable[Result]) -> float:
    """Held out, before any adapter: that of the first run which has one."""
    found = (result.base_loss for result in results if math.isfinite(result.base_loss))
    return next(found, math.nan)


def _init_seconds(folder: Path) -> float:
    try:
        return float(json.loads((folder / "init.json").read_text(encoding="utf-8"))["total_s"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or a method without
        return math.nan


def _accuracy(folder: Path) -> Share | None:
    """The first score of an evaluation: exact match, or accuracy."""
    try:
        content = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        score = next(iter(content["results"][0]["scores"].values()))
        return Share(int(score["right"]), int(score["rows"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None


def _share(accuracy: Share) -> str:
    low, high = accuracy.interval
    return f"{accuracy.share:.1%} ({low:.1%} to {high:.1%})"


def _describe_share(accuracy: Share | None) -> dict[str, Any] | None:
    if accuracy is None:
        return None
    return {**vars(accuracy), "share": accuracy.share, "interval": list(accuracy.interval)}


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.fmean(found) if found else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
