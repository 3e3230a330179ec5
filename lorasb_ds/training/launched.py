"""A run in processes of their own, which `lorasb train` starts and watches. Torch-free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError, JobError
from lorasb_ds.runs.followed_log import FollowedLog
from lorasb_ds.runs.history import Row
from lorasb_ds.runs.result import TrainResult, read_result
from lorasb_ds.system.signals import EXIT_STOPPED, InterruptRequest

# By its path, as the launcher starts its workers: `python -m` would import what is in the working
# directory first. The library does not import it.
LORASB = (sys.executable, str(Path(__file__).resolve().parents[2] / "launcher" / "cli.py"))
EXIT_REFUSED = 2
POLL_S = 0.2
FLUSH_S = 5.0
TIME_TO_SAVE_S = 120.0
LAST_LINES = 100  # of what the command prints; in them is why it has failed


def train_launched(
    make_options: Callable[[], dict[str, Any]],
    launch: Mapping[str, Any],
    on_row: Callable[[Row], object],
) -> TrainResult:
    """Do a run by `lorasb train`, whose output is printed here.

    Args:
        make_options: returns the fields of RunConfig that are asked for, and ``output_dir``.
        launch: options of `lorasb train` that are none of RunConfig's.
    Raises:
        As ``lorasb_ds.train``.
    """
    if "RANK" in os.environ:
        raise ConfigError(
            f"launch starts processes of its own, and this one is rank {os.environ['RANK']} of a "
            "job. Leave launch out to train in that job."
        )
    if refused := [name for name in launch if name in (*RunConfig.model_fields, "dry_run")]:
        raise ConfigError(
            f"launch has {', '.join(refused)}: it takes options of processes and hosts (num_gpus, "
            "hostfile, …). Those of a run go into the RunConfig; a dry run is the command's."
        )
    options = make_options()
    folder = Path(options["output_dir"])
    log = FollowedLog(folder)
    stop = InterruptRequest()
    stop.can_save()
    child = subprocess.Popen(
        [*LORASB, "train", *to_arguments({**options, **launch})],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # a Ctrl-C is passed on once
    )
    assert child.stdout is not None
    said: deque[str] = deque(maxlen=LAST_LINES)
    printing = threading.Thread(target=_print, args=(child.stdout, said), daemon=True)
    printing.start()
    try:
        with stop.listening():
            while child.poll() is None:
                _deliver(log, on_row)
                if stop.requested and child.poll() is None:
                    child.send_signal(signal.SIGINT)
                    child.wait()
                time.sleep(POLL_S)
            _deliver(log, on_row)
    except BaseException:
        _end(child)
        raise
    finally:
        printing.join(FLUSH_S)  # not for ever: some process may hold the pipe
        log.close()
    if child.returncode == EXIT_REFUSED:
        raise ConfigError(_reason(said))
    if child.returncode not in (0, EXIT_STOPPED):
        raise JobError(
            f"`lorasb train` has ended with status {child.returncode}. {_reason(said)}",
            child.returncode,
        )
    return read_result(folder, "finished" if child.returncode == 0 else "stopped")


def _deliver(log: FollowedLog, on_row: Callable[[Row], object]) -> None:
    for row in log.new_rows():
        on_row(row)


def _print(lines: IO[str], said: deque[str]) -> None:
    with lines:
        for line in lines:
            said.append(line)
            with suppress(OSError, ValueError):  # a terminal that was closed
                print(line, end="", flush=True)


def _reason(said: Iterable[str]) -> str:
    """Return what a command has said last, from its first error on."""
    lines = list(said)
    marks = ("lorasb: error: ", "Error: ")  # ours, and click's
    first = next((i for i, line in enumerate(lines) if line.startswith(marks)), -20)
    text = "".join(lines[first:]).strip()
    for mark in marks:
        text = text.removeprefix(mark)
    return text


def _end(child: subprocess.Popen[str]) -> None:
    """End the command, which lets its run save what there is."""
    child.terminate()
    try:
        child.wait(TIME_TO_SAVE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
