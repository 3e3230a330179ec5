"""What is handed to DeepSpeed's launchers, held against what those make of it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from deepspeed.launcher import runner as deepspeed_runner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from launcher.cli import main
from launcher.hosts.environment import (
    asked_for,
    deepspeed_env,
    exported,
    hosts_environment,
    is_secret,
    read_deepspeed_env,
)
from launcher.jobs.command import BACKENDS, Hosts, by_hand_command, job_environment, ssh_command
from launcher.jobs.ranks import rank_variables
from lorasb_ds.errors import ConfigError

SLOTS = {"gpu1": [0, 1], "gpu2": [0, 1]}
AGENT = str(Path(__file__).resolve().parents[3] / "launcher" / "jobs" / "agent.py")


HOSTS = Hosts(SLOTS, hostfile="/r/hostfile", master_addr="10.0.0.1", master_port=29501)


def read_by_deepspeed(command: Sequence[str]) -> Any:
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    return deepspeed_runner.parse_args(command[3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(backend: str) -> None:
    command = ssh_command(["--r", "8"], HOSTS, launcher=backend)
    asked = read_by_deepspeed(command)
    assert (asked.launcher, asked.hostfile, asked.force_multi) == (backend, "/r/hostfile", True)
    assert (asked.master_addr, asked.master_port) == ("10.0.0.1", 29501)
    assert (asked.include, asked.exclude, asked.num_nodes, asked.num_gpus) == ("", "", -1, -1)
    assert (asked.user_script, asked.user_args) == (AGENT, ["--r", "8"])
    assert backend in deepspeed_runner.LAUNCHER_CLASSES


def test_ssh_port_and_launcher_args() -> None:
    command = ssh_command([], HOSTS, ssh_port=2222, launcher_args="-t 5 -b")
    asked = read_by_deepspeed(command)
    assert (asked.ssh_port, asked.launcher_args) == (2222, "-t 5 -b")


def test_by_hand() -> None:
    command = by_hand_command(["--model", "a b"], HOSTS, node_rank=1)
    asked = read_by_deepspeed(command)
    assert (asked.no_ssh, asked.node_rank, asked.force_multi) == (True, 1, False)
    assert asked.user_args == ["--model", "a b"], "no shell reads it"


def test_chosen_slots() -> None:
    some = {"gpu1": [0, 1], "gpu2": [1, 3]}
    hosts = replace(HOSTS, slots=some)
    asked = read_by_deepspeed(ssh_command([], hosts))
    pool = {"gpu1": 2, "gpu2": 4}
    assert deepspeed_runner.parse_inclusion_exclusion(pool, asked.include, asked.exclude) == some
    with pytest.raises(ConfigError, match=r"--launcher slurm .*cannot choose slots.*--include"):
        ssh_command([], hosts, launcher="slurm")


def by_pdsh(command: str) -> str:
    """What pdsh 2.34 replaces in a command (seen; tests/nodes has the real one)."""
    values = {"h": "gpu1", "n": "0", "u": "root", "%": "%"}
    return re.sub("%([hnu%])", lambda match: values[match[1]], command)


def after_pdsh(words: Sequence[str], tmp_path: Path) -> list[str]:
    """The worker's arguments as they arrive: by DeepSpeed's own runner, then a shell."""
    asked = read_by_deepspeed(ssh_command(words, HOSTS))
    remote, _, _ = deepspeed_runner.PDSHRunner(asked, "e30=").get_cmd({}, SLOTS)
    line = by_pdsh(" ".join(remote[remote.index(AGENT) + 1 :]))
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' x {line}"],
        capture_output=True,
        cwd=tmp_path,
        check=True,
    )
    return done.stdout.decode().split("\0")[1:-1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=5))
def test_arguments_come_out_of_pdsh_as_they_were(tmp_path: Path, words: list[str]) -> None:
    """Or they are refused."""
    # argparse would take such a word of ours for its own; the worker's begin with an option.
    words = ["--data", *words]
    try:
        arrived = after_pdsh(words, tmp_path)
    except ConfigError:
        assume(False)
    assert arrived == words


@pytest.mark.parametrize(
    "word",
    [
        "a;reboot",
        "$(reboot)",
        "`reboot`",
        "a'b",
        'a"b',
        "*",
        "~",
        "a b",
        'say "a b"',
        "a\nb",
        "#x",
        "50%",
        "%h %%u",
    ],
)
def test_hostile_arguments(word: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert after_pdsh(["--data", word], tmp_path) == ["--data", word]


@pytest.mark.parametrize("word", ["a $(reboot)", "a `b`", "a \\ b", "a !b"])
def test_what_cannot_come_through_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be handed to the hosts.*--config"):
        ssh_command([word], HOSTS)
    ssh_command([word], HOSTS, launcher="openmpi")


def test_a_path_that_a_shell_would_read() -> None:
    with pytest.raises(ConfigError, match="The interpreter is '/my env/bin/python'"):
        ssh_command([], HOSTS, python="/my env/bin/python")


ENVIRONMENT = {
    "HF_HOME": "/data/hf",
    "HF_TOKEN": "hf_secret",
    "WANDB_API_KEY": "secret",
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_DEBUG": "INFO",
    "CUDA_VISIBLE_DEVICES": "0",
    "OMP_NUM_THREADS": "4",
    "MLFLOW_TRACKING_PASSWORD": "secret",
    "HOME": "/root",
    "PATH": "/env/bin:/usr/bin",
}


def test_what_is_exported() -> None:
    found = exported(ENVIRONMENT)
    assert set(found) == {
        *("HF_HOME", "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "OMP_NUM_THREADS", "PATH"),
    }
    found = asked_for(ENVIRONMENT, ["HF_TOKEN", "A=b=c", "EMPTY=", "OMP_NUM_THREADS=2"])
    assert found["HF_TOKEN"] == ENVIRONMENT["HF_TOKEN"], "if asked for"
    assert (found["A"], found["EMPTY"], found["OMP_NUM_THREADS"]) == ("b=c", "", "2")
    assert "MLFLOW_TRACKING_PASSWORD" not in hosts_environment(ENVIRONMENT, "/r/env")
    assert is_secret("HF_TOKEN")
    assert not is_secret("TOKENIZERS_PARALLELISM")


@pytest.mark.parametrize(
    ("asked", "message"),
    [("1A=b", "not a variable's name"), ("A-B=c", "not a variable's"), ("NOT_SET", "is not set")],
)
def test_variables_that_are_refused(asked: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked_for({}, [asked])


def arrives(variables: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a shell on a host makes of our `.deepspeed_env`, after DeepSpeed has read it."""
    (tmp_path / "env").write_text(deepspeed_env(variables, "pdsh"))
    asked = read_by_deepspeed(ssh_command([], HOSTS))
    runner = deepspeed_runner.PDSHRunner(asked, "e30=")
    for line in (tmp_path / "env").read_text().splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))  # as DeepSpeed's main does
    remote, _, _ = runner.get_cmd({}, SLOTS)
    exports = next(word for word in remote if word.startswith("export "))
    done = subprocess.run(
        ["sh", "-c", f"{by_pdsh(exports)} env -0"], capture_output=True, check=True
    )
    return dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if pair)


