"""This process's device, whatever its kind: what it holds, and how long it works.

Of DeepSpeed's accelerator; with ``zero`` the only import of deepspeed.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from lorasb_ds.system.host_memory import process_bytes, release_freed_memory


def device() -> torch.device:
    """This process's device."""
    return torch.device(get_accelerator().current_device_name())


def name() -> str:
    """``cpu``, ``cuda``, … as DeepSpeed found it."""
    return str(get_accelerator().device_name())


def device_count() -> int:
    """Devices of this host that processes can have."""
    return int(get_accelerator().device_count())


class Stopwatch:
    """Seconds spent inside its ``with`` blocks; on an accelerator, by events on its stream."""

    def __init__(self) -> None:
        self._host_s = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        if name() == "cpu":
            self._start: Any = time.perf_counter()
        else:
            self._start = get_accelerator().Event(enable_timing=True)
            self._start.record()

    def __exit__(self, *_: object) -> None:
        if name() == "cpu":
            self._host_s += time.perf_counter() - self._start
        else:
            end = get_accelerator().Event(enable_timing=True)
            end.record()
            self._events.append((self._start, end))

    def seconds(self) -> float:
        """Of all blocks so far; waits for the device."""
        if self._events:
            get_accelerator().synchronize()
        return self._host_s + sum(start.elapsed_time(end) for start, end in self._events) / 1e3


def pinned_zeros(*shape: int) -> torch.Tensor:
    """fp32 zeros in host memory, page-locked where there is another memory."""
    zeros = torch.zeros(shape)
    return zeros if name() == "cpu" else get_accelerator().pin_memory(zeros)


def pinned_bytes(size: int) -> torch.Tensor:
    """Bytes in host memory, of any value; page-locked where there is another memory."""
    empty = torch.empty(size, dtype=torch.uint8)
    return empty if name() == "cpu" else get_accelerator().pin_memory(empty)


def free_device_bytes() -> int:
    """Of this rank's device, which is not the CPU; before ``init_process_group``, too."""
    return int(get_accelerator().available_memory(int(os.environ.get("LOCAL_RANK", 0))))


def memory_bytes() -> int:
    """Memory in use now: the device's, on a CPU the process's."""
    if name() != "cpu":
        return int(get_accelerator().memory_allocated())
    return process_bytes("VmRSS")


def peak_memory_bytes() -> int:
    """Highest memory in use since the last reset: the device's, on a CPU the process's."""
    if name() != "cpu":
        return int(get_accelerator().max_memory_allocated())
    return process_bytes("VmHWM")


def reset_peak_memory() -> None:
    """Measure the peak from what is in use now on; on a CPU, freed memory is handed back first."""
    if name() != "cpu":
        get_accelerator().reset_peak_memory_stats()
        return
    release_freed_memory()
    try:
        # Linux: 5 sets the high-water mark of this process back to what it holds now.
        with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
            file.write("5")
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the whole process
