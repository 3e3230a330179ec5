"""What a host must have for a job, and how its answer is judged. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from launcher.paths import WORKERS
from lorasb_ds.errors import printable

PACKAGES = (
    *("torch", "deepspeed", "transformers", "datasets", "safetensors", "numpy", "lorasb-ds"),
    *("bitsandbytes", "accelerate", "peft", "tokenizers"),
)
ROOT = WORKERS.parent
CLOCKS_APART_S = 5.0
LONGEST_CELL = 300  # characters
LEAST_DISK = LEAST_MEMORY = 1 << 28  # bytes; `lorasb plan` says what a run needs


@dataclass(frozen=True)
class Check:
    """The result of one check on one host."""

    host: str
    what: str
    ok: bool
    found: str
    remedy: str = ""


def judged(host: str, what: str, ok: bool, found: str, remedy: str) -> Check:
    """Make a check, with its remedy if it has failed."""
    return Check(host, what, ok, found, "" if ok else remedy)


@dataclass(frozen=True)
class Question:
    """What the hosts are asked.

    Args:
        slots: host -> number of processes that it is to run.
        cpu: whether these run on CPUs.
        paths: files and folders that every host must see.
        disk: folders that are written to.
        timeout: seconds, for every host.
        thorough: ask for what takes seconds, too: accelerators by DeepSpeed, a compiler.
        programs: that this host needs.
    """

    slots: Mapping[str, int]
    cpu: bool = False
    paths: Sequence[str] = ()
    disk: Sequence[str] = ()
    master_addr: str | None = None
    master_port: int = 29500
    network_interface: str | None = None
    ssh_port: int | None = None
    timeout: float = 20.0
    thorough: bool = False
    programs: Sequence[str] = ()


@dataclass
class Answer:
    """What one host answered, or why it did not."""

    host: str
    facts: dict[str, Any] | None
    error: str = ""
    remedy: str = ""
    clock_offset: float = 0.0  # seconds ahead of this host's clock
    rtt: float = 0.0


def check_answer(
    answer: Answer, mine: Mapping[str, Any], question: Question, local: bool = False
) -> list[Check]:
    """Compare a host's answer with what the job needs, and with this host.

    An answer that makes no sense is taken for none: ``answer.facts`` is None then.
    """
    if answer.facts is not None:
        try:
            return _compare(answer, answer.facts, mine, question, local)
        except (AttributeError, KeyError, TypeError, ValueError):
            answer.facts, answer.error = None, "an answer that makes no sense"
            answer.remedy = f"Look at what `ssh {answer.host} true` prints before the answer."
    return [Check(answer.host, "ssh", False, answer.error, answer.remedy)]


def _compare(
    answer: Answer,
    facts: Mapping[str, Any],
    mine: Mapping[str, Any],
    question: Question,
    local: bool,
) -> list[Check]:
    host = answer.host
    if missing := mine.keys() - facts.keys():
        raise KeyError(*missing)
    if not isinstance(facts.get("hostname", ""), str) or not isinstance(facts["interfaces"], dict):
        raise TypeError
    checks: list[Check] = []

    def add(what: str, ok: bool, found: str, remedy: str = "") -> None:
        checks.append(judged(host, what, ok, found, remedy))

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
        found = facts["code"] if same else f"{facts['code'] or f'no {ROOT}'} (here {mine['code']})"
        add("code", same, found, remedy)
        remedy = "DeepSpeed changes to it on every host: make it, share it, or start elsewhere."
        add("directory", facts["cwd"], str(Path.cwd()), remedy)
        ahead = answer.clock_offset
        remedy = "Set the clocks by NTP (chrony, systemd-timesyncd)."
        close = abs(ahead) <= CLOCKS_APART_S + answer.rtt
        add("clock", close, f"{ahead:+.1f} s", remedy)
    for path, size in facts["sizes"].items():
        here = mine["sizes"].get(path)
        found = f"{size} bytes" if size == here else f"{size} bytes, {here} here"
        remedy = "Copy or mount it there under the same path."
        found = "missing" if size is None else found
        add(f"file {path}", size is not None and size == here, found, remedy)
    for folder, free in facts["disk"].items():
        found = f"{_gib(free)} free" if free is not None else "cannot be written"
        remedy = "Make room, or name another --output-dir."
        add(f"disk {folder}", (free or 0) >= LEAST_DISK, found, remedy)
    memory = facts["memory"]
    if memory is not None:
        add("memory", memory >= LEAST_MEMORY, f"{_gib(memory)} free", "End what else runs there.")
    checks += _check_devices(host, facts, question)
    if facts["locks"]:
        remedy = f"A build was killed; every job would wait for it. rm {' '.join(facts['locks'])}"
        add("build locks", False, f"{len(facts['locks'])} older than 10 minutes", remedy)
    if question.thorough:
        tools = [tool for tool in ("compiler", "ninja") if not facts[tool]]
        remedy = "Install g++ (Debian: apt-get install g++) and ninja (pip): DeepSpeed builds ops."
        found = f"no {' and no '.join(tools)}" if tools else "g++, ninja"
        add("build tools", not tools, found, remedy)
    return checks


def _check_devices(host: str, facts: Mapping[str, Any], question: Question) -> list[Check]:
    slots, devices, gpus = question.slots[host], facts["devices"], facts["gpus"]
    remedy = "Ask for fewer (slots, --num-gpus), look at nvidia-smi, or take the CPU: --num-procs."
    if devices is not None and "error" in devices:
        return [Check(host, "accelerators", False, devices["error"], "Install them again there.")]
    if question.cpu:
        return [Check(host, "accelerators", True, f"CPU, {slots} process(es)")]
    if devices is not None:
        on_cpu = devices["name"] == "cpu"
        sizes = devices["memory"]
        problem = devices.get("problem")  # older code on the host does not say
        found = (
            f"none: DeepSpeed finds a CPU only{f' ({problem})' if problem else ''}"
            if on_cpu
            else f"{devices['count']} {devices['name']}"
        )
        found += f", {_gib(min(sizes))} and more each" if sizes else ""
        enough = not on_cpu and devices["count"] >= slots
        checks = [judged(host, "accelerators", enough, f"{found}, {slots} wanted", remedy)]
        if not on_cpu and problem:
            checks.append(Check(host, "communication", False, problem, "Install torch's wheels."))
        if not on_cpu and devices.get("emulates_bf16"):
            checks.append(Check(host, "dtype", True, "no bf16 arithmetic: --dtype fp16 is faster"))
        return checks
    if gpus is not None:  # the quick look
        enough = len(gpus) >= slots
        found = f"{len(gpus)} GPUs, {slots} wanted"
        return [judged(host, "accelerators", enough, found, remedy)]
    return []


def check_master(host: str, address: str | None, first: Answer, question: Question) -> Check:
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
    # It may be translated on the way there; `_reach` tries it.
    return Check(host, "master address", True, f"{address} ({name or 'of no interface there'})")


def choose_master_addr(
    interfaces: Mapping[str, str],
    routes: Mapping[str, str | None],
    asked_for: str | None,
    resolved: str | None,
) -> str | None:
    """Return the address of the first host at which the others meet; None if it is unclear.

    Args:
        interfaces: those of the first host, with their addresses.
        routes: another host -> the first host's address on the way to it.
        asked_for: an interface.
        resolved: what the first host's name resolves to here; on that host it may be 127.0.1.1.
    """
    if asked_for is not None:
        return interfaces.get(asked_for)
    outside = [a for a in interfaces.values() if not a.startswith("127.")]
    if resolved in outside:
        return resolved
    ways = [address for address in routes.values() if address in outside]
    return ways[0] if ways else (outside[0] if len(outside) == 1 else None)


def report(checks: Sequence[Check], color: bool = False) -> str:
    """Return the table, and below it what to do about each red line."""
    rows = [("ok" if c.ok else "RED", *map(_plain, (c.host, c.what, c.found))) for c in checks]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    if color:
        styled = zip(lines, checks, strict=True)
        lines = [click.style(line, fg="green" if check.ok else "red") for line, check in styled]
    remedies = [f"{c.host}: {_plain(c.what)}: {c.remedy}" for c in checks if not c.ok]
    return "\n".join([*lines, *(["", *remedies] if remedies else [])])


def _plain(said: object) -> str:
    """Return what a host may have said, so that nothing in it moves the terminal's cursor."""
    return printable(str(said))[:LONGEST_CELL]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
