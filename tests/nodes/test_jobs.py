"""Jobs on several hosts, and what happens to them. Time limits are short: seconds, not minutes."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.hosts.job_script import inner_command
from lorasb_ds.system.signals import EXIT_STOPPED
from tests.nodes.hosts import Command, Host, Hosts
from tests.runs import (
    metrics,
    output_of,
    run_worker,
    status_of,
    wait_until,
    word_rows,
    write_jsonl,
)

TIMEOUT = 5  # --failure-timeout
SOON = 10  # seconds in which the launcher returns, beyond what it has to wait for
LORASB = str(Path(sys.executable).parent / "lorasb")


@pytest.fixture(scope="module")
def options(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", word_rows(13))
    return (
        f"--model {tiny_model} --data {data} --r 4 --dtype fp32 --init-lr 1e-3 --lr 5e-3 "
        f"--train-batch-size 5 --micro-batch-size 2 --target-modules q_proj,v_proj "
        f"--init-samples 8"
    ).split()


class Job:
    """A job that is started on a host, and what became of it."""

    def __init__(self, command: Command, folder: Path, log: Path, ranks: Sequence[Host]) -> None:
        self.command, self.folder, self.log, self.ranks = command, folder, log, ranks

    @property
    def output(self) -> str:
        return self.log.read_text()

    def num_rows(self) -> int:
        file = self.folder / "metrics.jsonl"
        return file.read_text().count('"loss"') if file.is_file() else 0

    def wait_for_rows(self, count: int) -> None:
        def there() -> bool:
            assert self.command.poll() is None, self.output
            return self.num_rows() >= count

        wait_until(there, f"{count} steps are done", seconds=90, log=self.log)

    def worker(self, rank: int) -> int:
        """The process of a rank, outside its host; each host has one."""
        found = self.ranks[rank].processes("launcher/train.py --local_rank")
        return found[-1]

    def ends(self, within_s: float) -> int:
        """Its status; the time from now."""
        return status_of(self.command, self.log, within_s)


@pytest.fixture
def start(hosts: Hosts, options: list[str], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start `lorasb train` on a host, for some hosts."""
    jobs: list[Job] = []

    def start_job(*given: str, on: int = 0, ranks: Sequence[int] = (0, 1), **env: str) -> Job:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{hosts[i].name} slots=1\n" for i in ranks))
        log = tmp_path / "log"
        folder = tmp_path / "run 5%h"
        with log.open("w") as file:
            command = hosts[on].popen(
                *(LORASB, "train", "--hostfile", hostfile, *options, "--output-dir", folder),
                *("--failure-timeout", str(TIMEOUT), "--max-steps", "1000000", *given),
                stdout=file,
                env=env,
            )
        jobs.append(Job(command, folder, log, [hosts[i] for i in ranks]))
        return jobs[-1]

    yield start_job
    for job in jobs:
        if job.command.poll() is None:
            job.command.kill()
            job.command.wait()


@contextmanager
def returns_within(seconds: float) -> Iterator[None]:
    """What is in it must not take longer; the time is in the report of the tests."""
    began = time.monotonic()
    yield
    taken = time.monotonic() - began
    print(f"returned after {taken:.1f} s")
    assert taken <= seconds


