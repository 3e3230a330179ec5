"""Runs a comparison: starts its runs, and writes their results. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.verdict import EXIT_REFUSED
from launcher.options import EVAL_FIELDS
from launcher.sweeps.grid import Sweep, Trial, is_file, label
from launcher.sweeps.plots import PICTURES, draw_sweep
from launcher.sweeps.pool import Allocation, PoolJob
from launcher.sweeps.results import EVALUATION, TrialResult, base_loss, read_result
from launcher.sweeps.runs import (
    LORASB,
    NUMBERS,
    RUNS,
    TABLE,
    PoolRunner,
    errors_in,
    launch_arguments,
    launch_in,
    log_of,
    say,
    sweep_folder,
    train_command,
)
from launcher.sweeps.table import COLUMNS, LEGEND, as_dict, method_results, ranking, table
from launcher.text import columns, markdown
from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.run_layout import REPORT
from lorasb_ds.system.files import write_json, write_text
from lorasb_ds.system.signals import EXIT_STOPPED

ASKED = EVALUATION.with_name("asked.json")  # what an evaluation was asked


@dataclass(frozen=True)
class Comparison:
    """What was asked for.

    Args:
        given: options of all runs, fields of RunConfig; what is None was not given.
        own: method -> options of its runs only.
        options: all that must be the same when it is resumed.
    """

    folder: Path
    sweep: Sweep
    launch: LaunchOptions
    given: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]
    eval_samples: int
    max_new_tokens: int | None
    eval_batch_size: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def run_folder(self, trial: Trial) -> Path:
        return self.folder / RUNS / trial.name

    def options_of(self, trial: Trial) -> dict[str, Any]:
        """Return the options of a run, fields of RunConfig."""
        own = {**self.given, **self.own.get(trial.method, {}), **trial.options}
        return {**own, "resume": "auto", "output_dir": str(self.run_folder(trial))}

    def train_command(
        self, trial: Trial, allocation: Allocation, port: int | None = None
    ) -> list[str]:
        return train_command(self.launch, self.options_of(trial), allocation, port)

    def eval_command(
        self, trial: Trial, allocation: Allocation, port: int | None = None
    ) -> list[str]:
        """Return `lorasb eval` for a run, in as many processes as the run had."""
        folder = self.run_folder(trial)
        launch, on = launch_in(self.launch, allocation), to_arguments({"env": self.launch.env})
        if launch.hostfile or (launch.num_procs or launch.num_gpus or 1) > 1:
            on = launch_arguments(replace(launch, max_restarts=0), port)
        given = {name: self.given[name] for name in EVAL_FIELDS if name in self.given}
        asked = {
            "adapter": str(folder),
            "data": self.options["eval_data"],
            "num_samples": self.eval_samples,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.eval_batch_size,
            "output_dir": str((folder / EVALUATION).parent),
            "overwrite": True,
        }
        return [*LORASB, "eval", *on, *to_arguments({**given, **asked})]

    @property
    def questions(self) -> dict[str, Any]:
        """What a run is asked, as it is stored beside its answers."""
        return {"num_samples": self.eval_samples, "max_new_tokens": self.max_new_tokens}

    def has_answered(self, trial: Trial) -> bool:
        folder = self.run_folder(trial)
        with suppress(OSError, ValueError):
            asked = json.loads((folder / ASKED).read_text(encoding="utf-8"))
            return (folder / EVALUATION).is_file() and bool(asked == self.questions)
        return False


def run_comparison(
    comparison: Comparison, allocations: Sequence[Allocation], overwrite: bool
) -> int:
    """Do all runs, and write and print their results.

    Returns:
        The status for the shell: 1 if a run has failed, 75 if it was stopped.
    Raises:
        ConfigError: if the folder is not one for this comparison, or is in use.
    """
    folder, options = comparison.folder, comparison.options
    with sweep_folder(folder, options, overwrite, PICTURES):
        return _ComparisonRunner(comparison, PoolRunner(allocations)).run()


class _ComparisonRunner:
    """Does one stage after the other, and writes what is known after every run."""

    def __init__(self, comparison: Comparison, runner: PoolRunner) -> None:
        self._of, self._runner = comparison, runner

    def run(self) -> int:
        of, runner = self._of, self._runner
        runner.pool.listen()
        self._write()
        first = of.sweep.first()
        self._train(first)
        self._train([trial for trial in self._results() if trial not in first])
        if of.eval_samples:
            self._evaluate()
        self._write(pictures=True)
        self._print()
        if runner.stopped:
            say("stopped: the same command goes on")
            return EXIT_STOPPED
        return 1 if runner.failed else 0

    def _train(self, trials: Sequence[Trial]) -> None:
        """Train those that have no report yet."""
        of = self._of
        due = [trial for trial in trials if not (of.run_folder(trial) / REPORT).is_file()]
        if len(due) < len(trials):
            say(f"{len(trials) - len(due)} of {len(trials)} runs are there already")

        def ended(trial: Trial, work: PoolJob, status: int, seconds: float) -> None:
            loss = read_result(of.run_folder(trial), trial).loss
            self._runner.end(work, status, seconds, f"held-out loss {loss:.4f}")
            self._write()

        self._see_to(due, of.train_command, ended)

    def _evaluate(self) -> None:
        """Evaluate the runs at their best learning rate that have not answered the same before."""
        of = self._of
        rows = method_results(of.sweep, self._results())
        chosen = [result.trial for row in rows for result in row.results]
        refused: set[str] = set()  # methods

        def ended(trial: Trial, work: PoolJob, status: int, seconds: float) -> None:
            if status == EXIT_REFUSED and is_file(trial.method):  # no plain LoRA, as a rule
                if trial.method not in refused:
                    why = " ".join(errors_in(work.log).split())
                    say(f"{label(trial.method)} has no accuracy: {why or f'see {work.log}'}")
                refused.add(trial.method)
                return
            if status == 0:
                write_json(of.run_folder(trial) / ASKED, of.questions)
            accuracy = read_result(of.run_folder(trial), trial).accuracy
            came_to = "no row asks for an answer" if accuracy is None else f"accuracy {accuracy}"
            self._runner.end(work, status, seconds, came_to)
            self._write()

        due = [trial for trial in chosen if not of.has_answered(trial)]
        self._see_to(due, of.eval_command, ended, "answers of ")

    def _see_to(
        self,
        trials: Sequence[Trial],
        command: Callable[[Trial, Allocation, int], list[str]],
        ended: Callable[[Trial, PoolJob, int, float], None],
        what: str = "",
    ) -> None:
        """Run jobs for some trials, which are called ``what`` and the trial's name."""
        by_name = {f"{what}{trial.name}": trial for trial in trials}

        def work(name: str, trial: Trial) -> PoolJob:
            log = log_of(self._of.folder, trial.name)
            return PoolJob(name, lambda allocation, port: command(trial, allocation, port), log)

        self._runner.run(
            [work(name, trial) for name, trial in by_name.items()],
            lambda work, status, seconds: ended(by_name[work.name], work, status, seconds),
        )

    def _results(self) -> dict[Trial, TrialResult]:
        """Return the results of all trials that are known by now, finished or not."""
        sweep, failed = self._of.sweep, self._runner.failed
        found = self._read(sweep.first())
        if any(not result.finished and t.name not in failed for t, result in found.items()):
            return found  # what is best is not known yet
        return found | self._read(sweep.then(ranking(method_results(sweep, found))))

    def _read(self, trials: Iterable[Trial]) -> dict[Trial, TrialResult]:
        found = {}
        for trial in trials:
            result = read_result(self._of.run_folder(trial), trial)
            why = self._runner.failed.get(trial.name)
            found[trial] = replace(result, problem=f"failed: {why}") if why else result
        return found

    def _write(self, pictures: bool = False) -> None:
        """Write ``compare.json`` and ``compare.md``; and the pictures."""
        of, results = self._of, self._results()
        content = {"options": of.options, **as_dict(of.sweep, results)}
        write_json(of.folder / NUMBERS, content)
        rows = method_results(of.sweep, results)
        base = base_loss(results.values())
        drawn = draw_sweep(of.folder, of.folder / RUNS, rows, base) if pictures else []
        lines = ["# Comparison", "", *markdown(COLUMNS, table(rows)), "", LEGEND, ""]
        lines += [f"{note}\n" for note in self._notes(results)]
        lines += [f"![{path.stem.replace('-', ' ')}]({path.name})\n" for path in drawn]
        write_text(of.folder / TABLE, "\n".join(lines))

    def _notes(self, results: Mapping[Trial, TrialResult]) -> list[str]:
        notes = []
        base = base_loss(results.values())
        if math.isfinite(base):
            notes.append(f"Held-out loss of the base: {base:.4f}.")
        missing = [
            f"{trial.name} ({result.problem.partition(':')[0] or 'not begun'})"
            for trial, result in results.items()
            if not result.finished
        ]
        if missing:
            notes.append(f"Not in the table: {', '.join(missing)}.")
        asked_for = {trial.name for trial in results}
        others = {path.name for path in (self._of.folder / RUNS).glob("*/")} - asked_for
        if others:
            notes.append(f"Not asked for now, and not in the table: {', '.join(sorted(others))}.")
        return notes

    def _print(self) -> None:
        """Print the table, and what has failed."""
        of, results, failed = self._of, self._results(), self._runner.failed
        lines = [*columns(COLUMNS, table(method_results(of.sweep, results))), "", LEGEND]
        lines += [*self._notes(results), "", f"table, numbers and pictures: {of.folder}"]
        with suppress(OSError):  # a terminal that was closed
            click.echo("\n".join(["", *lines]))
            if failed:
                click.echo(
                    f"lorasb: error: {len(failed)} of the runs failed: {', '.join(failed)}. Their "
                    f"logs are in {of.folder / RUNS}; the same command tries them again.",
                    err=True,
                )
