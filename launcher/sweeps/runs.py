"""Runs of a sweep: each is a `lorasb train` with a name; their common folder can be resumed.

Torch-free.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
from filelock import FileLock, Timeout

from launcher.jobs.launch_options import LaunchOptions
from launcher.paths import WORKERS
from launcher.sweeps.pool import Allocation, Pool, PoolJob
from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.overwriting import check_replaceable, names_in, read_object
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import foreign_to_run
from lorasb_ds.config.stored_paths import with_absolute_paths
from lorasb_ds.errors import ConfigError, option_name
from lorasb_ds.runs.compare import NOT_COMPARED
from lorasb_ds.system.files import write_json

LORASB = (sys.executable, str(WORKERS / "cli.py"))  # by its path: see WORKERS
# Options that do not change the result of a run.
OF_NO_CONSEQUENCE = {*NOT_COMPARED, "save_every", "keep_last", "on_save_error", "profile"}
PARALLEL = click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs at a time on this host.",
)
# In the folder of a sweep.
RUNS = "runs"
NUMBERS, TABLE, LOCK = "compare.json", "compare.md", "compare.lock"


def launch_in(launch: LaunchOptions, allocation: Allocation) -> LaunchOptions:
    """Return the launch options of a job on an allocation."""
    if launch.hostfile is None:
        return launch
    return replace(launch, include=allocation.include, exclude="", num_nodes=None)


def launch_arguments(launch: LaunchOptions, port: int | None) -> list[str]:
    """Return launch options as words of a command line, without those that were not given."""
    return to_arguments(
        launch.given() | {"dry_run": None, "master_port": launch.master_port or port}
    )


def train_command(
    launch: LaunchOptions,
    options: Mapping[str, Any],
    allocation: Allocation,
    port: int | None = None,
) -> list[str]:
    """Return `lorasb train` on an allocation, as an argument list.

    Args:
        options: fields of RunConfig.
    """
    return [
        *(*LORASB, "train"),
        *launch_arguments(launch_in(launch, allocation), port),
        *to_arguments(options),
    ]


def shown(name: str, command: Sequence[str]) -> str:
    """Return a run and its command, as a dry run prints them."""
    return f"{name}: {shlex.join(['lorasb', *command[len(LORASB) :]])}"


def log_of(folder: Path, name: str) -> Path:
    """Return the log of a run of the sweep in ``folder``."""
    return folder / RUNS / f"{name}.log"


@contextmanager
def sweep_folder(
    folder: Path, options: Mapping[str, Any], overwrite: bool, pictures: Sequence[str] = ()
) -> Iterator[None]:
    """Hold the folder of a sweep for this process alone.

    It has a ``compare.json`` from now on, which marks it as the folder of a sweep.

    Args:
        options: all that must be the same when a sweep goes on.
        overwrite: delete what an earlier sweep has left there.
        pictures: names of the pictures that a sweep leaves there.
    Raises:
        ConfigError: if it is not a folder for this sweep, or another process is at work there.
    """
    check_folder(folder, options, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"--output-dir {folder}: another `lorasb compare` is at work there. Wait for its end, "
            "or name another folder."
        ) from None
    with lock:
        if overwrite:
            _remove(folder, [TABLE, *pictures])
        # After all else: if this is killed before, the folder can be overwritten again.
        if overwrite or not (folder / NUMBERS).exists():
            write_json(folder / NUMBERS, {"options": options})
        yield


def stored_options(folder: Path) -> dict[str, Any]:
    """Return the options that a sweep's folder was made with; {} where none are."""
    options = read_object(folder / NUMBERS).get("options")
    return options if isinstance(options, dict) else {}


