"""Compare runs by their folders. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import METRICS, REPORT, RUN_JSON
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.history import (
    Row,
    Summary,
    evaluations,
    read_rows,
    saved_loss,
    scores_of,
    summarize,
)
from lorasb_ds.system.units import GIB

# Options that do not matter in a comparison: where and how a run was written.
NOT_COMPARED = {"output_dir", "overwrite", "force", "report_to", "template_date"}
COLUMNS = (
    "run",
    "model",
    "data",
    "r",
    "trainable",
    "lr",
    "steps",
    "tokens",
    "time",
    "tokens/s",
    "loss",
    "held-out loss",
    "GiB",
    "",
)


@dataclass(frozen=True)
class Run:
    """The readable content of a run's folder."""

    name: str
    description: Mapping[str, Any]  # run.json
    rows: Sequence[Row]
    problem: str  # why it is not a finished run; empty if it is

    @property
    def options(self) -> dict[str, Any]:
        """Return all options, the accelerator and the number of processes.

        Options that an older version lacks have their defaults. Empty for a broken run.json.
        """
        if not self.description:
            return {}
        config = RunConfig.model_validate({}).model_dump() | self.description.get("config", {})
        chosen = {name: value for name, value in config.items() if name not in NOT_COMPARED}
        on = {"processes": "world_size", "accelerator": "accelerator"}
        return chosen | {name: self.description.get(key) for name, key in on.items()}

    @property
    def loss(self) -> float:
        """Return the held-out loss of the adapter that a finished run has saved; nan if unknown."""
        return saved_loss(self.description, self.rows)

    @property
    def scores(self) -> dict[str, float]:
        """Return a classifier's scores at its last evaluation, by name; {} without."""
        found = evaluations(self.rows)
        return scores_of(found[-1]) if found else {}

    @property
    def peak_memory_bytes(self) -> int:
        """Return rank 0's peak in any phase; from the training rows if the run has not finished."""
        measured = self.description.get("memory", {}).get("measured", {})
        return int(max(summarize(self.rows).memory_bytes, *measured.values(), 0))


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read the runs in some folders, and name them by the shortest names that differ.

    Raises:
        ConfigError: if a folder is not a run's.
    """
    missing = [folder for folder in folders if not (Path(folder) / RUN_JSON).is_file()]
    if missing:
        raise ConfigError(
            *(
                f"{folder} has no run.json. Name the output folder of a `lorasb train` run."
                for folder in missing
            )
        )
    paths = [Path(folder) for folder in dict.fromkeys(folders)]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return [_read(name, path) for name, path in zip(names, paths, strict=True)]


def _read(name: str, folder: Path) -> Run:
    try:
        description = json.loads((folder / RUN_JSON).read_text(encoding="utf-8"))
        if not isinstance(description.get("config"), dict):
            raise ValueError("no config in it")
    except (ValueError, AttributeError) as error:  # not JSON, not an object
        return Run(name, {}, (), f"broken: run.json: {error}")
    try:
        rows = read_rows(folder / METRICS)
        summarize(rows)
    except (ConfigError, KeyError, TypeError) as error:
        return Run(name, description, (), f"broken: {METRICS}: {error}")
    if not rows:
        return Run(name, description, rows, f"no rows in {METRICS}")
    done = (folder / REPORT).is_file()
    return Run(name, description, rows, "" if done else "unfinished")


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Map options that differ between the runs -> their values; None where a run lacks one.

    Runs whose options cannot be read are skipped.
    """
    options = [run.options for run in runs if run.description]
    names = dict.fromkeys(name for chosen in options for name in chosen)
    values = {name: [chosen.get(name) for chosen in options] for name in names}
    return {name: found for name, found in values.items() if any(v != found[0] for v in found)}


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Return a row of text for each run, under ``COLUMNS``; "-" stands for what is unknown."""
    return [_cells(run) for run in runs]


def _sources(data: str | Sequence[str]) -> str:
    """Shorten the sources' names; older versions had one source."""
    sources = [data] if isinstance(data, str) else data
    return " + ".join(Path(str(source).split("?")[0]).name for source in sources)


def _cells(run: Run) -> list[str]:
    config, found = run.description.get("config", {}), summarize(run.rows)
    trainable = run.description.get("trainable_parameters")
    peak = run.peak_memory_bytes
    cells = [
        run.name,
        Path(str(config.get("model", ""))).name,
        _sources(config.get("data", ())),
        str(config.get("r", "")),
        f"{trainable:,}" if trainable else "",
        f"{config['lr']:g}" if "lr" in config else "",
        str(found.steps) if run.rows else "",
        f"{found.tokens:,}" if run.rows else "",
        str(timedelta(seconds=round(found.seconds))) if run.rows else "",
        _number(found.tokens_per_s, ".0f"),
        _number(found.final_loss, ".4f"),
        _held_out(found, run.scores),
        f"{peak / GIB:.2f}" if peak else "",
        run.problem,
    ]
    return [cell or "-" for cell in cells[:-1]] + cells[-1:]


def _held_out(found: Summary, scores: Mapping[str, float]) -> str:
    losses = (found.base_loss, found.init_loss, found.best_loss, found.last_loss)
    if all(map(math.isnan, losses)):
        return ""
    shown = " > ".join(_number(loss, ".4f") or "-" for loss in losses)
    last = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    return f"{shown} ({last})" if last else shown


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def known(value: float) -> float | None:
    """Replace nan and infinity, which JSON lacks, by None."""
    return value if math.isfinite(value) else None


def as_dict(run: Run) -> dict[str, Any]:
    """Return a run's numbers and options for JSON; None where one is unknown."""
    found = summarize(run.rows)
    numbers = {**vars(found), "tokens_per_s": found.tokens_per_s}
    return {
        "run": run.name,
        "problem": run.problem or None,
        "trainable_parameters": run.description.get("trainable_parameters"),
        "peak_memory_bytes": run.peak_memory_bytes or None,
        **{name: known(value) for name, value in numbers.items()},
        "scores": {name: known(value) for name, value in run.scores.items()},
        "options": run.options,
    }
