"""The hosts that the other tests of this folder run on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nodes.hosts import ROOT, Host, Hosts
from tests.runs import wait_until

ALL_REDUCE = """
import datetime, sys, torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group(
    "gloo",
    init_method="tcp://n0:29500",
    rank=rank,
    world_size=2,
    timeout=datetime.timedelta(seconds=30),
)
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
print(total.item())
dist.destroy_process_group()
"""


def reached(source: Host, target: str, seconds: int = 10) -> bool:
    """Whether ssh gets through within the seconds, which it keeps to."""
    start = time.monotonic()
    limits = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={seconds}")
    said = source.run("ssh", *limits, target, "hostname", check=False)
    assert time.monotonic() - start < seconds + 2
    return said == f"{target}\n"


def test_ssh_and_pdsh_reach_hosts_by_name(hosts: Hosts) -> None:
    assert hosts[0].run("hostname", "-I").split() == ["10.77.0.1", "10.78.0.1"]
    assert hosts[0].run("ssh", "n1", "hostname") == "n1\n"
    said = hosts[0].run("pdsh", "-w", "n0,n1,n2", "hostname", env={"PDSH_RCMD_TYPE": "ssh"})
    assert sorted(said.splitlines()) == ["n0: n0", "n1: n1", "n2: n2"]


def test_hosts_see_only_their_own(hosts: Hosts) -> None:
    sleeper = hosts[0].popen("sleep", "1000", stdout=subprocess.DEVNULL)
    hosts[0].run("touch", "/dev/shm/here")  # noqa: S108, each host has its own
    with sleeper:
        wait_until(lambda: hosts[0].processes("sleep 1000"), "sleep starts")
        assert hosts[0].processes("sleep 1000") == [sleeper.inner_pid]
        assert "sleep 1000" in hosts[0].run("ps", "ax")
        assert "sleep 1000" not in hosts[1].run("ps", "ax")
        assert hosts[1].processes("sleep 1000") == []
        assert hosts[1].run("ls", "/dev/shm") == ""  # noqa: S108
        hosts[0].kill(sleeper.inner_pid)
    assert sleeper.returncode == -9
    hosts[0].run("rm", "/dev/shm/here")  # noqa: S108


def test_orphans_leave_no_zombie(hosts: Hosts) -> None:
    hosts[0].run("sh", "-c", "(setsid sh -c 'sleep 0.1; exit 3' &); sleep 0.3")
    assert "Z" not in hosts[0].run("ps", "axo", "stat=")


def test_time_limit_kills_the_command(hosts: Hosts) -> None:
    with pytest.raises(AssertionError, match=r"after 0\.3 s:\nstarted"):
        hosts[0].run("sh", "-c", "echo started; sleep 1000 & sleep 1000", timeout=0.3)
    wait_until(lambda: not hosts[0].processes("sleep 1000"), "both sleepers die")


def test_link_down_and_up(hosts: Hosts) -> None:
    hosts[1].link(False)
    assert not reached(hosts[0], "n1", seconds=1)
    assert reached(hosts[0], "n2")
    hosts[1].link(True)
    assert reached(hosts[0], "n1")


def test_lost_host_comes_back(hosts: Hosts) -> None:
    sleeper = hosts[1].popen("sleep", "1000", stdout=subprocess.DEVNULL)
    hosts[1].lose()
    with sleeper:
        pass  # it ends with its host
    assert not reached(hosts[0], "n1", seconds=1)
    hosts.revive(hosts[1])
    assert reached(hosts[0], "n1")
    assert hosts[1].processes("sleep 1000") == []


def test_sshd_stops_and_starts(hosts: Hosts) -> None:
    hosts[1].stop_sshd()
    assert not reached(hosts[0], "n1", seconds=1)
    hosts[1].start_sshd()
    assert reached(hosts[0], "n1")


def test_bound_file_is_on_one_host_only(hosts: Hosts, tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.write_text("shared")
    other.write_text("other")
    hosts[1].bind(other, shared)
    assert [host.run("cat", shared) for host in hosts.all] == ["shared", "other", "shared"]
    assert hosts[0].run("ssh", "n1", "cat", shared) == "other"
    hosts[1].unbind(shared)
    assert hosts[1].run("cat", shared) == "shared"


def test_mend_undoes_everything(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    hosts[0].stop_sshd()
    hosts[1].bind(tmp_path / "empty", hosts.folder / "authorized_keys")
    hosts[1].link(False)
    hosts[2].lose()
    hosts.mend()
    assert all(reached(hosts[0], host.name) for host in hosts.all)


def test_gloo_between_hosts(hosts: Hosts) -> None:
    ranks = [
        hosts[rank].popen(
            *(sys.executable, "-c", ALL_REDUCE, str(rank)), env={"GLOO_SOCKET_IFNAME": "eth0"}
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
        assert [text.splitlines()[-1:] for text in said] == [["3.0"], ["3.0"]], said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
def test_nothing_outlives_the_process_that_made_hosts(tmp_path: Path, end: str) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tests.nodes.hosts import Hosts\n"
        "with Hosts(1, Path(sys.argv[1])) as hosts:\n"
        "    print(hosts[0].pid, hosts.switch_pid)\n"
        "    sys.stdout.flush()\n"
        f"    {end}\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode in (-9, 3)
    pids = done.stdout.split()
    assert len(pids) == 2
    alive = [Path(f"/proc/{pid}/exe") for pid in pids]  # a zombie has none
    wait_until(lambda: not any(exe.exists() for exe in alive), f"{pids} die")
