"""Time, memory and bytes read of a piece of work, and bytes of parameters, in each rank.

Run as a script it is the sampler: a process of its own, which no lock of the other one holds up.
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

INTERVAL_S = 0.005
T = TypeVar("T")


def watched(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Measure a piece of work, beyond what this process held before. Collective. Linux.

    Returns:
        What ``work`` returned, which is held while what stays is counted; and
        seconds, from barrier to barrier;
        anon_before_bytes: what this process held of anonymous memory;
        anon_peak_bytes and mapped_peak_bytes: of anonymous memory and of mapped files, sampled;
        peak_bytes: of all memory, as the kernel keeps it;
        anon_after_bytes: what stays, after garbage collection;
        read_bytes: by read calls, cached or not; pages of mapped files are not in it.
    """
    import torch.distributed as dist

    from lorasb_ds.distributed import accelerator
    from lorasb_ds.system.host_memory import release_freed_memory

    gc.collect()
    release_freed_memory()  # before the sampler sees it
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as sampler:
        assert sampler.stdout is not None
        sampler.stdout.readline()  # it has started
        accelerator.reset_peak_memory()
        before, read_before = status_of(os.getpid()), _read_bytes()
        dist.barrier()
        start = time.perf_counter()
        result = work()
        dist.barrier()
        seconds = time.perf_counter() - start
        peak, read_after = status_of(os.getpid())["VmHWM"], _read_bytes()
        sampled = json.loads(sampler.communicate()[0])
    gc.collect()
    return result, {
        "seconds": seconds,
        "anon_before_bytes": before["RssAnon"],
        "anon_peak_bytes": sampled["RssAnon"] - before["RssAnon"],
        "mapped_peak_bytes": sampled["RssFile"] - before["RssFile"],
        "peak_bytes": peak - before["VmRSS"],
        "anon_after_bytes": status_of(os.getpid())["RssAnon"] - before["RssAnon"],
        "read_bytes": read_after - read_before,
    }


def held(weight: Any) -> Any:
    """Return this rank's part of a parameter: under ZeRO-3 its shard."""
    return getattr(weight, "ds_tensor", weight).detach()


def held_bytes(parameters: Iterable[Any]) -> int:
    """Return the bytes of this rank's parts of parameters, with the scales of bitsandbytes."""
    total = 0
    for weight in parameters:
        total += held(weight).nbytes
        if (state := getattr(weight, "quant_state", None)) is not None:  # NF4
            total += state.absmax.nbytes + state.state2.absmax.nbytes
        if (scales := getattr(weight, "SCB", None)) is not None:  # int8
            total += scales.nbytes
    return total


def status_of(pid: int) -> dict[str, int]:
    """Return the kernel's counts of a process's memory, in bytes; empty when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in sizes}


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def _sample(pid: int) -> None:
    """Print the peaks of a process's memory when the input ends, as it does with that process."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    print("started", flush=True)
    ended = False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], INTERVAL_S)[0])
        status = status_of(pid)
        peaks = {key: max(peak, status.get(key, 0)) for key, peak in peaks.items()}
    print(json.dumps(peaks))


if __name__ == "__main__":
    _sample(int(sys.argv[1]))
