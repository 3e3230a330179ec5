"""What a run writes and shows, and how it continues after a stop."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.progress import Progress, describe, time_left
from lorasb_ds.runs.run_log import RunLog
from tests.runs import ROOT, metrics, small_disk
from tests.unit.runs.test_history import training_row


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Read what TensorBoard would show."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def session_groups(logdir: Path) -> list[Any]:
    """Ask TensorBoard's plugin for what its tab HPARAMS shows: a group for each run."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    backend = Context(TBContext(data_provider=provider, logdir=str(logdir)))
    request = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=99)
    request.allowed_statuses.append(api_pb2.STATUS_UNKNOWN)  # that of a run that may go on
    handler = list_session_groups.Handler(RequestContext(), backend, "", request)
    return list(handler.run().session_groups)


def write_run(folder: Path) -> None:
    """Make the rows of two evaluations and six steps."""
    log = RunLog(folder)
    for stage in ("base", "init"):
        log.write({"step": 0, "stage": stage, "eval_loss": 3.0})
    for step in range(1, 7):
        log.write(training_row(step, 10.0 - step))
        if step == 4:
            log.write({"step": 4, "stage": "step", "eval_loss": 2.5, "perplexity": 12.2})
    log.close()


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(training_row(1, 2.0))
    assert metrics(tmp_path) == log.rows == [training_row(1, 2.0)]
    log.write(training_row(2, float("nan")))
    log.close()
    log.close()
    assert metrics(tmp_path)[1]["loss"] is None
    assert scalars(tmp_path, "train/r_norm") == [(1, 2.0), (2, 2.0)]


def test_a_resumed_run_goes_on_where_its_checkpoint_is(tmp_path: Path) -> None:
    write_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # the process was killed
    log = RunLog(tmp_path, first_step=4)
    kept = [(0, "base"), (0, "init"), (1, None), (2, None), (3, None), (4, None), (4, "step")]
    assert [(row["step"], row.get("stage")) for row in log.rows] == kept
    assert metrics(tmp_path) == log.rows, "nothing is left of the steps to be done again"
    assert not list(tmp_path.glob("*.tmp"))
    for step in (5, 6):
        log.write(training_row(step, 1.0))
    log.close()
    assert [row["step"] for row in log.rows] == [0, 0, 1, 2, 3, 4, 4, 5, 6]
    assert metrics(tmp_path) == log.rows
    found = scalars(tmp_path, "train/loss")
    assert found == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (5, 1.0), (6, 1.0)]


def test_a_run_that_is_resumed_before_its_first_step(tmp_path: Path) -> None:
    write_run(tmp_path)
    log = RunLog(tmp_path, first_step=0)
    log.close()
    assert [row["stage"] for row in log.rows] == ["base", "init"]
    assert scalars(tmp_path, "eval/eval_loss") == [(0, 3.0)]


def test_tensorboard_has_the_options_beside_the_last_values(tmp_path: Path) -> None:
    """A run in the tab for each folder, once, also where it was resumed."""
    for name, lr, last in (("a", 1e-3, 2.0), ("b", 4e-3, 1.5)):
        config = RunConfig(lr=lr, data=("x.jsonl", "y.jsonl"), packing=True).model_dump()
        (tmp_path / name).mkdir()
        for first, loss in ((0, 3.0), (1, last)):
            log = RunLog(tmp_path / name, first_step=first, config=config)
            log.write(training_row(first + 1, loss))
            log.write({"step": first + 1, "stage": "step", "eval_loss": loss / 2})
            log.close()
            # Files of one second and one process are read by their counter as text: 10 before 9.
            time.sleep(1 - time.time() % 1)
    groups = {group.name: group for group in session_groups(tmp_path)}
    assert groups.keys() == {"a/tensorboard", "b/tensorboard"}
    for name, lr, last in (("a", 1e-3, 2.0), ("b", 4e-3, 1.5)):
        options = groups[f"{name}/tensorboard"].hparams
        assert options["lr"].number_value == lr
        assert options["data"].string_value == '"x.jsonl", "y.jsonl"'
        assert options["packing"].string_value == "true"
        assert "output_dir" not in options
        assert "eval_every" not in options, "it was not given"
        values = groups[f"{name}/tensorboard"].metric_values
        found = {value.name.tag: value.value for value in values}
        assert found["eval/eval_loss"] == last / 2
        assert found["train/loss"] == last
    folders = {path.parent for path in tmp_path.rglob("events*")}
    assert folders == {tmp_path / "a/tensorboard", tmp_path / "b/tensorboard"}, "no other runs"


