"""The three kinds of jobs: which is chosen, and what each writes and tells its agents."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from launcher.jobs import channel
from launcher.jobs.by_hand_job import ByHandJob
from launcher.jobs.job import Job
from launcher.jobs.launch_options import OPTIONS, LaunchOptions
from launcher.jobs.local_job import LocalJob
from launcher.jobs.make_job import make_job
from launcher.jobs.ranks import free_port
from launcher.jobs.ssh_job import SshJob
from launcher.jobs.start import run_once
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_layout import LAUNCHER_LOCK, foreign_to_run
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.folder_lock import FolderLock


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    file = tmp_path / "hosts"
    file.write_text("gpu1 slots=4\ngpu2 slots=4\n")
    return str(file)


def job_of(folder: Path, run: Mapping[str, Any] | None = None, **given: Any) -> Job:
    """A job whose run is written into ``folder``, made from launch options."""
    defaults = {name: option.get("default") for name, option in OPTIONS.items()}
    flags = {name: False for name, option in OPTIONS.items() if option.get("is_flag")}
    launch = LaunchOptions(**{**defaults, **flags, "env": (), **given})
    (folder / "launch").mkdir(parents=True, exist_ok=True)
    return make_job(launch, [], None, {"output_dir": str(folder), **(run or {})})


def by_hand(folder: Path, port: int, **given: Any) -> Job:
    where: dict[str, Any] = {"no_ssh": True, "num_nodes": 2, "num_procs": 1, "node_rank": 1}
    where |= {"master_addr": "127.0.0.1", "master_port": port}
    return job_of(folder, **where | given)


def test_one_place_chooses(tmp_path: Path, hostfile: str) -> None:
    run = tmp_path / "run"
    assert isinstance(job_of(run, num_procs=2), LocalJob)
    assert isinstance(job_of(run, hostfile=hostfile), SshJob)
    assert isinstance(job_of(run, hostfile=hostfile, launcher="openmpi"), SshJob)
    assert isinstance(by_hand(run, 29500), ByHandJob)
    Path(hostfile).write_text("localhost slots=2\n")
    assert isinstance(job_of(run, hostfile=hostfile), LocalJob), "it needs no ssh to itself"
    assert isinstance(job_of(run, hostfile=hostfile, launcher="openmpi"), SshJob)
    assert isinstance(by_hand(run, 29500, hostfile=hostfile, num_nodes=1, node_rank=0), ByHandJob)


def test_hosts_that_are_asked(tmp_path: Path, hostfile: str) -> None:
    """pdsh's are; MPI reaches them in its own way; by hand, each host answers for itself."""
    run, here = tmp_path / "run", socket.gethostname()
    assert job_of(run, num_procs=2).question().slots == {here: 2}
    assert by_hand(run, 29500, num_procs=3).question().slots == {here: 3}
    assert job_of(run, hostfile=hostfile).question(port=7).slots == {"gpu1": 4, "gpu2": 4}
    file = tmp_path / "peft.json"
    file.write_text('{"peft_type": "LORA"}')
    asked = {"method": f"peft:{file}"}
    assert str(file) in job_of(run, asked, hostfile=hostfile).question(port=7).paths
    mpi = job_of(run, hostfile=hostfile, launcher="openmpi").question()
    assert (mpi.slots, mpi.programs) == ({}, ("mpirun", "ompi_info"))


def test_a_local_job(tmp_path: Path) -> None:
    job = job_of(tmp_path / "run", num_procs=2)
    assert (job.rank_hosts, job.launcher_log.name) == (None, "deepspeed.log")
    call = job.prepare({"A": "1"}, 29501, None)
    assert call.listener is not None
    with closing(call.listener):
        port = call.listener.getsockname()[1]
        assert call.environment == {"A": "1", channel.SUPERVISOR: f"127.0.0.1:{port}"}
    assert job.restarted(has_begun=True).given["resume"] == "auto"
    assert job.restarted(has_begun=False).given["resume"] == "auto", "a folder that is new"


