"""Checks of every host before a job starts there, all at once, by ssh.

`host.py` is sent to the interpreter of each host and answers; the answers are compared with this
host's. `lorasb doctor` makes all checks, `lorasb train` those that take no more than a moment.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.hosts import host as this_host
from launcher.hosts.checks import (
    PACKAGES,
    ROOT,
    Answer,
    Check,
    Question,
    check_answer,
    check_master,
    choose_master_addr,
    judged,
)
from launcher.hosts.over_ssh import complaint, run_program, ssh_command
from launcher.hosts.polling import readable

PROGRAM = Path(this_host.__file__).read_text(encoding="utf-8")
REACH_S = 4.0
SSH_REMEDIES = {
    "resolve": "No DNS, /etc/hosts or ~/.ssh/config knows the name. Fix that, or give the address.",
    "refused": "No sshd listens there. Start it, or give --ssh-port.",
    "Permission denied": "Let this host in without a password: ssh-copy-id HOST.",
    "Host key": "Accept its key once: ssh HOST true.",
    "timed out": "The host or its network is down, or a firewall drops ssh.",
    "No route": "There is no route to it: look at the host's network, and at this one's.",
    "unreachable": "There is no route to it: look at the host's network, and at this one's.",
}
PACKAGED_IN = {
    "ssh": "openssh-client",
    "mpirun": "openmpi-bin or mpich",
    "ompi_info": "openmpi-bin",
    "srun": "slurm-client",
    "sinfo": "slurm-client",
}


@dataclass
class Findings:
    """The checks of all hosts, and the master's address if it could be found."""

    checks: list[Check] = field(default_factory=list)
    master_addr: str | None = None

    @property
    def problems(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]


def examine(question: Question, local: bool = False) -> Findings:
    """Ask all hosts in parallel; none takes longer than twice the time limit.

    Args:
        local: ask this host alone, without ssh.
    """
    hosts = list(question.slots)
    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        answers = list(pool.map(lambda host: _ask(host, question, local), hosts))
    findings = Findings()
    for program in question.programs:
        path = shutil.which(program)
        remedy = f"Install it (Debian: apt-get install {PACKAGED_IN.get(program, program)})."
        found = path or "not on PATH"
        findings.checks.append(judged("here", program, path is not None, found, remedy))
    if answers and local:
        mine = answers[0].facts or {}
    else:
        mine = this_host.describe({**_request(question), "devices": False, "routes": []})
    for answer in answers:
        findings.checks += check_answer(answer, mine, question, local)
    if local or not answers:
        return findings
    findings.checks += twins(answers)
    first = answers[0]
    if first.facts is not None:
        findings.master_addr = question.master_addr or choose_master_addr(
            first.facts["interfaces"],
            first.facts["routes"],
            question.network_interface,
            this_host.resolve(hosts[0]),
        )
        findings.checks.append(check_master(hosts[0], findings.master_addr, first, question))
    reachable = [answer.host for answer in answers if answer.facts is not None]
    if findings.master_addr is not None and hosts[0] in reachable:
        findings.checks += _reach(findings.master_addr, hosts[0], reachable, question)
    return findings


def twins(answers: Sequence[Answer]) -> list[Check]:
    """Return a failed check for each name of a machine that has another name, too."""
    found: list[Check] = []
    seen: dict[str, str] = {}
    for answer in answers:
        if answer.facts is None:
            continue
        machine = json.dumps([answer.facts["hostname"], answer.facts["interfaces"]])
        if machine in seen:
            what = f"the same machine as {seen[machine]}"
            found.append(Check(answer.host, "name", False, what, "Name it once in the hostfile."))
        seen.setdefault(machine, answer.host)
    return found