def test_damaged_rows_are_left_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('oops\n{"step": 1}\n')
    with pytest.raises(ConfigError, match="line 1"):
        RunLog(tmp_path, first_step=1)
    assert path.read_text().startswith("oops")


def test_one_step_alone_does_not_tell_the_time() -> None:
    assert time_left(deque([1.0, 1.0, 1.0, 5.0]), 30) == timedelta(minutes=1)


def test_plain_lines_of_the_first_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for step in range(1, 6):
        progress.show(training_row(step, 2.0, memory_bytes=3 << 29), 5)
    progress.say("a message")
    progress.stop()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["step", "1/5"], ["step", "5/5"]]
    for part in ("loss 2.0000", "lr 1.00e-03", "|g| 1.000", "15 tokens/s", "1.50 GiB"):
        assert part in lines[0]
    assert lines[0].endswith("left 0:00:08")
    assert lines[2:] == ["lorasb: a message"]


def test_a_skipped_step_is_marked() -> None:
    assert describe(training_row(1, float("nan"), skipped=True)).endswith("  skipped")
    assert "skipped" not in describe(training_row(1, 1.0, skipped=False))


SCRIPT = """
from lorasb_ds.runs.progress import Progress
progress = Progress()
row = {"loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 15.0, "step_time_s": 2.0}
for step in (1, 2, 3):
    progress.show(row | {"step": step}, 3)
    if step == 2:
        progress.say("saved [bold]checkpoint[/bold] 2")
progress.stop()
progress.say("after")
"""


def test_a_bar_on_a_terminal_and_messages_above_it() -> None:
    """Run it on a pseudo-terminal and read what that receives."""
    ours, theirs = pty.openpty()
    environment: dict[str, Any] = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, stdout=theirs, env=environment, cwd=ROOT) as child:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert child.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    assert "lorasb: saved [bold]checkpoint[/bold] 2" in lines, "as it is, on a line of its own"
    last_bar = [line for line in lines if line.startswith("3/3")][-1]
    assert "left 0:00:00  loss 2.0000" in last_bar
    assert lines[-1] == "lorasb: after"
    assert lines.index(last_bar) > lines.index("lorasb: saved [bold]checkpoint[/bold] 2")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose disk has room for 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder, "64k"):
        yield folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_rows_of_a_full_disk(full_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is written when there is room, once and in order; no line is torn."""
    log = RunLog(full_disk, on_save_error="continue")
    ballast = full_disk / "ballast"
    log.write(training_row(1, 1.0))
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)
    for step in range(2, 60):  # more than fits into what is left of a page
        log.write(training_row(step, 1.0))
        log.write_sample({"step": step, "answer": "a" * 100})
    assert 1 <= len(metrics(full_disk)) < 59
    assert (full_disk / "metrics.jsonl").read_bytes().endswith(b"}\n")
    ballast.unlink()
    log.write(training_row(60, 1.0))
    log.close()
    assert [row["step"] for row in metrics(full_disk)] == list(range(1, 61))
    samples = (full_disk / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == list(range(2, 60))
    output = capsys.readouterr().out
    assert output.count("warning: metrics.jsonl cannot be written: [Errno 28]") == 1
    assert "It is written when there is room, and training goes on" in output


def test_a_full_disk_stops_the_run(full_disk: Path) -> None:
    log = RunLog(full_disk)
    with suppress(OSError), (full_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 512)

    def train() -> None:
        for step in range(1, 60):
            log.write(training_row(step, 1.0))

    with pytest.raises(OSError, match=r"metrics.jsonl cannot be written.*--on-save-error continue"):
        train()
    assert all(row["step"] for row in metrics(full_disk)), "no line is torn"