@pytest.mark.parametrize("asked", [{"overwrite": True}, {"resume": "."}])
def test_a_restart_of_ranks_that_never_began(asked: dict[str, Any], tmp_path: Path) -> None:
    """What they were to do with the folder is still to be done; nothing of an old run is taken."""
    run, config = tmp_path / "run", load_run_config({"max_steps": 3}).model_dump()
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": config}))
    job = job_of(run, {k: str(run) if v == "." else v for k, v in asked.items()}, num_procs=2)
    again, on = job.restarted(has_begun=False).config, job.restarted(has_begun=True).config
    assert (again.overwrite, again.resume) == (job.config.overwrite, job.config.resume)
    assert (on.overwrite, on.resume) == (False, "auto")


def test_a_job_of_mpi(tmp_path: Path, hostfile: str) -> None:
    """DeepSpeed's file of variables names the master, is for the user alone, and has no secret."""
    job = job_of(tmp_path / "run", hostfile=hostfile, launcher="openmpi", include="gpu2")
    assert job.rank_hosts is None, "MPI numbers the ranks"
    call = job.prepare({"HF_HOME": "/hf", "HF_TOKEN": "x", "HOME": "/h"}, 29501, "10.0.0.7")
    assert call.listener is not None
    with closing(call.listener):
        folder = tmp_path / "run" / "launch"
        assert (folder / "hostfile").read_text() == "gpu2 slots=4\n"
        variables = (folder / "deepspeed_env").read_text().splitlines()
        assert {"HF_HOME=/hf", "MASTER_ADDR=10.0.0.7", "MASTER_PORT=29501"} <= set(variables)
        assert not [line for line in variables if "TOKEN" in line]
        assert (folder / "deepspeed_env").stat().st_mode & 0o777 == 0o600
        assert call.environment["DS_ENV_FILE"] == str(folder / "deepspeed_env")
    with pytest.raises(ConfigError, match=r"The address of the first host, gpu2, .*--master-addr"):
        job.prepare({}, 29501, "127.0.1.1")


def test_hosts_by_hand_compare_their_options(tmp_path: Path) -> None:
    """The same digest on all hosts; the first one's supervisor has the port after the master's."""
    port = free_port()
    first, second = (by_hand(tmp_path / "run", port, node_rank=i) for i in (0, 1))
    assert [job.launcher_log.name for job in (first, second)] == ["deepspeed.log", "deepspeed1.log"]
    call, other = first.prepare({}, port, None), second.prepare({}, port, None)
    assert call.listener is not None
    assert other.listener is None
    with closing(call.listener):
        assert call.listener.getsockname()[1] == port + 1
        assert call.environment[channel.SUPERVISOR] == f"127.0.0.1:{port + 1}"
        digests = [each.environment[channel.OPTIONS] for each in (call, other)]
        assert digests[0] == digests[1]
        apart = by_hand(tmp_path / "run", port, num_nodes=3).prepare({}, port, None)
        assert apart.environment[channel.OPTIONS] != digests[0]
        with pytest.raises(ConfigError, match=rf"the next port, {port + 1}, is needed, too"):
            first.prepare({}, port, None)
    text = (tmp_path / "run" / "launch" / "hostfile-0").read_text()
    assert text == "node-0 slots=1\nnode-1 slots=1\n"


def test_only_hosts_by_hand_leave_logs_of_others(tmp_path: Path) -> None:
    log = tmp_path / "run" / "launch" / "deepspeed.log"
    jobs = (by_hand(tmp_path / "run", 29500), job_of(tmp_path / "run", num_procs=1))
    log.touch()
    for job, left in zip(jobs, (True, False), strict=True):
        job.remove_earlier_logs()
        assert log.exists() == left


def test_one_launcher_at_a_time(tmp_path: Path) -> None:
    """A second one removes no logs of the first, whose ranks have not come to lock the folder."""
    run = tmp_path / "run"
    job = job_of(run, num_procs=1, skip_preflight=True)
    log = run / "launch" / "deepspeed.log"
    log.write_text("the first one's")
    lock = FolderLock(run / LAUNCHER_LOCK)
    with pytest.raises(ConfigError, match=rf"{run} is in use: process {os.getpid()} on "):
        run_once(job, [])
    assert log.read_text() == "the first one's"
    lock.release()
    assert foreign_to_run(run) == [], "an early end leaves nothing that refuses the next start"
