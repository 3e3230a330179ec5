"""Write, read and summarize a run's rows of numbers. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasb_ds.errors import ConfigError

MAX_EXPONENT = 709.0  # of a double
Row = dict[str, Any]
OF_STEPS = ("step", "trained")  # stages in which the adapter is that of a step, as it may be saved
PERPLEXITY = "perplexity"  # beside the loss of tokens
SCORES = ("accuracy", "f1", "matthews", "pearson", "spearman")  # beside the loss of classified rows


def to_line(row: Mapping[str, Any]) -> str:
    """Format a row as a line of ``metrics.jsonl``."""
    return json.dumps(for_json(row), allow_nan=False) + "\n"


def for_json(row: Mapping[str, Any]) -> Row:
    """Return a row with null for nan and infinity, which JSON lacks."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def from_json(row: Mapping[str, Any]) -> Row:
    """Return a row with nan for null."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a ``metrics.jsonl``, with nan for null; [] if there is no file.

    A last line that was cut off, as by a crash, is left out.

    Raises:
        ConfigError: if a line before the last is not a row.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        row = read_row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ConfigError(
                f"{path}, line {number}, is not a JSON object with a step. Fix or remove the line."
            )
    return rows


def read_row(line: bytes) -> Row | None:
    """Parse a line of a ``metrics.jsonl``; return None if it is cut off or not a row."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return from_json(row)


@dataclass(frozen=True)
class Summary:
    """Totals of a run's rows. A loss is nan where there is none."""

    steps: int  # the last one
    seconds: float  # of training
    tokens: int
    padding_share: float  # of all positions of the micro-batches; nan if it was not counted
    skipped: int  # number of steps
    first_loss: float  # of training
    final_loss: float  # the mean over the last tenth of the steps
    base_loss: float  # held out, like the following losses
    init_loss: float
    best_loss: float  # of a step
    best_step: int
    last_loss: float
    memory_bytes: int  # the largest of a training row; 0 if it was not measured

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else math.nan


def summarize(rows: Sequence[Mapping[str, Any]]) -> Summary:
    """Sum up the rows of a run, of training and of evaluations."""
    train = training_rows(rows)
    losses = [row["loss"] for row in train if math.isfinite(row["loss"])]
    counted = [row for row in train if row.get("padding_share", 1) < 1]
    positions = sum(row["tokens"] / (1 - row["padding_share"]) for row in counted)
    tokens = sum(row["tokens"] for row in counted)
    held_out = evaluations(rows)
    base = [row["eval_loss"] for row in held_out if row["stage"] == "base"]
    init = [row["eval_loss"] for row in held_out if row["stage"] == "init"]
    filled = [row for row in held_out if row["stage"] != "base"]
    best = best_evaluation(rows) or {"step": 0, "eval_loss": math.nan}
    return Summary(
        steps=train[-1]["step"] if train else 0,
        seconds=sum(row["step_time_s"] for row in train),
        tokens=sum(row["tokens"] for row in train),
        padding_share=1 - tokens / positions if positions else math.nan,
        skipped=sum(bool(row.get("skipped")) for row in train),
        first_loss=losses[0] if losses else math.nan,
        final_loss=_mean(losses[-math.ceil(len(losses) / 10) :]),
        base_loss=base[-1] if base else math.nan,
        init_loss=init[-1] if init else math.nan,
        best_loss=best["eval_loss"],
        best_step=best["step"],
        last_loss=filled[-1]["eval_loss"] if filled else math.nan,
        memory_bytes=max((row.get("memory_bytes", 0) for row in train), default=0),
    )


def training_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of optimizer steps."""
    return [row for row in rows if "loss" in row]


def evaluations(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows of held-out losses.

    Their ``stage`` says of what: the base, after the init, after a step, or at the end.
    """
    return [row for row in rows if "eval_loss" in row]


def best_evaluation(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Return the evaluation with the lowest loss of a step's adapter; {} if none is finite.

    No adapter is saved right after the init or a re-basing.
    """
    finite = [row for row in _of_steps(rows) if math.isfinite(row["eval_loss"])]
    return dict(min(finite, key=lambda row: row["eval_loss"], default={}))


def evaluation_of(rows: Sequence[Mapping[str, Any]], step: int) -> Row:
    """Return the last evaluation of a step's adapter; only the step if there is none."""
    found = [row for row in _of_steps(rows) if row["step"] == step]
    return dict(found[-1]) if found else {"step": step}


def saved_evaluation(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Row:
    """Return the evaluation of the adapter that a finished run has saved; {} if it is unknown.

    Args:
        run: content of ``run.json``. Where it does not say what was saved, since the run is not
            finished or an earlier version's, it is what the options ask for.
        rows: of ``metrics.jsonl``.
    """
    if isinstance(saved := run.get("saved"), dict):
        return from_json(saved)
    config, found = run.get("config", {}), _of_steps(rows)
    if config.get("load_best_model_at_end") or config.get("early_stopping_patience"):
        return best_evaluation(rows)
    return dict(found[-1]) if found else {}


def saved_loss(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the held-out loss of ``saved_evaluation``; nan if it is unknown."""
    return float(saved_evaluation(run, rows).get("eval_loss", math.nan))


def _of_steps(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in evaluations(rows) if row["stage"] in OF_STEPS]


def as_logged(beside: Mapping[str, float]) -> Row:
    """Return what is told beside a held-out loss by its names in a row: ``eval_accuracy``, …"""
    return {k if k == PERPLEXITY else f"eval_{k}": value for k, value in beside.items()}


def scores_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores in a row of an evaluation, by name; {} of a causal language model."""
    return {name: row[f"eval_{name}"] for name in SCORES if f"eval_{name}" in row}


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``; infinity where a double overflows."""
    return math.inf if loss > MAX_EXPONENT else math.exp(loss)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