def _reach(address: str, first: str, hosts: Sequence[str], question: Question) -> list[Check]:
    """Check that the master's port is free, and that every host reaches it."""
    port, what = question.master_port, f"reaches {address}:{question.master_port}"
    ask = {"verb": "listen", "port": port, "seconds": 2 * question.timeout}
    listener = subprocess.Popen(
        remote_command(first, ask, question),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert listener.stdin is not None
    assert listener.stdout is not None
    with suppress(BrokenPipeError):
        listener.stdin.write(PROGRAM)
        listener.stdin.close()
    try:
        said = _first_json(listener.stdout.fileno(), question.timeout)
        if said is None or not said.get("listening"):
            reason = (said or {}).get("error", "no answer")
            remedy = "Choose another --master-port, or leave it out."
            return [Check(first, f"port {port} free", False, reason, remedy)]

        def connect(host: str) -> Check:
            wanted = {"interface": question.network_interface, "seconds": REACH_S}
            ask = {"verb": "connect", "address": address, "port": port, **wanted}
            answer = _answer_of(host, ask, question)
            facts = answer.facts or {"error": answer.error, "interface": None}
            remedy = "Open the port between the hosts, or choose another --network-interface."
            ok = facts["error"] is None
            found = f"from {facts['interface']}" if ok else str(facts["error"])
            return judged(host, what, ok, found, remedy)

        with ThreadPoolExecutor(max_workers=len(hosts)) as pool:
            return [Check(first, f"port {port} free", True, ""), *pool.map(connect, hosts)]
    finally:
        listener.kill()
        listener.wait()


def _request(question: Question) -> dict[str, Any]:
    return {
        "verb": "describe",
        "packages": PACKAGES,
        "code": str(ROOT),
        "cwd": str(Path.cwd()),
        "paths": list(question.paths),
        "disk": list(question.disk),
        "routes": list(question.slots)[:2],
        "devices": question.thorough,
        "patience": question.timeout / 2,
    }


def _ask(host: str, question: Question, local: bool) -> Answer:
    request = _request(question)
    if local:
        return Answer(host, this_host.describe(request))
    return _answer_of(host, request, question)


def _answer_of(host: str, request: Mapping[str, Any], question: Question) -> Answer:
    """Ask a host by ssh; without an answer, say what to do."""
    command = remote_command(host, request, question)
    before, limit = time.time(), question.timeout
    try:
        done = run_program(command, PROGRAM, limit)
    except FileNotFoundError:
        return Answer(host, None, "there is no ssh here", "Install openssh-client.")
    except subprocess.TimeoutExpired:
        remedy = f"Look at the host and its network: ssh {host} true"
        return Answer(host, None, f"no answer within {limit:g} s", remedy)
    after = time.time()
    facts = _last_json(done.stdout)
    if done.returncode == 0 and facts is not None:
        ahead = facts.get("clock", after) - after
        return Answer(host, facts, clock_offset=ahead, rtt=after - before)
    error = complaint(done)
    if done.returncode == 255:
        fitting = [remedy for word, remedy in SSH_REMEDIES.items() if word in error]
        remedy = [*fitting, "Look at what `ssh HOST true` says."][0].replace("HOST", host)
    elif done.returncode in (126, 127):
        error = f"no such interpreter: {sys.executable}"
        remedy = "Set the project up under the same path there (scripts/setup.sh), or share it."
    else:
        remedy = f"Try it: ssh {host} {sys.executable} -V"
    return Answer(host, None, error, remedy)


def remote_command(host: str, request: Mapping[str, Any], question: Question) -> list[str]:
    """Return the ssh command that runs `host.py` from standard input; no shell reads a question."""
    argument = base64.urlsafe_b64encode(json.dumps(request).encode()).decode()
    return ssh_command(host, [sys.executable, "-", argument], question)


def _first_json(fd: int, seconds: float) -> dict[str, Any] | None:
    """Read the first answer of a command that goes on."""
    text, deadline = b"", time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and readable([fd], left):
        data = os.read(fd, 1 << 16)
        text += data
        answer = _last_json(text.decode(errors="replace"))
        if answer is not None or not data:
            return answer
    return None


def _last_json(text: str) -> dict[str, Any] | None:
    """Return the answer; a login script may have written lines before it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            return answer if isinstance(answer, dict) else None
    return None
