"""This process's device through DeepSpeed's accelerator: its name, memory and clock."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from lorasb_ds.system.host_memory import process_bytes, release_freed_memory


def device() -> torch.device:
    """Return this process's device."""
    return torch.device(get_accelerator().current_device_name())


def from_host(numbers: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy Python numbers, or a tensor of the host, to the device, without waiting for the device.

    ``torch.tensor(…, device=…)`` copies synchronously: on CUDA that waits for the whole stream.
    """
    values = torch.as_tensor(numbers, dtype=dtype)
    return values if name() == "cpu" else values.pin_memory().to(device(), non_blocking=True)


def name() -> str:
    """Return the kind of device that DeepSpeed found: ``cpu``, ``cuda``, …"""
    return str(get_accelerator().device_name())


def device_count() -> int:
    """Return the number of this host's devices."""
    return int(get_accelerator().device_count())


def emulates_bf16() -> bool:
    """Return whether bf16 is emulated here, many times slower than another dtype.

    So it is on CPUs without it, where fp32 is fast, and on GPUs before NVIDIA's Ampere, where fp16
    is.
    """
    if name() == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    has_kernels = torch.backends.mkldnn.is_available()
    return name() == "cpu" and not (has_kernels and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def why_no_gpu() -> str:
    """Return why torch finds no GPU, as far as it knows: its build, the driver."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # such as a driver that is too old
        return str(error).partition("\n")[0]
    return "torch.cuda finds none"


def backend_problem() -> str | None:
    """Return why ranks on this accelerator cannot communicate; None if they can, or on CPUs."""
    backend = get_accelerator().communication_backend_name()
    if name() == "cpu" or torch.distributed.is_backend_available(backend):
        return None
    return f"torch {torch.__version__} is built without {backend.upper()}"


def device_id() -> str:
    """Return what tells this process's device from others, on any host."""
    index = get_accelerator().current_device()
    properties = getattr(getattr(torch, name(), None), "get_device_properties", None)
    ids = ("uuid", "pci_domain_id", "pci_bus_id", "pci_device_id")
    found = [str(getattr(properties(index), key, "")) for key in ids] if properties else []
    return f"{name()} {'-'.join(filter(None, found)) or index} of {socket.gethostname()}"


def describe() -> dict[str, Any]:
    """Return what `lorasb doctor` asks about the accelerators of a host."""
    count = 0 if name() == "cpu" else device_count()
    return {
        "name": name(),
        "count": count,
        "memory": [int(get_accelerator().total_memory(i)) for i in range(count)],
        "problem": why_no_gpu() if name() == "cpu" else backend_problem(),
        "emulates_bf16": emulates_bf16(),
    }


class Stopwatch:
    """Measure the time spent in its ``with`` blocks; on an accelerator, by events on its stream."""

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
        """Return the time of all blocks so far; waits for the device."""
        if self._events:
            get_accelerator().synchronize()
        return self._host_s + sum(start.elapsed_time(end) for start, end in self._events) / 1e3


def pinned_zeros(*shape: int) -> torch.Tensor:
    """Return fp32 zeros in host memory, page-locked unless the device is the CPU."""
    zeros = torch.zeros(shape)
    return zeros if name() == "cpu" else get_accelerator().pin_memory(zeros)


def pinned_bytes(size: int) -> torch.Tensor:
    """Return uninitialized bytes in host memory, page-locked unless the device is the CPU."""
    empty = torch.empty(size, dtype=torch.uint8)
    return empty if name() == "cpu" else get_accelerator().pin_memory(empty)


def free_device_bytes() -> int:
    """Return the free memory of this rank's device, which must not be the CPU.

    Works before ``init_process_group``, too. The driver is asked where torch can: DeepSpeed's way
    (nvml) fails where CUDA_VISIBLE_DEVICES names GPUs by UUID and shows the whole GPU in place of
    a MIG instance; without nvml it does not see what other processes use.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    mem_get_info = getattr(getattr(torch, name(), None), "mem_get_info", None)
    if mem_get_info is not None:
        return int(mem_get_info(local_rank)[0])
    return int(get_accelerator().available_memory(local_rank))


def memory_bytes() -> int:
    """Return the memory in use now: the device's, or on a CPU the process's."""
    if name() != "cpu":
        return int(get_accelerator().memory_allocated())
    return process_bytes("VmRSS")


def peak_memory_bytes() -> int:
    """Return the highest ``memory_bytes`` since the last reset."""
    if name() != "cpu":
        return int(get_accelerator().max_memory_allocated())
    return process_bytes("VmHWM")


def reset_peak_memory() -> None:
    """Reset the peak to what is in use now; on a CPU, return freed memory to the system first."""
    if name() != "cpu":
        get_accelerator().reset_peak_memory_stats()
        return
    release_freed_memory()
    try:
        # Linux: 5 resets this process's high-water mark to what it holds now.
        with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
            file.write("5")
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the process's whole life
