"""Jobs side by side, in allocations that do not get into each other's way."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.jobs.launch_options import OPTIONS, LaunchOptions
from launcher.jobs.ranks import run_here
from launcher.sweeps.allocations import find_allocations
from launcher.sweeps.pool import Allocation, Pool, PoolJob
from lorasb_ds.errors import ConfigError
from lorasb_ds.system.signals import EXIT_STOPPED

NOT_GIVEN = LaunchOptions(**{name: option.get("default") for name, option in OPTIONS.items()})


def launch(**given: object) -> LaunchOptions:
    flags = {name: False for name, option in OPTIONS.items() if option.get("is_flag")}
    return replace(NOT_GIVEN, **{**flags, "env": (), **given})


def refusal(options: LaunchOptions, parallel: int = 1, has_batch: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        find_allocations(options, parallel, has_batch)
    return str(caught.value)


# -- allocations


def test_processes_on_the_cpu_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (alone,) = find_allocations(launch(num_procs=2), 1, has_batch=False)
    assert alone == Allocation("", {"DS_ACCELERATOR": "cpu"}), "`lorasb train` counts the threads"
    three = find_allocations(launch(num_procs=2), 3, has_batch=False)
    assert three == [Allocation("", {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "2"})] * 3
    many = find_allocations(launch(num_procs=4), 5, has_batch=False)
    assert many[0].environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in find_allocations(launch(num_procs=2), 3, False)[0].environment


def test_gpus_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    found = find_allocations(launch(num_gpus=2), 2, has_batch=False)
    assert [allocation.environment for allocation in found] == [
        {"CUDA_VISIBLE_DEVICES": "4,5"},
        {"CUDA_VISIBLE_DEVICES": "6,7"},
    ]
    said = refusal(launch(num_gpus=2), parallel=3)
    assert "CUDA_VISIBLE_DEVICES naming 3 x --num-gpus = 6 of them (it names 4)" in said
    assert "--num-procs of each run" in refusal(launch(), parallel=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "(it names 0)" in refusal(launch(num_gpus=1), parallel=2)


def test_a_host_for_each_run(tmp_path: Path) -> None:
    file = tmp_path / "hostfile"
    file.write_text("a slots=4\nb slots=4\nc slots=2\n")
    several = launch(hostfile=str(file))
    found = find_allocations(replace(several, exclude="c"), 1, has_batch=False)
    assert found == [Allocation("a"), Allocation("b")]
    found = find_allocations(replace(several, num_gpus=2), 1, has_batch=False)
    assert found == [Allocation("a:0,1"), Allocation("b:0,1"), Allocation("c")]
    found = find_allocations(replace(several, include="a:1,3@c"), 1, has_batch=False)
    assert found == [Allocation("a:1,3"), Allocation("c")]
    assert "(a: 4, b: 4, c: 2)" in refusal(several), "steps of different sizes"
    assert len(find_allocations(several, 1, has_batch=True)) == 3
    assert "--parallel is about this host" in refusal(several, parallel=2)
    assert "--master-port" in refusal(replace(several, master_port=1), has_batch=True)
    assert "--allow-fewer-hosts" in refusal(replace(several, allow_fewer_hosts=True))


# -- the pool


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in (1, 2, 10, 15)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def python(folder: Path, name: str, code: str) -> PoolJob:
    """``argv``: the program, the allocation's name, the port."""

    def command(allocation: Allocation, port: int) -> list[str]:
        return [
            sys.executable,
            "-c",
            f"import os, sys, time, signal\n{code}",
            allocation.include,
            f"{port}",
        ]

    return PoolJob(name, command, folder / "logs" / f"{name}.log")


class Told:
    """What a pool tells, in its order."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.running = self.most = 0

    def began(self, work: PoolJob, allocation: Allocation) -> None:
        self.running += 1
        self.most = max(self.most, self.running)

    def ended(self, work: PoolJob, status: int, seconds: float) -> None:
        self.running -= 1
        self.lines.append(f"{work.name} {status}")


def test_as_many_at_a_time_as_there_are_places(tmp_path: Path) -> None:
    told = Told()
    code = "print(sys.argv[1], sys.argv[2], os.environ['MINE']); time.sleep(0.3)"
    allocations = [Allocation(name, {"MINE": f"of {name}"}) for name in ("a", "b")]
    Pool(allocations).run(
        [python(tmp_path, f"job-{i}", code) for i in range(5)], told.began, told.ended
    )
    assert sorted(told.lines) == [f"job-{i} 0" for i in range(5)]
    assert told.most == 2
    printed = [log.read_text().split() for log in sorted((tmp_path / "logs").iterdir())]
    assert {line[0] for line in printed} == {"a", "b"}
    assert all(line[0] == line[3] for line in printed), "the environment of its allocation"
    assert all(1024 <= int(line[1]) < 65536 for line in printed)


def test_a_job_that_fails_stops_no_other(tmp_path: Path) -> None:
    told = Told()
    codes = ["sys.exit(3)", "os.kill(os.getpid(), 9)", "pass"]
    jobs = [python(tmp_path, f"job-{i}", code) for i, code in enumerate(codes)]
    pool = Pool([Allocation()])
    pool.run(jobs, told.began, told.ended)
    assert told.lines == ["job-0 3", "job-1 137", "job-2 0"]
    assert not pool.stopped


LISTENS = (
    "def end(*_): sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, end)\n"
    "open(sys.argv[1], 'w').close()\n"
    "time.sleep(60)"
)


@pytest.mark.parametrize("who", ["the pool", "a job"])
def test_what_asks_to_stop_reaches_all(tmp_path: Path, who: str) -> None:
    """Those that run end with 75; those that wait are not begun."""
    told = Told()
    allocations = [Allocation(str(tmp_path / name)) for name in ("a", "b")]
    pool = Pool(allocations)
    pool.listen()
    jobs = [python(tmp_path, f"job-{i}", LISTENS) for i in range(2)]
    begun = [allocation.include for allocation in allocations]
    asks = (
        f"while not all(map(os.path.exists, {begun})): time.sleep(0.02)\n"
        f"{'os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)' if who == 'the pool' else ''}\n"
        "sys.exit(75)"
    )
    pool.allocations = [*allocations, Allocation(str(tmp_path / "c"))]
    jobs += [python(tmp_path, "asks", asks), python(tmp_path, "waits", "pass")]
    start = time.monotonic()
    pool.run(jobs, told.began, told.ended)
    assert time.monotonic() - start < 30
    stopped = "143" if who == "the pool" else str(EXIT_STOPPED)
    assert sorted(told.lines) == [f"asks {stopped}", "job-0 75", "job-1 75"]
    assert pool.stopped


@pytest.mark.parametrize("earlier", [False, True])
def test_under_nohup_a_closed_terminal_asks_nobody_to_stop(earlier: bool) -> None:
    """Nor if another process was started before, to which signals were passed on."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if earlier:
        run_here(["true"], dict(os.environ))
    pool = Pool([Allocation()])
    pool.listen()
    signal.raise_signal(signal.SIGHUP)
    assert not pool.stopped
    signal.raise_signal(signal.SIGTERM)
    assert pool.stop_signals == [signal.SIGTERM]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    pool.listen()
    signal.raise_signal(signal.SIGHUP)
    assert pool.stop_signals == [signal.SIGTERM, signal.SIGHUP]
