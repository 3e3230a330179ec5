"""Rows at a tracker: by the installed packages, and by a fake one that records its calls."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.runs.tracking import check_tracker
from tests.runs import ROOT, metrics
from tests.unit.runs.test_history import training_row

# Notes every call in a file; `log` fails when it is told to.
FAKE = """
import json
import os
from pathlib import Path
from types import SimpleNamespace

def note(*call):
    with Path(os.environ["CALLS"]).open("a") as file:
        file.write(json.dumps(call) + "\\n")

def init(**given):
    note("init", given)
    return SimpleNamespace(id="id-1")

def log(values, step):
    note("log", values, step)
    if os.environ.get("FAILS"):
        raise ConnectionError("the server is gone")

def finish():
    note("finish")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a module named trackio that records its calls; return their file."""
    module = tmp_path / "modules" / "trackio.py"
    module.parent.mkdir()
    module.write_text(FAKE)
    monkeypatch.syspath_prepend(module.parent)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    yield tmp_path / "calls"
    sys.modules.pop("trackio", None)


def calls(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run-7"
    folder.mkdir()
    return folder


CONFIG = RunConfig(report_to="trackio", lr=0.25).model_dump()


def test_rows_arrive(fake: Path, folder: Path) -> None:
    check_tracker(RunConfig(report_to="trackio"))
    log = RunLog(folder, config=CONFIG)
    log.write({"step": 0, "stage": "base", "eval_loss": 3.0})
    log.write({"step": 1, "loss": 2.0, "skipped": False})
    log.write({"step": 1, "stage": "trained", "eval_loss": 1.0, "perplexity": 2.7})
    log.close()
    (name, given), *logged, last = calls(fake)
    assert name == "init"
    assert (given["project"], given["name"], given["resume"]) == ("lorasb-ds", "run-7", "never")
    assert given["config"]["lr"] == 0.25
    assert logged == [
        ["log", {"base/eval_loss": 3.0}, 0],
        ["log", {"train/loss": 2.0, "train/skipped": False}, 1],
        ["log", {"eval/eval_loss": 1.0, "eval/perplexity": 2.7}, 1],
    ]
    assert last == ["finish"]


def test_a_resumed_run_is_the_same_run(
    fake: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    RunLog(folder, config=CONFIG).close()
    moved = folder.rename(folder.parent / "moved")
    RunLog(moved, first_step=1, config=CONFIG).close()
    first, _, second, _ = calls(fake)
    assert [call[1]["resume"] for call in (first, second)] == ["never", "allow"]
    assert [call[1]["name"] for call in (first, second)] == ["run-7", "run-7"]
    assert [call[1]["project"] for call in (first, second)] == ["mine", "mine"]


def test_a_tracker_that_fails_is_left_alone(
    fake: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAILS", "1")
    log = RunLog(folder, config=CONFIG)
    for step in (1, 2, 3):
        log.write(training_row(step, 1.0))
    log.close()
    assert [name for name, *_ in calls(fake)] == ["init", "log"]
    assert len(metrics(folder)) == 3
    printed = capsys.readouterr().out
    assert printed.count("warning: --report-to: ConnectionError: the server is gone") == 1


def test_so_is_one_that_does_not_start(
    fake: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CALLS", "/nowhere/calls")
    log = RunLog(folder, config=CONFIG)
    log.write(training_row(1, 1.0))
    log.close()
    assert capsys.readouterr().out.count("warning: --report-to: FileNotFoundError") == 1
    assert len(metrics(folder)) == 1
    assert not (folder / "tracking.json").exists()


def test_no_tracker_unless_asked(fake: Path, folder: Path) -> None:
    config = RunConfig()
    check_tracker(config)
    RunLog(folder, config=config.model_dump()).close()
    RunLog(folder).close()
    assert not fake.exists()


def test_a_missing_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where wandb has left its folder of runs, which Python would import."""
    config = RunConfig(report_to="wandb")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"--report-to wandb needs .*: pip install wandb"):
        check_tracker(config)
    (tmp_path / "wandb").mkdir()
    assert find_spec("wandb") is not None
    with pytest.raises(ConfigError, match=r"pip install wandb"):
        check_tracker(config)


# Two parts of one run, as before and after a stop.
SCRIPT = """
import sys
from pathlib import Path
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.runs.run_log import RunLog
package, folder = sys.argv[1:]
config = RunConfig(report_to=package, lr=0.125).model_dump()
for first in (0, 2):
    log = RunLog(Path(folder), first_step=first, config=config)
    for step in (first + 1, first + 2):
        log.write({"step": step, "loss": 7.0 / step, "grad_norm": float("nan")})
    log.close()
"""


def report(package: str, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, package, str(folder)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "warning: --report-to" not in result.stdout, result.stdout
    return str(json.loads((folder / "tracking.json").read_text())["id"])


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(folder: Path) -> None:
    run_id = report("wandb", folder, WANDB_MODE="offline", WANDB_PROJECT="tried")
    parts = sorted(folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
    assert len(parts) == 2, "one run, in two parts"
    first, second = (part.read_bytes() for part in parts)
    for part in (first, second):
        assert b"train/loss" in part
        assert b"tried" in part
        assert b"0.125" in part
    assert b"3.5" in first
    assert b"1.75" in second


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio(folder: Path, tmp_path: Path) -> None:
    run_id = report("trackio", folder, TRACKIO_DIR=str(tmp_path / "db"), TRACKIO_PROJECT="tried")
    with sqlite3.connect(tmp_path / "db" / "tried.db") as database:
        rows = database.execute("select run_id, step, metrics from metrics order by step")
        found = [(run, step, json.loads(values)["train/loss"]) for run, step, values in rows]
    assert [(run, step) for run, step, _ in found] == [(run_id, step) for step in (1, 2, 3, 4)]
    assert all(math.isclose(loss, 7.0 / step) for _, step, loss in found)
