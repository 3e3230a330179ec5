"""Hosts and their slots: DeepSpeed's hostfile, and the hosts that a job gets. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorasb_ds.config.paths import expand_home
from lorasb_ds.errors import ConfigError

MAX_SLOTS = 1024
MAX_HOSTS = 65536
MAX_PROBLEMS = 20  # of a file: one that is no hostfile at all would fill the screen

HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
NAMES = (
    "Names go through a remote shell: only letters, digits, '.', '_' and '-', with a letter or "
    "digit first."
)


def read_hostfile(path: str) -> dict[str, int]:
    """Read host -> number of slots from lines ``host slots=N``; ``#`` begins a comment.

    DeepSpeed's `fetch_hostfile` reads the same from every file that this accepts.

    Raises:
        ConfigError: if there is no such file (DeepSpeed would run on this host alone), or a line
            has another form; one paragraph per line.
    """
    file = Path(expand_home(path))
    try:
        if not file.is_file():
            what = "this is not a file" if file.exists() else "there is no such file"
            raise ConfigError(f"--hostfile {path}: {what}. Name one of lines `host slots=N`.")
        text = file.read_bytes().decode("utf-8", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"--hostfile {path}: {error.strerror}. Make it readable.") from error
    hosts: dict[str, int] = {}
    lines: dict[str, int] = {}  # of each host, to find a second one; ssh ignores case
    problems: list[str] = []
    # Only these end a line for DeepSpeed; str.splitlines knows more.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        try:
            if (entry := _entry(line)) is None:
                continue
            host, column, slots = entry
            if host.lower() in lines:
                first = lines[host.lower()]
                raise _LineError(column, f"line {first} names {host} already. Keep one of the two")
        except _LineError as error:
            problems.append(
                f"--hostfile {path}, line {number}, column {error.column}: {error}. "
                "A line is `host slots=N`."
            )
            continue
        hosts[host] = slots
        lines[host.lower()] = number
    if problems:
        if (more := len(problems) - MAX_PROBLEMS) > 0:
            problems[MAX_PROBLEMS:] = [f"--hostfile {path}: so for {more} more lines."]
        raise ConfigError(*problems)
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host. Add lines of `host slots=N`.")
    return hosts


class _LineError(Exception):
    """What is wrong with a line, and the column (from 1) where."""

    def __init__(self, column: int, problem: str) -> None:
        super().__init__(problem)
        self.column = column


def _entry(line: str) -> tuple[str, int, int] | None:
    """Parse a line into host, column and slots; None if it has only a comment."""
    if bad := re.search(r"[\0\udc80-\udcff]", line):
        what = "a NUL byte" if bad[0] == "\0" else "a byte that is not UTF-8"
        raise _LineError(bad.start() + 1, f"{what}. Save the file as plain text")
    entry = line.partition("#")[0].rstrip(" \t")
    words = list(re.finditer(r"[^ \t]+", entry))
    if not words:
        return None
    host, column = words[0][0], words[0].start() + 1
    if problem := bad_name(host):
        position, why = problem
        raise _LineError(column + position, f"{why} in a host's name. {NAMES[:-1]}")
    if len(words) == 1:
        raise _LineError(len(entry) + 1, f"no slots after {host}. Add how many GPUs it has")
    slots, column_of_slots = words[1][0], words[1].start() + 1
    match = re.fullmatch(r"slots=([0-9]+)", slots)
    if match is None:
        raise _LineError(
            column_of_slots, f"{short(slots)} is not `slots=` and a number. Write it as slots=8"
        )
    digits = match[1].lstrip("0")
    if not digits or len(digits) > 4 or int(digits) > MAX_SLOTS:
        raise _LineError(
            column_of_slots, f"{short(slots)} is not from 1 to {MAX_SLOTS}. Give the host's GPUs"
        )
    if len(words) > 2:
        raise _LineError(
            words[2].start() + 1,
            f"{short(words[2][0])} after the entry. Remove it, or put # before it",
        )
    return host, column, int(digits)


def bad_name(host: str) -> tuple[int, str] | None:
    """Return the position (from 0) of what is not allowed in a host's name, and what it is."""
    good = HOST.match(host)
    position = good.end() if good else 0
    if good and position == len(host):
        return None
    character = host[position : position + 1]
    return position, f"{character!a} at the start" if character in {*"-._"} else f"{character!a}"


def short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "…")


def write_hostfile(hosts: Mapping[str, int]) -> str:
    """Return the text of a hostfile."""
    return "".join(f"{host} slots={slots}\n" for host, slots in hosts.items())


