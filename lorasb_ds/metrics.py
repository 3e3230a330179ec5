"""What a run tells while it runs: metrics.jsonl, TensorBoard, progress; and where it comes from."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "bitsandbytes", "peft", "safetensors")
LINE_EVERY_S = 5.0  # plain progress lines, where there is no terminal


class RunLog:
    """Rows of numbers to ``metrics.jsonl`` and TensorBoard, and the progress to the console.

    One process of a job makes one (rank 0); the others make none.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self._start = self._last_line = time.monotonic()
        self._progress: Any = None
        self.rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        """One row; it is on disk when this returns, as far as the operating system is concerned."""
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        group = "train" if "stage" not in row else "base" if row["stage"] == "base" else "eval"
        for key, value in row.items():
            if key not in ("step", "stage"):
                self._tensorboard.add_scalar(f"{group}/{key}", value, row["step"])

    def write_sample(self, row: dict[str, Any]) -> None:
        """A generated answer, to ``samples.jsonl``."""
        with (self._folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def progress(self, row: dict[str, Any], num_steps: int) -> None:
        """Show a training row: a bar in a terminal, else a line now and then and at the end."""
        text = (
            f"loss {row['loss']:.4f}  lr {row['lr']:.2e}  |g| {row['grad_norm']:.3f}  "
            f"{row['tokens_per_s']:.0f} tokens/s"
        )
        if sys.stdout.isatty():
            self._bar(row["step"], num_steps, text)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S or row["step"] in (1, num_steps):
            self._last_line = now
            eta = timedelta(seconds=round(row["step_time_s"] * (num_steps - row["step"])))
            print(f"step {row['step']}/{num_steps}  {text}  left {eta}", flush=True)

    def _bar(self, step: int, num_steps: int, text: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        if self._progress is None:
            columns = (
                MofNCompleteColumn(),
                BarColumn(),
                Remaining(),
                TextColumn("{task.fields[text]}"),
            )
            self._progress = Progress(*columns)
            self._progress.start()
            self._task = self._progress.add_task("train", total=num_steps, text=text)
        self._progress.update(self._task, completed=step, text=text)
        if step == num_steps:
            self._progress.stop()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._tensorboard.close()


def provenance() -> dict[str, Any]:
    """What else a run depends on: versions, commit, command, machine. No environment variables."""
    root = Path(__file__).resolve().parent.parent
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
