"""Hosts and slots of a Slurm allocation, from its variables. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import product
from math import prod

from launcher.hosts.hostfile import MAX_HOSTS, MAX_SLOTS, NAMES, bad_name, short
from lorasb_ds.errors import ConfigError


def expand_hostlist(text: str) -> list[str]:
    """Expand Slurm's ``gpu[01-03,07],login1``, in the order of `scontrol show hostnames`.

    Raises:
        ConfigError: if it has another form, names a host twice, or more than 65536 hosts.
    """
    items: list[list[str]] = [[]]
    for piece in re.findall(r"\[[^\[\]]*\]|,|[^,\[]+|\[", text):
        if piece == ",":
            items.append([])
        else:
            items[-1].append(piece)
    hosts: list[str] = []
    for item in items:
        parts = [_ranges(part, text) if part[0] == "[" else part for part in item]
        counts = [sum(len(ids) for ids, _ in part) for part in parts if not isinstance(part, str)]
        if len(hosts) + prod(counts) > MAX_HOSTS:
            raise ConfigError(
                f"The list of hosts {short(text)} names more than {MAX_HOSTS}. Shorten it."
            )
        choices = [[part] if isinstance(part, str) else _padded(part) for part in parts]
        names = ["".join(name) for name in product(*choices)]
        if bad_name(names[0]):  # the others differ in digits only
            raise _bad_hostlist(text, "".join(item))
        hosts += names
    if len(set(hosts)) < len(hosts):
        raise ConfigError(f"The list of hosts {short(text)} names one twice. Name each once.")
    return hosts


def _ranges(text: str, whole: str) -> list[tuple[range, int]]:
    """Parse ``[01-03,07]`` into the numbers of each range, and their width."""
    result = []
    for one in text[1:-1].split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", one)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _bad_hostlist(whole, text)
        result.append((range(int(match[1]), int(match[2] or match[1]) + 1), len(match[1])))
    return result


def _padded(numbers: Iterable[tuple[range, int]]) -> list[str]:
    return [f"{i:0{width}}" for ids, width in numbers for i in ids]


def _bad_hostlist(text: str, part: str) -> ConfigError:
    return ConfigError(
        f"{short(part)} in the list of hosts {short(text)} is not as in gpu[01-03,07],login1. "
        f"{NAMES}"
    )


def slurm_slots(text: str) -> list[int]:
    """Expand Slurm's ``8(x3),4`` (SLURM_TASKS_PER_NODE) into a number for each host.

    Raises:
        ConfigError: if it has another form, or a number is out of range.
    """
    result: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]{1,4})(?:\(x([0-9]{1,5})\))?", item)
        slots, times = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
        if not 1 <= slots <= MAX_SLOTS or not 1 <= times <= MAX_HOSTS - len(result):
            raise ConfigError(
                f"{short(item)} in the slots {short(text)} is not as in 8(x3),4, of 1 to "
                f"{MAX_SLOTS} for each of at most {MAX_HOSTS} hosts. Give --slots N."
            )
        result += [slots] * times
    return result


def from_slurm(environment: Mapping[str, str], slots: int | None = None) -> dict[str, int]:
    """Return host -> number of slots of the Slurm allocation that this process runs in.

    Args:
        slots: number for every host, whatever Slurm says.
    Raises:
        ConfigError: if this is not an allocation, or Slurm does not say how many slots there are.
    """
    nodes = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
    if not nodes:
        raise ConfigError(
            "This is not a Slurm allocation: SLURM_JOB_NODELIST is not set. Run it by salloc or "
            "sbatch, or write the hostfile yourself."
        )
    hosts = expand_hostlist(nodes)
    if slots is not None:
        if not 1 <= slots <= MAX_SLOTS:
            raise ConfigError(f"--slots {slots} is not from 1 to {MAX_SLOTS}. Give a host's GPUs.")
        return dict.fromkeys(hosts, slots)
    for name in (
        "SLURM_GPUS_PER_NODE",
        "SLURM_GPUS_ON_NODE",
        "SLURM_NTASKS_PER_NODE",
        "SLURM_TASKS_PER_NODE",
    ):
        if not (value := environment.get(name)):
            continue
        # `a100:4` and `gpu:a100:4` name the kind as well.
        count = value.rpartition(":")[2] if name == "SLURM_GPUS_PER_NODE" else value
        try:
            numbers = slurm_slots(count)
        except ConfigError as error:
            raise ConfigError(f"{name}={value}: {error}") from error
        if len(numbers) == 1 and name != "SLURM_TASKS_PER_NODE":
            numbers *= len(hosts)  # all but the last are one number for every host
        if len(numbers) != len(hosts):
            raise ConfigError(
                f"{name}={value} counts {len(numbers)} hosts, but SLURM_JOB_NODELIST has "
                f"{len(hosts)}. Give --slots N."
            )
        return dict(zip(hosts, numbers, strict=True))
    raise ConfigError(
        "Slurm does not say how many GPUs a host has: SLURM_GPUS_PER_NODE, SLURM_GPUS_ON_NODE, "
        "SLURM_NTASKS_PER_NODE and SLURM_TASKS_PER_NODE are not set. Give --slots N."
    )
