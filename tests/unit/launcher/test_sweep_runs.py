"""The folder of a sweep, the commands of its runs, and why one has failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.jobs.launch_options import LaunchOptions
from launcher.sweeps.pool import Allocation
from launcher.sweeps.runs import (
    RUNS,
    check_folder,
    differing,
    errors_in,
    sweep_folder,
    train_command,
)
from lorasb_ds.errors import ConfigError
from tests.runs import made_up_run

OPTIONS: dict[str, Any] = {"r": 4, "lr": 1e-3, "init_data": ["a.jsonl"], "processes": 2}


def test_the_folder_of_a_sweep(tmp_path: Path) -> None:
    """Goes on with the same options, and is refused with others; --overwrite starts anew."""
    folder = tmp_path / "study"
    pictures = ["loss-over-lr.png"]
    with sweep_folder(folder, OPTIONS, overwrite=False):
        (folder / RUNS / "one").mkdir(parents=True)
        for name in ("mine.txt", "mine.png", "compare.md", *pictures):
            (folder / name).write_text("not theirs, or theirs")
        with (
            pytest.raises(ConfigError, match="another `lorasb compare` is at work there"),
            sweep_folder(folder, OPTIONS, overwrite=False),
        ):
            pass
    with sweep_folder(folder, OPTIONS, overwrite=False):
        assert (folder / RUNS).is_dir()
    other = OPTIONS | {"r": 8, "processes": 1, "init_data": None}
    with pytest.raises(ConfigError) as error:
        check_folder(folder, other, overwrite=False)
    message = str(error.value)
    assert "--r is 8 now, and was 4\n" in message
    assert "processes is 1 now, and was 2\n" in message
    assert "--init-data is None now, and was ['a.jsonl']\n" in message
    assert "--lr" not in message
    with sweep_folder(folder, other, True, pictures):
        left = {path.name for path in folder.iterdir()} - {"compare.lock"}
        assert left == {"mine.txt", "mine.png", "compare.json"}
    check_folder(folder, other, overwrite=False)
    (folder / "compare.json").unlink()
    with pytest.raises(ConfigError, match="is not empty, and is not the folder of a comparison"):
        check_folder(folder, other, overwrite=True)
    with pytest.raises(ConfigError, match="is a file"):
        check_folder(folder / "mine.txt", other, overwrite=True)


def test_only_runs_are_removed(tmp_path: Path) -> None:
    """With their logs. What is no run of ours stays where it is."""
    with sweep_folder(tmp_path, OPTIONS, overwrite=False):
        made_up_run(tmp_path / RUNS / "one")
        (tmp_path / RUNS / "early" / "launch").mkdir(parents=True)
        (tmp_path / RUNS / "theirs" / "checkpoints").mkdir(parents=True)
        for name in ("one.log", "refused.log", "notes.txt"):
            (tmp_path / RUNS / name).touch()
    with sweep_folder(tmp_path, OPTIONS, overwrite=True):
        assert {path.name for path in (tmp_path / RUNS).iterdir()} == {"theirs", "notes.txt"}
        assert (tmp_path / RUNS / "theirs" / "checkpoints").is_dir()
    for content in ("{}", "[]", '{"options": {"r": 4}}', "no JSON"):
        (tmp_path / "compare.json").write_text(content)
        with pytest.raises(ConfigError, match=r"is not the folder of a comparison.*compare\.json"):
            check_folder(tmp_path, OPTIONS, overwrite=True)


def test_earlier_folders_have_relative_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are those of this folder, from which they were given."""
    (tmp_path / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    now = OPTIONS | {"init_data": [str(tmp_path / "a.jsonl")], "model": "org/name"}
    assert differing(now, now | {"init_data": ["a.jsonl"]}) == []
    assert differing(now, now | {"init_data": ["b.jsonl"], "model": "org/other"}) != []


def test_what_was_overwritten_in_part_can_be_overwritten(tmp_path: Path) -> None:
    """The removal fails half-way, as if it was killed there."""
    with sweep_folder(tmp_path, OPTIONS, overwrite=False):
        (tmp_path / "compare.md").mkdir()  # which is no file to be removed
        (tmp_path / RUNS).mkdir()
    other = OPTIONS | {"r": 8}
    with pytest.raises(OSError), sweep_folder(tmp_path, other, True):  # noqa: PT011
        pass
    assert not (tmp_path / RUNS).exists()
    with pytest.raises(ConfigError, match="--r is 8 now, and was 4"):
        check_folder(tmp_path, other, overwrite=False)
    (tmp_path / "compare.md").rmdir()
    with sweep_folder(tmp_path, other, overwrite=True):
        check_folder(tmp_path, other, overwrite=False)


def test_commands_of_runs() -> None:
    """As they would be typed, on this host and on one of a hostfile."""
    values: dict[str, Any] = dict.fromkeys(LaunchOptions.__dataclass_fields__)
    values |= {"include": "", "exclude": "b", "launcher": "pdsh", "launcher_args": ""}
    values |= {"env": (), "no_ssh": False, "allow_fewer_hosts": False, "skip_preflight": False}
    values |= {"failure_timeout": 60.0, "start_timeout": 600.0, "max_restarts": 2, "dry_run": True}
    here = LaunchOptions(**values | {"num_procs": 2, "exclude": ""})
    options = {"init_samples": 8, "init_seed": 1, "lr": None, "init_data": ("a", "b")}
    words = train_command(here, options, Allocation(), 29501)
    assert " ".join(words[2:]) == (
        "train --num-procs 2 --max-restarts 2 --master-port 29501 --init-samples 8 --init-seed 1 "
        "--init-data a --init-data b"
    )
    several = LaunchOptions(**values | {"hostfile": "hosts", "num_nodes": 2})
    words = train_command(several, {}, Allocation(include="a:0,1"))
    assert " ".join(words[2:]) == "train --hostfile hosts --include a:0,1 --max-restarts 2"


def test_why_a_run_has_failed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert errors_in(log) == ""
    log.write_text("step 1\nlorasb: error: first\nlorasb: restart 1\nlorasb: error: last,\nmore\n")
    assert errors_in(log) == "last,\nmore"
