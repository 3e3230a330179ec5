"""The command line: options, the argument list of DeepSpeed, and refusals with status 2."""

from __future__ import annotations

import os
import shlex
from datetime import date
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from deepspeed.launcher.runner import fetch_hostfile

from launcher.cli import main
from launcher.jobs.command import job_environment, local_command, visible_gpus
from launcher.workers.common import (
    ALLOCATOR_VARIABLES,
    check_shared_memory,
    set_device_variables,
)
from lorasb_ds.config.data_options import DEMO_DATA
from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import check_output_dir, launcher_files
from lorasb_ds.errors import ConfigError, option_name
from tests.runs import word_rows, write_jsonl


def test_local_command() -> None:
    command = local_command(["--r", "8"], count=2, master_port=1234, python="/env/bin/python")
    assert command[:3] == ["/env/bin/python", "-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_accelerators") + 1] == "2"
    assert command[command.index("--master_port") + 1] == "1234"
    script = next(i for i, word in enumerate(command) if word.endswith("launcher/jobs/agent.py"))
    assert command[script + 1 :] == ["--r", "8"]


def test_all_gpus_when_no_number_is_given() -> None:
    command = local_command([], count=None, master_port=1)
    assert "--num_accelerators" not in command


def test_only_this_host_whatever_lies_in_job_hostfile() -> None:
    command = local_command([], count=None, master_port=1)
    assert fetch_hostfile(command[command.index("--hostfile") + 1]) is None


def test_environment() -> None:
    cpu = job_environment({"PATH": "/usr/bin"}, 2, None, num_cores=8)
    assert (cpu["DS_ACCELERATOR"], cpu["OMP_NUM_THREADS"]) == ("cpu", "4")
    assert cpu["PATH"].endswith(":/usr/bin")
    assert job_environment({"OMP_NUM_THREADS": "3"}, 2, None, 8)["OMP_NUM_THREADS"] == "3"
    assert cpu["PYTHONHASHSEED"] == "0", "generated rows are the same on every rank"
    assert "DS_ACCELERATOR" not in job_environment({}, None, 2, num_cores=8)


def test_visible_gpus_are_kept() -> None:
    assert visible_gpus({}, 2) is None
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4,5,6"}, 2) == "4,5"
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4,5"}, None) == "4,5"
    with pytest.raises(ConfigError, match=r"--num-gpus 3.*CUDA_VISIBLE_DEVICES=4,5 shows 2"):
        visible_gpus({"CUDA_VISIBLE_DEVICES": "4,5"}, 3)
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    assert job_environment(given, None, 2, 8)["CUDA_VISIBLE_DEVICES"] == "4,5"


def _count(command: list[str]) -> str:
    return command[command.index("--num_accelerators") + 1]


