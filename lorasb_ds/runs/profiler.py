"""Profile a few steps: a trace to look at, and a table of the most expensive operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from lorasb_ds.config.run_layout import PROFILE, PROFILE_ASIDE
from lorasb_ds.distributed import accelerator
from lorasb_ds.runs.output_dir import say
from lorasb_ds.system.files import publish

ROWS = 10


@contextmanager
def profiled(folder: Path, num_steps: int | None) -> Iterator[Callable[[], None]]:
    """Profile steps after the first one, which is a warm-up, and write the profile after them.

    Args:
        num_steps: to profile; None: do nothing.
    Yields:
        A function to call at the end of every step.
    """
    if num_steps is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if accelerator.name() == "cuda":
        activities.append(ProfilerActivity.CUDA)
    path = folder / PROFILE
    path.unlink(missing_ok=True)
    with profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=lambda done: _write(done, folder),
        acc_events=True,
    ) as profiler:
        yield profiler.step
    if not path.exists():
        say("no profile: the first step is a warm-up, and there was no other")


def _write(done: Any, folder: Path) -> None:
    if done.step_num < 2:
        return  # the run ended with the warm-up
    aside = folder / PROFILE_ASIDE
    done.export_chrome_trace(str(aside))
    publish(aside, folder / PROFILE)
    say(
        f"profile: {folder / PROFILE} (open it in https://ui.perfetto.dev or chrome://tracing)\n"
        + most_expensive(done.key_averages())
    )


def most_expensive(events: Any) -> str:
    """Return a table of the operations that take most time themselves, with their shares of it."""
    attribute = "self_cpu_time_total"
    if any(event.self_device_time_total > 0 for event in events):
        attribute = "self_device_time_total"
    of = {event.key: getattr(event, attribute) for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(of.values()) or 1.0
    lines = [f"{'share':>6}  {'calls':>7}  operation"]
    for key in sorted(of, key=lambda key: -of[key])[:ROWS]:
        lines.append(f"{of[key] / total:6.1%}  {calls[key]:7,}  {key}")
    return "\n".join(lines)