def equal_slots(hosts: Mapping[str, int], path: str) -> int:
    """Return the number of slots that each host has.

    Args:
        path: of the hostfile, for messages.
    Raises:
        ConfigError: if they differ.
    """
    slots = set(hosts.values())
    if len(slots) > 1:
        raise ConfigError(
            f"--hostfile {path}: hosts have {', '.join(map(str, sorted(slots)))} slots, and must "
            "be equal here. Give each the smallest of these numbers."
        )
    return slots.pop()


def select(
    hosts: Mapping[str, int],
    include: str = "",
    exclude: str = "",
    num_nodes: int | None = None,
    num_slots: int | None = None,
    slots_option: str = "--num-gpus",
) -> dict[str, list[int]]:
    """Return host -> ids of the slots that a job gets, in the order of the hostfile.

    They are those that DeepSpeed's `--include`, `--exclude`, `--num_nodes` and `--num_gpus` select,
    except for three things. DeepSpeed accepts more slots than a host has, and a host that a filter
    names both whole and by slots (it would forget the "whole"): these are refused here. DeepSpeed
    refuses a filter together with a number of hosts or slots: here, these count what the filter
    leaves.

    Args:
        include: only these, as in ``host1@host2:0,2``; a host without slots means all of its slots.
        exclude: all but these, in the same form.
        num_nodes: number of hosts to take, the first ones of those.
        num_slots: number of slots to take of each, the first ones.
        slots_option: name of num_slots on the command line.
    Raises:
        ConfigError: if the hosts do not have what is asked for, or nothing is left.
    """
    counts = {"--num-nodes": num_nodes, slots_option: num_slots}
    filters = [name for name, value in [("--include", include), ("--exclude", exclude)] if value]
    if len(filters) > 1:
        raise ConfigError(f"{' and '.join(filters)} exclude each other. Give one of them.")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value} is below 1. Raise it, or leave it out for all.")
    slots = {host: list(range(count)) for host, count in hosts.items()}
    if include:
        chosen = _parse_filter("--include", include, hosts)
        slots = {host: chosen[host] or slots[host] for host in slots if host in chosen}
    elif exclude:
        out = _parse_filter("--exclude", exclude, hosts)
        slots = {
            host: [i for i in ids if i not in (out[host] or ids)] if host in out else ids
            for host, ids in slots.items()
        }
    slots = {host: ids for host, ids in slots.items() if ids}
    if not slots:
        raise ConfigError(f"{' '.join(filters) or '--hostfile'} leaves no slot. Name fewer hosts.")
    if num_nodes is not None and num_nodes > len(slots):
        what = f"{filters[0]} leaves" if filters else "the hostfile has"
        raise ConfigError(
            f"--num-nodes {num_nodes}, but {what} {len(slots)}: {_listed(slots)}. "
            "Lower it, or add hosts."
        )
    slots = dict(list(slots.items())[:num_nodes])
    if num_slots is not None:
        if few := [f"{host} has {len(ids)}" for host, ids in slots.items() if len(ids) < num_slots]:
            raise ConfigError(
                f"{slots_option} {num_slots}, but {_listed(few)}. Lower it, or leave the host out."
            )
        slots = {host: ids[:num_slots] for host, ids in slots.items()}
    return slots


def _parse_filter(option: str, text: str, hosts: Mapping[str, int]) -> dict[str, list[int]]:
    """Parse a filter into host -> its slots, ascending; an empty list means the whole host."""
    found: dict[str, list[int]] = {}
    problems: list[str] = []
    for spec in text.split("@"):
        match = re.fullmatch(rf"({HOST.pattern})(?::([0-9]{{1,9}}(?:,[0-9]{{1,9}})*))?", spec)
        if match is None:
            problems.append(
                f"{option} {short(text)}: {short(spec)} is not HOST or HOST:SLOT,SLOT (hosts "
                "are separated by @). Write it as host1@host2:0,2."
            )
            continue
        host, ids = match[1], [int(i) for i in (match[2] or "").split(",") if i]
        if host not in hosts:
            problems.append(f"{option}: there is no host {host}. There are {_listed(hosts)}.")
        elif missing := [i for i in ids if i >= hosts[host]]:
            problems.append(
                f"{option}: {host} has no slot {missing[0]}. Its slots are 0 to {hosts[host] - 1}."
            )
        elif host in found and bool(found[host]) != bool(ids):
            problems.append(f"{option} names {host} both whole and by slots. Choose one.")
        else:
            found[host] = sorted({*found.get(host, []), *ids})
    if problems:
        raise ConfigError(*problems)
    return found


def _listed(names: Iterable[str], at_most: int = 8) -> str:
    names = list(names)
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")