@pytest.mark.parametrize("names", ["GPU-8f2b,GPU-91c4,GPU-02d7", "MIG-1a,MIG-2b,MIG-3c"])
def test_gpus_with_other_names_than_numbers(monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    """DeepSpeed's launcher gets a count, and the workers the names."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert _count(dry_run()) == "3"
    assert _count(dry_run("--num-gpus", "2")) == "2"
    job = job_environment({"CUDA_VISIBLE_DEVICES": names}, None, 2, 8)
    assert "CUDA_VISIBLE_DEVICES" not in job
    # DeepSpeed sets the numbers for every rank.
    monkeypatch.setattr(os, "environ", job | {"CUDA_VISIBLE_DEVICES": "0,1"})
    set_device_variables()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join(names.split(",")[:2])


def test_the_device_s_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes the settings, and a user's own are left alone."""
    monkeypatch.setattr(os, "environ", {})
    set_device_variables()
    (settings,) = os.environ.values()
    torch._C._accelerator_setAllocatorSettings(settings)
    for variable in ALLOCATOR_VARIABLES:
        mine = {variable: "max_split_size_mb:512"}
        monkeypatch.setattr(os, "environ", dict(mine))
        set_device_variables()
        assert os.environ == mine


def test_a_count_and_visible_gpus_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed ignores CUDA_VISIBLE_DEVICES when it gets a count."""
    assert "--num_accelerators" in dry_run("--num-gpus", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert "--num_accelerators" not in dry_run("--num-gpus", "2")
    assert "--num_accelerators" in dry_run("--num-procs", "2")


def test_arguments_of_the_worker() -> None:
    given = {"r": 8, "load_in_4bit": True, "overwrite": False, "lr": None, "model": "a b"}
    given |= {"data": ("a", "b"), "data_weights": (2.0, 0.5)}
    expected = ["--r", "8", "--load-in-4bit", "--no-overwrite", "--model", "a b"]
    expected += ["--data", "a", "--data", "b", "--data-weights", "2.0,0.5"]
    assert to_arguments(given) == expected


def test_several_sources_reach_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, word_rows(1))
    sources = ["--data", "a.jsonl", "--data", "b.jsonl", "--data-weights", "2,0.5"]
    command = dry_run("--num-procs", "1", *sources, "--max-length", "99")
    assert command[command.index("--data") :] == [*sources, "--max-length", "99"]
    text = " ".join(CliRunner().invoke(main, ["train", "--help"]).output.split())
    assert f"May be given several times. [default: {DEMO_DATA[:10]}" in text


def dry_run(*arguments: str) -> list[str]:
    result = CliRunner().invoke(main, ["train", "--dry-run", *arguments])
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout, comments=True)
    assert words[words.index("--output-dir") + 1].startswith("runs/"), "chosen by the launcher"
    assert date.fromisoformat(words[words.index("--template-date") + 1]), "for all hosts"
    for option in ("--output-dir", "--template-date"):
        at = words.index(option)
        del words[at : at + 2]
    return words


@pytest.mark.parametrize("spelling", ["--ds_config", "--ds-config"])
def test_underscores_are_hyphens(spelling: str) -> None:
    command = dry_run(spelling, "ds_configs/zero2.json", "--num_procs", "2", "--load_in_4bit")
    assert command[-3:] == ["--ds-config", "ds_configs/zero2.json", "--load-in-4bit"]


def test_only_what_was_given_reaches_the_worker() -> None:
    command = dry_run("--num-procs", "1", "--lr", "0.01")
    assert command[-2:] == ["--lr", "0.01"]
    assert command[-3].endswith("agent.py")


def test_every_field_is_an_option_with_its_default_in_the_help() -> None:
    text = CliRunner().invoke(main, ["train", "--help"]).output
    for name in RunConfig.model_fields:
        assert option_name(name) in text
    assert "[default: 0.03]" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ds-config", "nowhere.json"], "no such file"),
        (["--num-procs", "2", "--num-gpus", "2"], "exclude each other"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--config", "nowhere.json"], "no such file"),
        (["--no-such-option"], "No such option"),
        (["--r", "many"], "is not a valid integer"),
    ],
)
def test_refusals_end_with_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["train", "--dry-run", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_malformed_ds_config_and_full_folder(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{,}")
    for arguments in (["--ds-config", str(tmp_path / "ds.json")], ["--output-dir", str(tmp_path)]):
        result = CliRunner().invoke(main, ["train", "--dry-run", *arguments])
        assert result.exit_code == 2
        assert str(tmp_path) in result.output


def test_what_an_earlier_start_has_left_may_be_there(tmp_path: Path) -> None:
    """The launcher's own files and the ranks' logs; nothing else, which is not removed either."""
    for name in ("logs/rank-0.log", "launch/deepspeed.log", "launch/hostfile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    check_output_dir(RunConfig(output_dir=str(tmp_path)))
    assert len(launcher_files(tmp_path)) == 3
    (tmp_path / "logs" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        check_output_dir(RunConfig(output_dir=str(tmp_path)))


def test_room_for_the_buffers_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, DeepSpeed's ranks would wait for each other without end."""
    check_shared_memory()
    check_shared_memory(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=rf"{tmp_path} cannot be written; DeepSpeed needs 66 MiB"):
        check_shared_memory(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        check_shared_memory(tmp_path / "none")
