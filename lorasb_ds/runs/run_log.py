"""Log a running run to files, trackers and the console; and describe its provenance."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from lorasb_ds.config.run_layout import ALIGNMENT, METRICS, SAMPLES, TENSORBOARD
from lorasb_ds.runs.history import Row, read_rows, to_line
from lorasb_ds.runs.progress import Progress
from lorasb_ds.runs.tracking import Tracker, tensorboard_options
from lorasb_ds.system.files import append_text, write_text

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "bitsandbytes", "peft", "safetensors")
OnRow = Callable[[Row], object]  # what is done with each row, beside writing it


class RunLog:
    """Write rows to ``metrics.jsonl``, TensorBoard and a tracker, and progress to the console.

    Only rank 0 of a job has one. A row has a ``step``; it is of an evaluation if it has a
    ``stage``, else of training.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int = 0,
        config: Mapping[str, Any] | None = None,
        on_save_error: Literal["stop", "continue"] = "stop",
        on_row: OnRow | None = None,
    ) -> None:
        """Open the files, and start the tracker.

        Args:
            first_step: number of steps that are done. Their rows in the folder are kept; rows of
                later steps, from an earlier process, are removed.
            config: of the run, for TensorBoard and the tracker that its ``report_to`` names; None:
                no tracker.
            on_save_error: "continue": what cannot be written is kept, and written once there is
                room; TensorBoard ends.
            on_row: is called with each row once it is written; what it raises ends the run.
        Raises:
            ConfigError: if ``metrics.jsonl`` is there and damaged.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._on_save_error, self._on_row = folder, on_save_error, on_row
        self._progress = Progress()
        self._warned: set[str] = set()  # files that could not be written
        self._unwritten: defaultdict[str, str] = defaultdict(str)  # of each file
        path = folder / METRICS
        resumed = path.is_file()
        self.rows = _kept(path, first_step)
        write_text(path, "".join(map(to_line, self.rows)))
        if (samples := folder / SAMPLES).is_file():
            write_text(samples, "".join(map(to_line, _kept(samples, first_step))))
        # A run that begins at step 0 measures step 0 itself.
        self.alignment = _kept(folder / ALIGNMENT, first_step or -1)
        if (folder / ALIGNMENT).is_file():
            write_text(folder / ALIGNMENT, "".join(map(to_line, self.alignment)))
        purge_step = first_step + 1 if resumed else None
        self._tensorboard: Any = None
        with self._continues(TENSORBOARD):
            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge_step)
            if config is not None:
                self._tensorboard.file_writer.add_summary(tensorboard_options(config))
        self._tracker: Tracker | None = None
        if config is not None and (package := config["report_to"]) != "none":
            self._try_tracker(lambda: self._start_tracker(package, folder, config))

    def write(self, row: Row) -> None:
        """Write one row; it is flushed to the operating system when this returns.

        Raises:
            OSError: if it cannot be written, unless the run is to go on.
        """
        self.rows.append(row)
        self._append(METRICS, to_line(row))
        group = "train" if "stage" not in row else "base" if row["stage"] == "base" else "eval"
        values = {f"{group}/{k}": v for k, v in row.items() if k not in ("step", "stage")}
        if self._tensorboard is not None:
            with self._continues(TENSORBOARD):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, row["step"])
        if (tracker := self._tracker) is not None:
            self._try_tracker(lambda: tracker.log(values, row["step"]))
        if self._on_row is not None:
            self._on_row(dict(row))

    def write_sample(self, row: Row) -> None:
        """Append a generated answer to ``samples.jsonl``."""
        self._append(SAMPLES, to_line(row))

    def write_alignment(self, rows: list[Row]) -> None:
        """Append the rows of all layers at one step to ``alignment.jsonl``."""
        self.alignment += rows
        self._append(ALIGNMENT, "".join(map(to_line, rows)))

    def progress(self, row: Row, num_steps: int) -> None:
        """Show a training row on the console, by ``Progress.show``."""
        with suppress(OSError):  # a closed terminal must not end a run
            self._progress.show(row, num_steps)
            if row["step"] == num_steps:
                self._progress.stop()

    def say(self, text: str) -> None:
        """Print a message to the user, above the bar if there is one."""
        with suppress(OSError):
            self._progress.say(text)

    def close(self) -> None:
        """Close files and tracker, and stop the bar. A second call does nothing."""
        with suppress(OSError):
            self._progress.stop()
        if (tracker := self._tracker) is not None:
            self._try_tracker(tracker.finish)
            self._tracker = None
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard is not None:
            with self._continues(TENSORBOARD):
                tensorboard.close()
        for name in [name for name, text in self._unwritten.items() if text]:
            self._append(name, "")

    def _append(self, name: str, text: str) -> None:
        """Append to a file, with what could not be written before."""
        self._unwritten[name] += text
        with self._continues(name):
            append_text(self._folder / name, self._unwritten[name])
            self._unwritten[name] = ""

    @contextmanager
    def _continues(self, name: str) -> Iterator[None]:
        """Let the run go on, with one warning for each file, if it is not to stop."""
        try:
            yield
        except OSError as error:
            if self._on_save_error == "stop":
                raise OSError(
                    f"{name} cannot be written: {error}. Free some disk space and give --resume, "
                    "or train on without it by --on-save-error continue."
                ) from error
            if name == TENSORBOARD:
                self._tensorboard = None
            if name not in self._warned:
                self._warned.add(name)
                later = "ends here" if name == TENSORBOARD else "is written when there is room"
                self.say(
                    f"warning: {name} cannot be written: {error}. It {later}, and training goes "
                    "on (--on-save-error continue)"
                )

    def _start_tracker(self, package: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._tracker = Tracker(package, folder, config)

    def _try_tracker(self, action: Callable[[], None]) -> None:
        """Call a tracker; if it fails, warn once and stop using it: the run goes on."""
        try:
            action()
        except Exception as error:  # whatever a tracker raises: no account, no network, …
            self._tracker = None
            self.say(
                f"warning: --report-to: {type(error).__name__}: {error}. Nothing more is sent "
                f"there; {METRICS} has all rows"
            )


def _kept(path: Path, last_step: int) -> list[Row]:
    """Return the rows of a file up to a step; [] if there is no file.

    A re-basing comes after its step's checkpoint, so that a resumed run repeats it.
    """
    rows = [row for row in read_rows(path) if row["step"] <= last_step]
    return [row for row in rows if (row["step"], row.get("stage")) != (last_step, "rebase")]


def provenance() -> dict[str, Any]:
    """Describe what else a run depends on: versions, commit, command, machine.

    Environment variables are left out.
    """
    root = Path(__file__).resolve().parents[2]
    commit = None
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        if shutil.which("git"):
            git = subprocess.run(describe, capture_output=True, text=True, check=False)
            commit = git.stdout.strip() or None
    return {
        "command": sys.argv,
        "git_commit": commit,
        "versions": {
            "lorasb-ds": metadata.version("lorasb-ds"),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
    }
