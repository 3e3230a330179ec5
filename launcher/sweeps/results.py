"""Results of a sweep's runs, read from their folders. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.sweeps.grid import Trial
from lorasb_ds.config.run_layout import EVAL_RESULT, INIT_REPORT, RUN_JSON
from lorasb_ds.evaluation.proportions import Proportion
from lorasb_ds.runs.compare import Run, known, read_runs
from lorasb_ds.runs.history import summarize

EVALUATION = Path("eval", EVAL_RESULT)  # in a run's folder


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial, as far as its folder has one. What is not known is nan, or None."""

    trial: Trial
    finished: bool
    problem: str  # why it is not; empty if it is, or has not begun
    loss: float  # held out, of the adapter
    base_loss: float
    trainable: int | None
    seconds: float  # of training
    init_seconds: float
    memory_bytes: int | None
    accuracy: Proportion | None

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
            **{name: known(value) for name, value in numbers.items()},
            "trainable_parameters": self.trainable,
            "memory_bytes": self.memory_bytes,
            "accuracy": describe_accuracy(self.accuracy),
        }


def read_result(folder: Path, trial: Trial) -> TrialResult:
    """Read the folder of a trial's run, whatever state it is in."""
    run = Run(trial.name, {}, (), "")
    if (folder / RUN_JSON).is_file():
        (run,) = read_runs([str(folder)])
    found = summarize(run.rows)
    finished = bool(run.rows) and not run.problem
    return TrialResult(
        trial=trial,
        finished=finished,
        problem=run.problem,
        loss=run.loss if finished else math.nan,
        base_loss=found.base_loss,
        trainable=run.description.get("trainable_parameters"),
        seconds=found.seconds if finished else math.nan,
        init_seconds=_init_seconds(folder),
        memory_bytes=run.peak_memory_bytes or None,
        accuracy=_accuracy(folder),
    )


def base_loss(results: Iterable[TrialResult]) -> float:
    """Return the held-out loss of the base, from the first run that has it; nan if none has."""
    found = (result.base_loss for result in results if math.isfinite(result.base_loss))
    return next(found, math.nan)


def _init_seconds(folder: Path) -> float:
    try:
        return float(json.loads((folder / INIT_REPORT).read_text(encoding="utf-8"))["total_s"])
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or a method without
        return math.nan


def _accuracy(folder: Path) -> Proportion | None:
    """Return the first score of an evaluation: exact match, or accuracy."""
    try:
        content = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
        score = next(iter(content["results"][0]["scores"].values()))
        return Proportion(int(score["right"]), int(score["rows"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return None


def describe_accuracy(accuracy: Proportion | None) -> dict[str, Any] | None:
    """For JSON."""
    if accuracy is None:
        return None
    return {**vars(accuracy), "share": accuracy.value, "interval": list(accuracy.interval)}