def check_folder(folder: Path, options: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse a folder that is not one of a sweep, or one of a sweep with other options.

    Raises:
        ConfigError: with what differs.
    """
    kind = "the folder of a comparison"
    check_replaceable("--output-dir", folder, True, _foreign, kind)
    if not (folder / NUMBERS).exists():
        return
    try:
        differ = differing(options, read_object(folder / NUMBERS)["options"])
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            f"--output-dir {folder}: its {NUMBERS} cannot be read. Name another folder."
        ) from None
    if differ and not overwrite:
        raise ConfigError(
            f"--output-dir {folder} has runs with other options:\n"
            + "".join(f"  {line}\n" for line in differ)
            + "Runs are compared with the same options only. Give those again, name another "
            "folder, or delete these runs by --overwrite."
        )


def differing(options: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return a line for each option that differs from before."""
    fields = {name: value for name, value in stored.items() if name in RunConfig.model_fields}
    defaults = json.loads(RunConfig.model_validate(fields).model_dump_json())
    # Those of earlier versions may have relative paths, which are meant from this folder.
    before = {name: stored.get(name, defaults.get(name)) for name in options}
    before = with_absolute_paths(before)
    if "own" in stored:  # methods may be added
        theirs = {method: with_absolute_paths(own) for method, own in stored["own"].items()}
        before["own"] = {**options.get("own", {}), **theirs}
    return _differing(options, before, defaults)


def _differing(
    now: Mapping[str, Any], before: Mapping[str, Any], known: Mapping[str, Any], of: str = ""
) -> list[str]:
    """Name options of a group with it; ``own`` holds the groups of single methods."""
    lines = []
    for name in dict.fromkeys([*now, *before]):
        new, old = now.get(name), before.get(name)
        if isinstance(new, dict) and isinstance(old, dict):
            lines += _differing(new, old, known, of if name == "own" else f" of {name}{of}")
        elif new != old:
            called = option_name(name) if name in known else name
            lines.append(f"{called}{of} is {new!r} now, and was {old!r}")
    return lines


def _foreign(folder: Path) -> list[str]:
    """Return the names in a folder that has no ``compare.json`` of ours, but for the lock."""
    if "processes" in stored_options(folder):
        return []
    return [name for name in names_in(folder) if name != LOCK]


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Remove the runs with their logs, and some files. What is no run stays."""
    runs = folder / RUNS
    for path in [*runs.glob("*")]:
        if path.is_dir() and not foreign_to_run(path):
            shutil.rmtree(path)
            log_of(folder, path.name).unlink(missing_ok=True)
    for log in [*runs.glob("*.log")]:  # of runs that were refused
        log.unlink()
    if runs.is_dir() and not any(runs.iterdir()):
        runs.rmdir()
    for name in names:
        (folder / name).unlink(missing_ok=True)


class PoolRunner:
    """Runs jobs in a pool, and prints how each of them begins and ends."""

    def __init__(self, allocations: Sequence[Allocation]) -> None:
        self.pool = Pool(allocations)
        self.failed: dict[str, str] = {}  # name -> why

    @property
    def stopped(self) -> bool:
        return self.pool.stopped

    def run(self, work: Sequence[PoolJob], ended: Callable[[PoolJob, int, float], None]) -> None:
        """See jobs to their end.

        Args:
            ended: is called with a job, its status as a shell has it, and its seconds.
        """
        total, begun = len(work), iter(range(1, len(work) + 1))

        def began(work: PoolJob, allocation: Allocation) -> None:
            where = f" on {allocation.include}" if allocation.include else ""
            say(f"{work.name} begins ({next(begun)} of {total}){where}")

        if work and not self.stopped:
            self.pool.run(work, began, ended)

    def end(self, work: PoolJob, status: int, seconds: float, came_to: str) -> None:
        """Print how a job has ended, and keep why it has failed.

        Args:
            came_to: what to print of a job that did not fail.
        """
        took = timedelta(seconds=round(seconds))
        if status == 0:
            say(f"{work.name}: {came_to}, {took}")
        elif self.stopped:
            say(f"{work.name}: stopped")
        else:
            self.failed[work.name] = why = errors_in(work.log) or f"status {status}"
            say(f"{work.name} has failed after {took} (log: {work.log}): {why}")


def errors_in(log: Path) -> str:
    """Return the last paragraph in which a job said why it has failed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    _, found, last = text.rpartition("lorasb: error: ")
    return last.partition("\nlorasb: ")[0].strip()[:500] if found else ""


def say(text: str) -> None:
    """Print a line with the time."""
    with suppress(OSError):  # a terminal that was closed
        click.echo(f"{time.strftime('%H:%M:%S')} {text}")
