"""What is made of a host's answer. The hosts themselves are in tests/nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.hosts import host as this_host
from launcher.hosts.checks import Answer, Question, check_answer, choose_master_addr, report
from launcher.hosts.preflight import PROGRAM, examine, remote_command, twins

INTERFACES = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}
QUESTION = Question(slots={"gpu1": 8, "gpu2": 8}, paths=["/data/train.jsonl"], disk=["/runs"])


@pytest.mark.parametrize(
    ("asked_for", "resolved", "routes", "expected"),
    [
        (None, "10.0.0.1", {}, "10.0.0.1"),
        ("ib0", "10.0.0.1", {}, "10.1.0.1"),
        ("eth9", "10.0.0.1", {}, None),
        (None, "127.0.1.1", {"gpu1": "127.0.0.1", "gpu2": "10.1.0.1"}, "10.1.0.1"),
        (None, None, {"gpu2": None}, None),
        (None, "203.0.113.1", {}, None),
    ],
)
def test_master_address(
    asked_for: str | None, resolved: str | None, routes: dict[str, str], expected: str | None
) -> None:
    assert choose_master_addr(INTERFACES, routes, asked_for, resolved) == expected


def test_the_only_address_is_taken() -> None:
    only = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}
    assert choose_master_addr(only, {}, None, "127.0.1.1") == "10.0.0.1"


FACTS: dict[str, Any] = {
    "python": "3.11.7",
    "packages": {"torch": "2.6"},
    "code": "abc",
    "cwd": True,
    "sizes": {"/data/train.jsonl": 1000},
    "disk": {"/runs": 1 << 40},
    "memory": 1 << 36,
    "interfaces": INTERFACES,
    "routes": {},
    "gpus": [80 << 30] * 8,
    "compiler": "/usr/bin/g++",
    "ninja": "/env/bin/ninja",
    "devices": None,
    "locks": [],
}


def reds(question: Question = QUESTION, offset: float = 0.0, **changes: Any) -> dict[str, str]:
    answer = Answer("gpu2", FACTS | changes, clock_offset=offset, rtt=0.2)
    checks = check_answer(answer, FACTS, question)
    assert all(check.remedy for check in checks if not check.ok), "each says what to do"
    return {check.what: check.found for check in checks if not check.ok}


def test_a_host_like_this_one_is_green() -> None:
    assert reds() == {}
    assert reds(replace(QUESTION, cpu=True), gpus=None) == {}
    assert reds(gpus=None) == {}, "no NVIDIA driver: the quick look cannot tell"


def test_each_red() -> None:
    assert reds(python="3.10.1") == {"python": "3.10.1"}
    assert reds(packages={"torch": None}) == {"packages": "torch missing (here 2.6)"}
    assert reds(code=None)["code"].endswith("(here abc)")
    assert "directory" in reds(cwd=False)
    assert reds(offset=-40.0) == {"clock": "-40.0 s"}
    assert reds(sizes={"/data/a": None}) == {"file /data/a": "missing"}
    assert reds(sizes={"/data/train.jsonl": 999}) == {
        "file /data/train.jsonl": "999 bytes, 1000 here"
    }
    assert reds(disk={"/runs": None}) == {"disk /runs": "cannot be written"}
    assert "disk /runs" in reds(disk={"/runs": 1000})
    assert reds(memory=1 << 20) == {"memory": "0.0 GiB free"}
    assert reds(gpus=[1] * 4) == {"accelerators": "4 GPUs, 8 wanted"}
    assert reds(locks=["/c/op/lock"]) == {"build locks": "1 older than 10 minutes"}
    thorough = replace(QUESTION, thorough=True)
    assert reds(thorough, compiler=None, ninja=None) == {"build tools": "no compiler and no ninja"}
    on_cpu = {"name": "cpu", "count": 0, "memory": []}
    assert "DeepSpeed finds a CPU only" in reds(thorough, devices=on_cpu)["accelerators"]
    why = {**on_cpu, "problem": "The NVIDIA driver on your system is too old"}
    assert "driver on your system is too old" in reds(thorough, devices=why)["accelerators"]
    broken = {"error": "ImportError: torch or DeepSpeed does not start"}
    assert "does not start" in reds(replace(thorough, cpu=True), devices=broken)["accelerators"]
    some = {"name": "cuda", "count": 4, "memory": [80 << 30] * 4}
    assert reds(thorough, devices=some)["accelerators"].startswith("4 cuda, 80.0 GiB and more")
    without = {"name": "cuda", "count": 8, "memory": [80 << 30] * 8, "emulates_bf16": True}
    assert reds(thorough, devices=without) == {}
    without["problem"] = "torch 2.13.0 is built without NCCL"
    assert reds(thorough, devices=without) == {"communication": without["problem"]}


def test_a_host_that_does_not_answer() -> None:
    answer = Answer("gpu2", None, "Connection refused", "Start sshd.")
    (check,) = check_answer(answer, FACTS, QUESTION)
    assert (check.what, check.ok) == ("ssh", False)
    text = report([check])
    assert text.splitlines()[0].split() == ["RED", "gpu2", "ssh", "Connection", "refused"]
    assert text.splitlines()[-1] == "gpu2: ssh: Start sshd."


def test_one_machine_under_two_names() -> None:
    hosts = [("gpu1", "a"), ("10.0.0.1", "a"), ("gpu2", "b")]
    answers = [Answer(name, FACTS | {"hostname": machine}) for name, machine in hosts]
    (check,) = twins([*answers, Answer("gpu3", None)])
    assert (check.host, check.found) == ("10.0.0.1", "the same machine as gpu1")


def test_this_host(tmp_path: Path) -> None:
    disk = [str(tmp_path / "new" / "x")]
    question = Question(slots={"here": 1}, cpu=True, paths=[sys.executable], disk=disk)
    assert not examine(question, local=True).problems
    missing = replace(question, programs=["no-such-program"], paths=["/nowhere/y"])
    found = {check.what: check for check in examine(missing, local=True).problems}
    assert set(found) == {"no-such-program", "file /nowhere/y"}
    assert "apt-get install" in found["no-such-program"].remedy


def test_what_ssh_runs_is_one_word_for_a_shell(tmp_path: Path) -> None:
    """The question comes through it whatever it holds, and the program by standard input."""
    hostile = replace(QUESTION, paths=["/data/it's $(here) ; \n"], ssh_port=2222)
    request = {
        "verb": "describe",
        "packages": [],
        "code": str(tmp_path),
        "cwd": "/",
        "devices": False,
    }
    request |= {"paths": hostile.paths, "disk": [], "routes": [], "patience": 5}
    *ssh, command = remote_command("gpu2", request, hostile)
    assert ssh[0] == "ssh"
    assert ssh[-3:] == ["-p", "2222", "gpu2"]
    done = subprocess.run(
        ["sh", "-c", command],
        input=PROGRAM,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    answer = json.loads(done.stdout)
    assert answer["sizes"] == dict.fromkeys(hostile.paths)
    assert answer["code"] is None
    assert answer["python"] == this_host.platform.python_version()


def test_the_digest_is_of_all_wings(tmp_path: Path) -> None:
    """A module of any depth that differs makes another digest."""
    module = tmp_path / "lorasb_ds" / "init" / "factors.py"
    module.parent.mkdir(parents=True)
    module.write_text("r = 1\n")
    before = this_host.code_digest(tmp_path)
    module.write_text("r = 2\n")
    assert before is not None
    assert this_host.code_digest(tmp_path) not in (before, None)


@pytest.mark.parametrize(
    "odd",
    [
        *({}, {"python": 3}, {"packages": None}, {"sizes": [1]}, {"disk": {"/runs": "full"}}),
        *({"memory": "much"}, {"interfaces": 5}, {"hostname": []}, {"locks": 7}, {"gpus": 8}),
    ],
)
def test_an_answer_that_makes_no_sense(odd: dict[str, Any]) -> None:
    answer = Answer("gpu2", FACTS | odd if odd else {})
    checks = check_answer(answer, FACTS, QUESTION)
    assert [check for check in checks if not check.ok]
    assert "Traceback" not in report(checks)
    if answer.facts is None:
        assert checks[0].found == "an answer that makes no sense"
        assert "ssh gpu2 true" in checks[0].remedy


def test_nothing_that_a_host_says_moves_the_cursor() -> None:
    answer = Answer("gpu2", FACTS | {"python": "\x1b[2J\r3.11" + "x" * 5000})
    text = report(check_answer(answer, FACTS, QUESTION))
    assert all(c.isprintable() or c == "\n" for c in text)
    assert max(map(len, text.splitlines())) < 500


@pytest.mark.parametrize(
    ("said", "red"),
    [
        ("printf '\\351\\n'; exit 1", "status 1"),  # a latin-1 byte
        ("printf '\\351\\n' >&2; exit 255", "\ufffd"),
        ("echo '{}'", "an answer that makes no sense"),
        ("yes '{}' | head -c 600000000", "status -9"),
        ("sleep 60", "no answer within 2 s"),
    ],
)
def test_hosts_that_say_odd_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, red: str
) -> None:
    """Their ssh is a script here."""
    ssh = tmp_path / "ssh"
    ssh.write_text(f"#!/bin/sh\nexec 0<&-\n{said}\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began = time.monotonic()
    findings = examine(Question(slots={"odd": 1}, cpu=True, timeout=2))
    assert time.monotonic() - began < 10
    found = {check.what: check.found for check in findings.problems}
    assert red in found["ssh"]
