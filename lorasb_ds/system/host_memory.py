"""Free memory of this host, and memory of this process. Torch-free; Linux."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that processes may still take: MemAvailable, or less in a cgroup.

    Cached files count as available in both.
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


def ranks_of_host(default: int = 1) -> int:
    """Return this job's number of ranks on this host, set by DeepSpeed's launcher or torchrun."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or default)


def process_bytes(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes; without /proc, its peak for both."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_freed_memory() -> None:
    """Return freed memory to the system: glibc keeps pieces of up to 32 MiB."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _cgroups(proc: Path, cgroups: Path) -> list[Path]:
    """Return the folders of this process's cgroup (version 2) and its parents that have a limit."""
    lines = (
        (proc / "self/cgroup").read_text().splitlines() if (proc / "self/cgroup").is_file() else []
    )
    paths = [line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")]
    folders = [folder for path in paths for folder in (cgroups / path, *(cgroups / path).parents)]
    return [f for f in folders if f.is_relative_to(cgroups) and (f / "memory.max").is_file()]
