"""Show a run's progress on the console of rank 0."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lorasb_ds.system.units import GIB

LINE_EVERY_S = 5.0  # without a terminal
ETA_STEPS = 100  # the last steps, whose mean time predicts the time left


class Progress:
    """A bar in a terminal, plain lines elsewhere; messages go above the bar."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._last_line = time.monotonic()
        self._step_times: deque[float] = deque(maxlen=ETA_STEPS)

    def say(self, text: str) -> None:
        """Print a message to the user."""
        if self._bar is None:
            print(f"lorasb: {text}", flush=True)
        else:
            self._bar.console.print(
                f"lorasb: {text}", markup=False, highlight=False, soft_wrap=True
            )

    def show(self, row: Mapping[str, Any], num_steps: int) -> None:
        """Show a training row on the bar; or as a line every few seconds, at the first and last."""
        self._step_times.append(row["step_time_s"])
        step, text = row["step"], describe(row)
        left = time_left(self._step_times, num_steps - step)
        if sys.stdout.isatty():
            self._show_bar(step, num_steps, f"left {left}  {text}")
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_S or step in (1, num_steps):
            self._last_line = now
            print(f"step {step}/{num_steps}  {text}  left {left}", flush=True)

    def stop(self) -> None:
        """Stop the bar where it is; later output goes below it."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show_bar(self, step: int, num_steps: int, text: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        if self._bar is None:
            # In a narrow terminal cut the text, not the count.
            cut = Column(ratio=1, no_wrap=True, overflow="ellipsis")
            text_column = TextColumn("{task.fields[text]}", markup=False, table_column=cut)
            bar = BarColumn(bar_width=20)
            self._bar = RichProgress(MofNCompleteColumn(), bar, text_column, expand=True)
            self._bar.start()
            self._task = self._bar.add_task("train", total=num_steps, text=text)
        self._bar.update(self._task, completed=step, text=text)


def describe(row: Mapping[str, Any]) -> str:
    """Describe a training row on one line."""
    parts = [
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"|g| {row['grad_norm']:.3f}",
        f"{row['tokens_per_s']:.0f} tokens/s",
        f"{row['step_time_s']:.2f} s/step",
    ]
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / GIB:.2f} GiB")
    if row.get("skipped"):
        parts.append("skipped")
    return "  ".join(parts)


def time_left(step_times: deque[float], num_steps: int) -> timedelta:
    """Predict the time left from the mean of the given step times."""
    return timedelta(seconds=round(sum(step_times) / len(step_times) * num_steps))