def test_deepspeed_reads_the_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"HF_HOME": "/data/my cache", "A": "b=c;d", "B": "x'y", "C": "a&b|c>d", "E": "*%h"}
    found = arrives(variables, tmp_path, monkeypatch)
    assert {name: found[name] for name in variables} == variables


@pytest.mark.parametrize("value", ["$HOME", "`id`", 'a"b', "a\\b", "a\nb"])
def test_values_that_a_shell_would_read(value: str) -> None:
    with pytest.raises(ConfigError, match=r"The variable HF_HOME holds .*--env HF_HOME=VALUE"):
        deepspeed_env({"HF_HOME": value}, "pdsh")
    with pytest.raises(ConfigError) as error:
        deepspeed_env({"MY_TOKEN": "secret$"}, "pdsh")
    assert "secret" not in str(error.value)


def test_a_users_own_deepspeed_env(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("HF_HOME=/data\nA=b=c\n")
    assert read_deepspeed_env(file) == {"HF_HOME": "/data", "A": "b=c"}
    for line in ("# comment", "", "export A=b", "1=2"):
        file.write_text(f"A=b\n{line}\n")
        with pytest.raises(ConfigError, match=r"line 2: .* is not NAME=VALUE"):
            read_deepspeed_env(file)


def test_other_backends_have_no_shell() -> None:
    for value, launcher in (("a b", "openmpi"), ("a,b", "slurm")):
        with pytest.raises(ConfigError, match=f"--launcher {launcher}"):
            deepspeed_env({"X": value}, launcher)
    assert deepspeed_env({"X": "a,b"}, "openmpi") == "X=a,b\n"


def test_environment_of_several_hosts() -> None:
    found = job_environment({"PATH": "/usr/bin", "CUDA_VISIBLE_DEVICES": "3"}, None, 8, None)
    assert found["CUDA_VISIBLE_DEVICES"] == "3", "of this host; it is not exported"
    assert "OMP_NUM_THREADS" not in job_environment({}, 2, None, None)


def test_ranks_of_other_launchers() -> None:
    mpi = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }
    ours = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
    assert rank_variables(mpi) == ours
    assert rank_variables(mpi | {"RANK": "0"})["RANK"] == "0", "DeepSpeed's own win"
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}
    assert rank_variables(slurm | {"SLURM_NTASKS_PER_NODE": "2"}) == ours
    assert rank_variables({}) == {}


