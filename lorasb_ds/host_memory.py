"""How much memory this host has left for a process. Torch-free; Linux."""

from __future__ import annotations

import os
from pathlib import Path


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """What processes may still take: the kernel's MemAvailable, or what a cgroup leaves.

    Files that are only cached count as available in both.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    left = [fields["MemAvailable"]]
    for folder in _cgroups(proc, cgroups):
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0))))
    return min(left)


def ranks_of_host() -> int:
    """Ranks of this job on this host, as DeepSpeed's launcher (or torchrun) tells them."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """Folders of this process's cgroup (version 2) and those above it that have a limit."""
    lines = (
        (proc / "self/cgroup").read_text().splitlines() if (proc / "self/cgroup").is_file() else []
    )
    paths = [line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")]
    folders = [folder for path in paths for folder in (cgroups / path, *(cgroups / path).parents)]
    return [f for f in folders if f.is_relative_to(cgroups) and (f / "memory.max").is_file()]