def test_two_hosts_are_two_processes(
    start: Callable[..., Job], options: list[str], tmp_path: Path
) -> None:
    job = start("--max-steps", "6", "--ds-config", "ds_configs/zero3.json")
    assert job.ends(within_s=120) == 0, job.output
    assert "lorasb: network: eth0 on n0, n1" in job.output
    alone = tmp_path / "alone"
    more = ("--output-dir", str(alone), "--max-steps", "6", "--ds-config", "ds_configs/zero3.json")
    run_worker(*options, *more, world_size=2)
    for found, expected in zip(metrics(job.folder), metrics(alone), strict=True):
        for key in ("loss", "grad_norm", "r_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), found
    assert (job.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (job.folder / "logs" / "rank-1.log").is_file()
    mode = (job.folder / "launch" / "deepspeed_env").stat().st_mode & 0o777
    assert mode == 0o600


@pytest.mark.slow
def test_hosts_that_a_scheduler_starts(hosts: Hosts, options: list[str], tmp_path: Path) -> None:
    """What the Slurm script runs on every node; the master last, over the second network."""
    folder, commands = tmp_path / "run", {}
    words = inner_command(
        [*options, "--max-steps", "1000000"],
        verb="train",
        nodes=2,
        gpus_per_node=1,
        output_dir=str(folder),
        master_port=29511,
        python=sys.executable,
    )
    words[words.index("--num-gpus")] = "--num-procs"  # there are none here
    for node_rank in (1, 0):
        with (tmp_path / f"log-{node_rank}").open("w") as log:
            commands[node_rank] = hosts[node_rank].popen(
                *("bash", "-c", " ".join(words)),
                env={
                    "SLURM_NODEID": str(node_rank),
                    "MASTER_ADDR": hosts[0].addresses["eth1"],
                },
                stdout=log,
            )
        time.sleep(2 * node_rank)
    file = folder / "metrics.jsonl"
    wait_until(
        lambda: file.exists() and '"loss"' in file.read_text(), "it trains", 90, tmp_path / "log-0"
    )
    commands[1].send_signal(signal.SIGTERM)  # as a node that is drained
    for node_rank, command in commands.items():
        log = tmp_path / f"log-{node_rank}"
        assert status_of(command, log, 30) == EXIT_STOPPED, log.read_text()
    assert list((folder / "checkpoints").glob("step-*"))
    assert "lorasb: network: eth1 on n0, n1" in (tmp_path / "log-0").read_text()


@pytest.mark.slow
def test_hosts_that_are_started_with_other_options(
    hosts: Hosts, options: list[str], tmp_path: Path
) -> None:
    commands, logs = {}, [tmp_path / "log-0", tmp_path / "log-1"]
    for node_rank, r in ((0, "4"), (1, "5")):
        with logs[node_rank].open("w") as log:
            commands[node_rank] = hosts[node_rank].popen(
                *(LORASB, "train", "--no-ssh", "--num-nodes", "2", "--num-procs", "1", *options),
                *("--node-rank", str(node_rank), "--master-addr", hosts[0].address, "--r", r),
                *("--master-port", "29531", "--output-dir", str(tmp_path / "run")),
                stdout=log,
            )
    assert status_of(commands[0], logs[0], 60) == 2
    assert status_of(commands[1], logs[1], 60) not in (0, EXIT_STOPPED)
    assert "rank 1 on n1 was started with other options" in logs[0].read_text()
    assert "rank 1: it was started with other options than the first host" in logs[1].read_text()


@pytest.mark.slow
def test_exclude(start: Callable[..., Job]) -> None:
    job = start("--exclude", "n1", "--max-steps", "1", ranks=(0, 1, 2))
    assert job.ends(within_s=90) == 0, job.output
    assert json.loads((job.folder / "run.json").read_text())["world_size"] == 2
    assert "network: eth0 on n0, n2" in job.output


# -- before the start


def doctor(hosts: Hosts, tmp_path: Path, *given: str, status: int) -> dict[tuple[str, str], Any]:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n0 slots=1\nn1 slots=1\nn2 slots=1\n")
    command = hosts[0].popen(
        *(LORASB, "doctor", "--json", "--timeout", "20", "--hostfile", hostfile, *given)
    )
    output = output_of(command, 90)
    assert command.returncode == status, output
    return {(check["host"], check["what"]): check for check in json.loads(output)["checks"]}


def test_doctor_finds_what_is_wrong_with_a_host(
    hosts: Hosts, options: list[str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    # n1 has no such interpreter, n2 other packages, other code, and not the data.
    hosts[1].bind(other, Path(sys.executable).parent)
    root = Path(__file__).resolve().parent.parent.parent
    changed = tmp_path / "changed.py"
    changed.write_text((root / "launcher" / "text.py").read_text() + "# changed\n")
    hosts[2].bind(changed, root / "launcher" / "text.py")
    (metadata,) = Path(pytest.__file__).parent.parent.glob("peft-*.dist-info/METADATA")
    older = tmp_path / "METADATA"
    older.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    hosts[2].bind(older, metadata)
    data = Path(options[options.index("--data") + 1])
    hosts[2].bind(other, data.parent)
    checks = doctor(hosts, tmp_path, *options, status=1)
    assert "no such interpreter" in checks["n1", "ssh"]["found"]
    assert "scripts/setup.sh" in checks["n1", "ssh"]["remedy"]
    assert "peft 0.1 (here " in checks["n2", "packages"]["found"]
    assert not checks["n2", "code"]["ok"]
    assert checks["n2", f"file {data}"]["found"] == "missing"
    assert all(check["ok"] for (host, _), check in checks.items() if host == "n0")
    assert checks["n0", "accelerators"]["ok"]


@pytest.mark.slow
def test_doctor_finds_what_is_wrong_with_the_network(
    hosts: Hosts, options: list[str], tmp_path: Path
) -> None:
    hosts[1].stop_sshd()
    hosts[2].link(False, "eth1")
    noisy = tmp_path / "bashrc"
    noisy.write_text("echo Welcome\n")
    hosts[0].bind(noisy, Path.home() / ".bashrc")
    taken = (
        "import socket, time; s = socket.socket(); s.bind(('', 29522)); s.listen();"
        "print('listens', flush=True); time.sleep(60)"
    )
    with hosts[0].popen(sys.executable, "-c", taken) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listens\n"
        given = ("--num-procs", "1", "--master-port", "29522")
        checks = doctor(hosts, tmp_path, *options, *given, status=1)
        server.kill()
    assert "Connection refused" in checks["n1", "ssh"]["found"]
    assert "in use" in checks["n0", "port 29522 free"]["found"]
    hosts[1].start_sshd()
    given = ["--num-procs", "1", "--master-port", "29513", "--network-interface", "eth1"]
    checks = doctor(hosts, tmp_path, *options, *given, status=1)
    address = hosts[0].addresses["eth1"]
    assert checks["n0", "master address"]["found"] == f"{address} (eth1)"
    assert checks["n1", f"reaches {address}:29513"]["found"] == "from eth1"
    assert not checks["n2", f"reaches {address}:29513"]["ok"]


@pytest.mark.slow
def test_ssh_is_refused(hosts: Hosts, start: Callable[..., Job]) -> None:
    hosts[1].stop_sshd()
    with returns_within(SOON):
        job = start()
        assert job.ends(within_s=60) == 2
    assert "n1: ssh:" in job.output
    assert "Connection refused" in job.output
    assert not (job.folder / "run.json").exists()
    job = start("--skip-preflight", "--start-timeout", "20")
    with returns_within(20 + SOON):
        assert job.ends(within_s=60) not in (0, EXIT_STOPPED)
    assert "n1" in job.output.rpartition("lorasb: error:")[2]


# -- while it runs


@pytest.mark.slow
def test_a_killed_worker(start: Callable[..., Job]) -> None:
    job = start()
    job.wait_for_rows(1)
    with returns_within(SOON):
        job.ranks[1].kill(job.worker(1))
        assert job.ends(within_s=60) == 128 + signal.SIGKILL
    assert "rank 1 on n1 was ended by SIGKILL, as the kernel does when memory" in job.output
    assert f"Its log: {job.folder}/logs/rank-1.log" in job.output


@pytest.mark.slow
def test_a_worker_that_fails(start: Callable[..., Job], tmp_path: Path) -> None:
    """An exception on one rank, once all have joined; the others wait in a collective."""
    fail = (
        "import os, sys\n"
        "if os.environ.get('RANK') == '1' and any('train.py' in word for word in sys.orig_argv):\n"
        "    import threading, time\n"
        "    def fail():\n"
        "        while 'lorasb_ds.training.loop' not in sys.modules: time.sleep(0.05)\n"
        "        time.sleep(1)\n"
        "        loop = sys.modules['lorasb_ds.training.loop']\n"
        "        loop.train_step = loop.train.__globals__['train_step'] = None\n"
        "    threading.Thread(target=fail, daemon=True).start()\n"
    )
    (tmp_path / "sitecustomize.py").write_text(fail)
    job = start(PYTHONPATH=str(tmp_path))
    assert job.ends(within_s=120) == 1
    assert "rank 1 on n1 ended with status 1" in job.output
    assert "TypeError: 'NoneType' object is not callable" in job.output, "its log is shown"


@pytest.mark.slow
def test_a_link_goes_down(start: Callable[..., Job]) -> None:
    job = start()
    job.wait_for_rows(1)
    with returns_within(TIMEOUT + SOON):
        job.ranks[1].link(False)
        assert job.ends(within_s=90) == 1
    assert "rank 1 on n1 was not heard of for 5 s" in job.output


@pytest.mark.slow
def test_the_masters_host_is_lost(start: Callable[..., Job]) -> None:
    """Seen from a host that runs no rank, as a login node does."""
    job = start(on=2)
    job.wait_for_rows(1)
    with returns_within(TIMEOUT + SOON):
        job.ranks[0].lose()
        assert job.ends(within_s=90) != 0
    assert "on n0" in job.output.rpartition("lorasb: error:")[2]


@pytest.mark.slow
def test_a_worker_that_never_joins(start: Callable[..., Job], tmp_path: Path) -> None:
    sleep = (
        "import os, sys, time\n"
        "if os.environ.get('RANK') == '1' and any('train.py' in word for word in sys.orig_argv):\n"
        "    time.sleep(1000000)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(sleep)
    with returns_within(20 + 30):  # and what it takes the others to come there
        job = start("--start-timeout", "20", PYTHONPATH=str(tmp_path))
        assert job.ends(within_s=90) == 1
    assert "rank 1 on n1 did not join the others within 20 s" in job.output


@pytest.mark.slow
def test_a_stopped_worker(start: Callable[..., Job]) -> None:
    job = start()
    job.wait_for_rows(1)
    with returns_within(TIMEOUT + SOON):
        job.ranks[1].kill(job.worker(1), signal.SIGSTOP)
        assert job.ends(within_s=90) == 1
    assert "rank 1 on n1 has been stopped for 5 s" in job.output


@pytest.mark.slow
def test_sigterm_saves_and_ends_every_host(start: Callable[..., Job]) -> None:
    job = start()
    job.wait_for_rows(2)
    with returns_within(SOON):
        job.command.send_signal(signal.SIGTERM)
        assert job.ends(within_s=60) == EXIT_STOPPED
    assert "asked to stop: step" in job.output
    assert list((job.folder / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_the_launcher_is_killed(start: Callable[..., Job]) -> None:
    """Nobody is left to say so, and nobody is left (the fixture of all tests looks)."""
    job = start()
    job.wait_for_rows(1)
    workers = [job.worker(rank) for rank in (0, 1)]
    job.command.send_signal(signal.SIGKILL)
    wait_until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers end", seconds=5
    )


# -- and goes on


@pytest.mark.slow
def test_restart_with_fewer_hosts(start: Callable[..., Job], tmp_path: Path) -> None:
    """A worker is killed, then a host is lost: two restarts, the second without the host."""
    given = ["--max-steps", "30", "--save-every", "1", "--max-restarts", "2", "--allow-fewer-hosts"]
    job = start(*given)
    job.wait_for_rows(3)
    job.ranks[1].kill(job.worker(1))
    wait_until(lambda: "lorasb: restart 1 of 2" in job.output, "it starts again", 30, job.log)
    job.wait_for_rows(job.num_rows() + 2)
    job.ranks[1].lose()
    with returns_within(90):
        assert job.ends(within_s=120) == 0, job.output
    assert "lorasb: restart 2 of 2" in job.output
    assert "goes on without n1 (ssh: " in job.output
    steps = [row["step"] for row in metrics(job.folder) if "loss" in row]
    assert steps == list(range(1, 31)), "no step is lost or done twice"
    run = json.loads((job.folder / "run.json").read_text())
    assert run["world_size"] == 1
    assert run["config"]["train_batch_size"] == 5
    shutil.rmtree(job.folder)


@pytest.mark.slow
def test_each_host_has_a_run_of_a_comparison(
    hosts: Hosts, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{hosts[i].name} slots=1\n" for i in (1, 2)))
    data, lr = options[options.index("--data") + 1], options.index("--lr")
    folder = tmp_path / "out"
    with (tmp_path / "log").open("w") as log:
        command = hosts[0].popen(
            *(LORASB, "compare", "--hostfile", tmp_path / "hostfile", "--output-dir", folder),
            *(*options[:lr], *options[lr + 2 :], "--lr", "1e-3,5e-3", "--method", "lora-sb"),
            *("--eval-data", data, "--max-steps", "4", "--failure-timeout", str(TIMEOUT)),
            stdout=log,
        )
        assert status_of(command, tmp_path / "log", 200) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    names = [f"lora-sb-r4-lr{lr}-s42" for lr in ("1e-3", "5e-3")]
    for name, host in zip(names, ("n1", "n2"), strict=True):
        assert f"{name} begins ({host[1]} of 2) on {host}\n" in said
        network = (folder / "runs" / f"{name}.log").read_text()
        assert f"lorasb: network: eth0 on {host}\n" in network, "it was there"
        described = json.loads((folder / "runs" / name / "run.json").read_text())
        assert described["world_size"] == 1
    (row,) = json.loads((folder / "compare.json").read_text())["results"]
    assert [entry["lr"] for entry in row["sweep"]] == [1e-3, 5e-3]
    assert all(entry["loss"] > 0 for entry in row["sweep"])


@pytest.mark.slow
def test_two_hosts_share_an_evaluation(
    hosts: Hosts, options: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text("".join(f"{hosts[i].name} slots=1\n" for i in (0, 1)))
    data = options[options.index("--data") + 1]
    with (tmp_path / "log").open("w") as log:
        command = hosts[0].popen(
            *(LORASB, "eval", "--hostfile", tmp_path / "hostfile", "--model", str(tiny_model)),
            *("--data", data, "--num-samples", "5", "--max-new-tokens", "4", "--batch-size", "2"),
            *("--output-dir", tmp_path / "out", "--failure-timeout", str(TIMEOUT)),
            stdout=log,
        )
        assert status_of(command, tmp_path / "log", 120) == 0, (tmp_path / "log").read_text()
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (found["world_size"], found["zero_stage"]) == (2, 3)
    assert found["results"][0]["rows"] == 5
    assert (tmp_path / "out" / "answers.jsonl").read_text().count("\n") == 5