# -- the command line


def dry_run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["train", "--dry-run", *arguments])
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    (tmp_path / "hosts").write_text("gpu1 slots=4\ngpu2 slots=4\n")
    return str(tmp_path / "hosts")


def test_dry_run_of_several_hosts(hostfile: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output = dry_run(
        *("--hostfile", hostfile, "--num-gpus", "2", "--master-addr", "10.0.0.1"),
        *("--output-dir", str(folder), "--env", "WANDB_API_KEY=secret"),
    )
    asked = read_by_deepspeed(shlex.split(output, comments=True))
    assert asked.hostfile == str(folder / "launch" / "hostfile")
    assert "#   gpu1 slots=2\n#   gpu2 slots=2\n" in output
    assert "WANDB_API_KEY" in output
    assert "secret" not in output
    assert not folder.exists(), "nothing is written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hostfile", "nowhere"], "there is no such file"),
        (["--include", "gpu1"], "--include is for several hosts"),
        (["--num-nodes", "2"], "--num-nodes is for several hosts"),
        (["--hostfile", "HOSTS", "--include", "gpu3"], "gpu3"),
        (["--hostfile", "HOSTS", "--num-gpus", "8"], "--num-gpus 8, but gpu1 has 4"),
        (["--hostfile", "HOSTS", "--num-procs", "8"], "--num-procs 8, but gpu1 has 4"),
        (["--hostfile", "HOSTS", "--include", "gpu1", "--exclude", "gpu2"], "exclude each other"),
        (["--no-ssh"], "--no-ssh needs --node-rank, --master-addr, --master-port"),
        (["--hostfile", "HOSTS", "--node-rank", "1"], "--node-rank goes with --no-ssh"),
        (["--hostfile", "HOSTS", "--launcher", "ssh"], "'ssh' is not one of 'pdsh'"),
        (["--hostfile", "HOSTS", "--launcher", "slurm", "--ssh-port", "1"], "--ssh-port"),
        (["--hostfile", "HOSTS", "--env", "NO_SUCH_VARIABLE"], "it is not set here"),
        (["--hostfile", "HOSTS", "--failure-timeout", "0"], "0.0 is not in the range x>=1"),
        (["--hostfile", "HOSTS", "--data", "a $(b)"], "cannot be handed to the hosts"),
        (["--allow-fewer-hosts"], "--allow-fewer-hosts is for several hosts"),
    ],
)
def test_refusals(arguments: list[str], message: str, hostfile: str) -> None:
    given = [hostfile if word == "HOSTS" else word for word in arguments]
    assert message in " ".join(dry_run(*given, status=2).split())


def test_a_host_by_hand_must_be_one_of_them(hostfile: str) -> None:
    by_hand = f"--no-ssh --hostfile {hostfile} --master-addr a --master-port 5".split()
    assert "--node-rank 2 is not one of the 2 hosts" in dry_run(
        *by_hand, "--node-rank", "2", "--output-dir", "x", status=2
    )
    assert "--no-ssh needs --output-dir" in dry_run(*by_hand, "--node-rank", "1", status=2)


def test_a_hostfile_of_this_host_alone_needs_no_ssh(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    asked = read_by_deepspeed(
        shlex.split(dry_run("--hostfile", str(tmp_path / "hosts"), "--num-procs", "2"))
    )
    assert (asked.hostfile, asked.num_gpus) == (os.devnull, 2)
