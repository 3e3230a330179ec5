"""A sensitivity study at work: samples are drawn, trained on, compared and told of. Torch-free.

What needs torch, rows that are counted and bases that are compared, sensitivity.py does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launcher.jobs.launch_options import LaunchOptions
from launcher.jobs.ranks import run_here, worker_command
from launcher.sweeps.plots import draw_sensitivity
from launcher.sweeps.pool import Work
from launcher.sweeps.runs import RUNS, Conductor, log_of, say, train_command
from launcher.sweeps.sensitivity import (
    COLUMNS,
    RUN_COLUMNS,
    Draw,
    Result,
    as_dict,
    by_size,
    read_result,
    run_table,
    sample_sizes,
    table,
    told_sizes,
)
from launcher.text import columns, markdown
from lorasb_ds.system.files import write_json, write_text
from lorasb_ds.system.signals import EXIT_STOPPED

COMMAND = "sensitivity"
JSON, MARKDOWN, PICTURE = (f"{COMMAND}.{suffix}" for suffix in ("json", "md", "png"))


@dataclass(frozen=True)
class Study:
    """What was asked for.

    Args:
        given: options of all runs, fields of RunConfig; what is None was not given.
    """

    folder: Path
    launch: LaunchOptions
    given: Mapping[str, Any]
    shares: tuple[float, ...]
    seeds: tuple[int, ...]

    def run_folder(self, draw: Draw) -> Path:
        return self.folder / RUNS / draw.name

    def options_of(self, draw: Draw) -> dict[str, Any]:
        """Of a run, as fields of RunConfig."""
        folder = str(self.run_folder(draw))
        return {**self.given, **draw.options, "resume": "auto", "output_dir": folder}

    def draws(self, num_rows: int) -> list[Draw]:
        """All samples, of rows that are so many."""
        sizes = sample_sizes(self.shares, num_rows)
        return [Draw(size, seed) for size in sizes for seed in self.seeds]

    def results(self, draws: Sequence[Draw]) -> list[Result]:
        """Of the runs that have come to their end."""
        found = (read_result(self.run_folder(draw), draw) for draw in draws)
        return [result for result in found if result is not None]


def ask(question: str, arguments: Sequence[str]) -> Any:
    """What sensitivity.py answers, in a process of its own; ends with its status if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "answer.json"
        command = worker_command(COMMAND, [question, "--out", str(out), *arguments])
        # The rows that `lorasb train` sees: some tasks of reasoning-gym depend on the hash seed.
        if status := run_here(command, {"PYTHONHASHSEED": "0", **os.environ}):
            sys.exit(status)
        return json.loads(out.read_text())


def run_study(study: Study, options: Mapping[str, Any], num_rows: int, conductor: Conductor) -> int:
    """All runs, and what they came to.

    Args:
        num_rows: that samples are drawn from.
    Returns:
        The status for the shell: 1 if a run has failed, 75 if it was stopped.
    """
    draws = study.draws(num_rows)
    by_name = {draw.name: draw for draw in draws}
    due = [draw for draw in draws if read_result(study.run_folder(draw), draw) is None]
    if len(due) < len(draws):
        say(f"{len(draws) - len(due)} of {len(draws)} runs have come to their end before")

    def work_of(draw: Draw) -> Work:
        given = study.options_of(draw)
        return Work(
            name=draw.name,
            command=lambda place, port: train_command(study.launch, given, place, port),
            log=log_of(study.folder, draw.name),
        )

    def ended(work: Work, status: int, seconds: float) -> None:
        result = read_result(study.run_folder(by_name[work.name]), by_name[work.name])
        loss = f"held-out loss {result.loss:.4f}" if result else "no result"
        conductor.end(work, status, seconds, loss)

    conductor.pool.listen()
    conductor.run([work_of(draw) for draw in due], ended)
    if conductor.stopped:
        say("stopped: the same command goes on")
        return EXIT_STOPPED
    if len(results := study.results(draws)) > 1:
        _tell(study, options, num_rows, results)
    if conductor.failed:
        click.echo(
            f"lorasb: error: {len(conductor.failed)} of the runs have failed: "
            f"{', '.join(conductor.failed)}. Their logs are in {study.folder / RUNS}; the same "
            "command tries them again.",
            err=True,
        )
    return 1 if conductor.failed else 0


def _tell(
    study: Study, options: Mapping[str, Any], num_rows: int, results: Sequence[Result]
) -> None:
    """Tables, numbers and the picture."""
    overlaps = ask("overlaps", [str(study.run_folder(result.draw)) for result in results])
    sizes = by_size(results, overlaps, num_rows)
    numbers = as_dict(num_rows, results, sizes, overlaps)
    write_json(study.folder / JSON, {"options": options, **numbers})
    draw_sensitivity(study.folder / PICTURE, sizes, overlaps["chance"])
    about = legend(overlaps["chance"])
    lines = [
        f"# Sensitivity of the init: {options['method']}, r = {options['r']}",
        "",
        *markdown(COLUMNS, table(sizes)),
        "",
        about,
        "",
        *(f"- {line}" for line in told_sizes(study.shares, num_rows)),
        "",
        f"![overlaps and losses]({PICTURE})",
        "",
        *markdown(RUN_COLUMNS, run_table(results)),
    ]
    write_text(study.folder / MARKDOWN, "\n".join(lines) + "\n")
    click.echo("\n".join(["", *columns(COLUMNS, table(sizes)), "", about]))
    click.echo(f"\ntables, numbers and picture: {study.folder}")


def legend(chance: Sequence[float]) -> str:
    """What the columns mean."""
    return (
        "Losses are held out: mean ± standard deviation over seeds. Overlap: the mean squared "
        "cosine of the principal angles between the subspaces that rows of A, or columns of B, "
        "span, mean over layers. It is 1 for the same subspace, and "
        f"{chance[0]:.3f} (A) and {chance[1]:.3f} (B) for random ones. With most rows: with a "
        "basis of the largest sample, drawn by another seed if there is one."
    )
