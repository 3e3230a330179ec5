"""What must hold on every host before a job starts there: asked of all of them at once, by ssh.

`host.py` is sent to the interpreter of each host and answers; the answers are compared with this
host's. `lorasb doctor` shows all of it, `lorasb train` runs what takes no more than a moment.
"""

from __future__ import annotations

import base64
import json
import shlex
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

import click

from launcher import host as this_host
from launcher.command import SSH_OPTIONS
from launcher.ranks import WORKERS

PACKAGES = (
    *("torch", "deepspeed", "transformers", "datasets", "safetensors", "numpy", "lorasb-ds"),
    *("bitsandbytes", "accelerate", "peft", "tokenizers"),
)
ROOT = WORKERS.parent
PROGRAM = Path(this_host.__file__).read_text(encoding="utf-8")
CLOCKS_APART_S = 5.0
LEAST_DISK, LEAST_MEMORY = 1 << 28, 1 << 30  # bytes; `lorasb plan` tells what a run needs
REACH_S = 4.0
SSH_REMEDIES = {
    "resolve": "No DNS, /etc/hosts or ~/.ssh/config knows the name. Mend it, or write the address.",
    "refused": "No sshd listens there. Start it, or give --ssh-port.",
    "Permission denied": "Let this host in without a password: ssh-copy-id HOST.",
    "Host key": "Accept its key once: ssh HOST true.",
    "timed out": "The host or its network is down, or a firewall drops ssh.",
    "No route": "No way leads there: look at the host's network, and at this one's.",
    "unreachable": "No way leads there: look at the host's network, and at this one's.",
}
PACKAGED_IN = {"ssh": "openssh-client"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at on one host."""

    host: str
    what: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Question:
    """What the hosts are asked.

    Args:
        slots: host -> processes that it is to run.
        cpu: whether these run on CPUs.
        paths: files and folders that every host must see.
        disk: folders that are written to.
        thorough: also what takes seconds: accelerators by DeepSpeed, a compiler.
    """

    slots: Mapping[str, int]
    cpu: bool = False
    paths: Sequence[str] = ()
    disk: Sequence[str] = ()
    master_addr: str | None = None
    master_port: int = 29500
    network_interface: str | None = None
    ssh_port: int | None = None
    timeout: float = 20.0  # seconds, for every host
    thorough: bool = False
    programs: Sequence[str] = ()  # that this host needs


@dataclass
class Answer:
    """What one host said, or why it did not."""

    host: str
    facts: dict[str, Any] | None
    error: str = ""
    remedy: str = ""
    clock_offset: float = 0.0  # seconds ahead of this host's clock
    rtt: float = 0.0


@dataclass
class Findings:
    """Of all hosts; where the master is, if that could be found out."""

    checks: list[Check] = field(default_factory=list)
    master_addr: str | None = None

    @property
    def problems(self) -> list[Check]:
        return [check for check in self.checks if not check.ok]


def examine(question: Question, local: bool = False) -> Findings:
    """Ask every host, in parallel; no host takes longer than the time limit, twice.

    Args:
        local: this host alone, without ssh.
    """
    hosts = list(question.slots)
    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        answers = list(pool.map(lambda host: _ask(host, question, local), hosts))
    findings = Findings()
    for program in question.programs:
        path = shutil.which(program)
        remedy = f"Install it (Debian: apt-get install {PACKAGED_IN.get(program, program)})."
        found = path or "not on PATH"
        findings.checks.append(
            Check("here", program, path is not None, found, "" if path else remedy)
        )
    mine = this_host.describe({**_request(question), "devices": False, "routes": []})
    for answer in answers:
        findings.checks += check_answer(answer, mine, question, local)
    if local or not answers:
        return findings
    first = answers[0]
    if first.facts is not None:
        findings.master_addr = question.master_addr or choose_master_addr(
            first.facts["interfaces"],
            first.facts["routes"],
            question.network_interface,
            this_host.resolve(hosts[0]),
        )
        findings.checks.append(_master_check(hosts[0], findings.master_addr, first, question))
    reachable = [answer.host for answer in answers if answer.facts is not None]
    if findings.master_addr is not None and hosts[0] in reachable:
        findings.checks += _reach(findings.master_addr, hosts[0], reachable, question)
    return findings


def report(checks: Sequence[Check], color: bool = False) -> str:
    """The table, and below it what to do about each red line."""
    rows = [("ok" if c.ok else "RED", c.host, c.what, c.found) for c in checks]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    if color:
        styled = zip(lines, checks, strict=True)
        lines = [click.style(line, fg="green" if check.ok else "red") for line, check in styled]
    remedies = [f"{c.host}: {c.what}: {c.remedy}" for c in checks if not c.ok]
    return "\n".join([*lines, *(["", *remedies] if remedies else [])])


def choose_master_addr(
    interfaces: Mapping[str, str],
    routes: Mapping[str, str | None],
    asked_for: str | None,
    resolved: str | None,
) -> str | None:
    """The address of the first host at which the others meet.

    Args:
        interfaces: of the first host, with their addresses.
        routes: another host -> the first host's address on the way to it.
        asked_for: an interface.
        resolved: what the first host's name means here; on the host itself that may be 127.0.1.1.
    """
    if asked_for is not None:
        return interfaces.get(asked_for)
    outside = [a for a in interfaces.values() if not a.startswith("127.")]
    if resolved in outside:
        return resolved
    ways = [address for address in routes.values() if address in outside]
    return ways[0] if ways else (outside[0] if len(outside) == 1 else None)


def check_answer(
    answer: Answer, mine: Mapping[str, Any], question: Question, local: bool = False
) -> list[Check]:
    """A host's answer held against what the job needs, and against this host. Pure."""
    host, facts = answer.host, answer.facts
    if facts is None:
        return [Check(host, "ssh", False, answer.error, answer.remedy)]
    checks: list[Check] = []

    def add(what: str, ok: bool, found: str, remedy: str = "") -> None:
        checks.append(Check(host, what, ok, found, "" if ok else remedy))

    if not local:
        add("ssh", True, f"answered in {answer.rtt:.1f} s")
        same = facts["python"] == mine["python"]
        remedy = f"Give it Python {mine['python']} at {sys.executable}, as this host has."
        add("python", same, facts["python"], remedy)
        others = {n: v for n, v in facts["packages"].items() if v != mine["packages"][n]}
        found = ", ".join(
            f"{n} {v or 'missing'} (here {mine['packages'][n]})" for n, v in others.items()
        )
        remedy = "Install the same versions: scripts/setup.sh on that host, or a shared folder."
        add("packages", not others, found or f"{len(PACKAGES)} as here", remedy)
        remedy = f"Bring {ROOT} there up to date, or share the folder."
        same = facts["code"] == mine["code"]
        add("code", same, facts["code"] or f"no {ROOT}", remedy)
        remedy = "DeepSpeed changes to it on every host: make it, share it, or start elsewhere."
        add("directory", facts["cwd"], str(Path.cwd()), remedy)
        ahead = answer.clock_offset
        remedy = "Set the clocks by NTP (chrony, systemd-timesyncd)."
        close = abs(ahead) <= CLOCKS_APART_S + answer.rtt
        add("clock", close, f"{ahead:+.1f} s", remedy)
    missing = facts["missing"]
    remedy = "Copy or mount it there under the same path."
    found = f"missing: {', '.join(missing)}" if missing else f"{len(question.paths)} paths"
    add("files", not missing, found, remedy)
    for folder, free in facts["disk"].items():
        found = f"{_gib(free)} free" if free is not None else "cannot be written"
        remedy = "Make room, or name another --output-dir."
        add(f"disk {folder}", (free or 0) >= LEAST_DISK, found, remedy)
    memory = facts["memory"]
    if memory is not None:
        add("memory", memory >= LEAST_MEMORY, f"{_gib(memory)} free", "End what else runs there.")
    checks += _check_devices(host, facts, question)
    if question.thorough:
        tools = [tool for tool in ("compiler", "ninja") if not facts[tool]]
        remedy = "Install g++ (Debian: apt-get install g++) and ninja (pip): DeepSpeed builds ops."
        found = f"no {' and no '.join(tools)}" if tools else "g++, ninja"
        add("build tools", not tools, found, remedy)
    return checks


def _check_devices(host: str, facts: Mapping[str, Any], question: Question) -> list[Check]:
    slots, devices, gpus = question.slots[host], facts["devices"], facts["gpus"]
    remedy = "Lower its slots in the hostfile, or look at nvidia-smi and torch.cuda there."
    if devices is not None and "error" in devices:
        return [Check(host, "accelerators", False, devices["error"], "Set it up again there.")]
    if question.cpu:
        return [Check(host, "accelerators", True, f"CPU, {slots} processes")]
    if devices is not None:
        on_cpu = devices["name"] == "cpu"
        sizes = devices["memory"]
        found = (
            "none: DeepSpeed finds a CPU only"
            if on_cpu
            else f"{devices['count']} {devices['name']}"
        )
        found += f", {_gib(min(sizes))} and more each" if sizes else ""
        enough = not on_cpu and devices["count"] >= slots
        return [
            Check(
                host, "accelerators", enough, f"{found}, {slots} wanted", "" if enough else remedy
            )
        ]
    if gpus is not None:  # the quick look
        enough = len(gpus) >= slots
        found = f"{len(gpus)} GPUs, {slots} wanted"
        return [Check(host, "accelerators", enough, found, "" if enough else remedy)]
    return []


def _master_check(host: str, address: str | None, first: Answer, question: Question) -> Check:
    assert first.facts is not None
    interfaces = first.facts["interfaces"]
    if address is None:
        has = ", ".join(f"{name} {its}" for name, its in interfaces.items())
        wanted = question.network_interface
        found = f"no interface {wanted}; it has {has}" if wanted else f"unclear: it has {has}"
        return Check(
            host, "master address", False, found, "Name one: --network-interface or --master-addr."
        )
    name = next((name for name, its in interfaces.items() if its == address), None)
    # It may be translated on the way there: whether it is reached, shows.
    return Check(host, "master address", True, f"{address} ({name or 'of no interface there'})")


def _reach(address: str, first: str, hosts: Sequence[str], question: Question) -> list[Check]:
    """Whether the master's port is free, and every host reaches it."""
    port, what = question.master_port, f"reaches {address}:{question.master_port}"
    ask = {"verb": "listen", "port": port, "seconds": 3 * REACH_S}
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
        said = _last_json(listener.stdout.readline())
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
            return Check(host, what, ok, found, "" if ok else remedy)

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
    }


def _ask(host: str, question: Question, local: bool) -> Answer:
    request = _request(question)
    if local:
        return Answer(host, this_host.describe(request))
    return _answer_of(host, request, question)


def _answer_of(host: str, request: Mapping[str, Any], question: Question) -> Answer:
    """By ssh; an error that says what to do when there is no answer."""
    command = remote_command(host, request, question)
    before, limit = time.time(), question.timeout
    try:
        done = subprocess.run(
            command, input=PROGRAM, capture_output=True, text=True, timeout=limit, check=False
        )
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
    error = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
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
    """ssh that runs `host.py`, which comes by standard input; no shell reads the question."""
    argument = base64.urlsafe_b64encode(json.dumps(request).encode()).decode()
    port = [] if question.ssh_port is None else ["-p", str(question.ssh_port)]
    limit = f"ConnectTimeout={max(1, int(question.timeout / 2))}"
    return [
        *("ssh", *SSH_OPTIONS, "-o", limit, *port, host),
        f"exec {shlex.quote(sys.executable)} - {argument}",
    ]


def _last_json(text: str) -> dict[str, Any] | None:
    """The answer; a login script may have written lines before it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                answer = json.loads(line)
            except ValueError:
                continue
            return answer if isinstance(answer, dict) else None
    return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
