"""DeepSpeed's accelerator for the device ``pretend``."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from tests.device.pretend import Device

TOTAL_BYTES = 16 << 30


class PretendAccelerator(CPU_Accelerator):
    """A GPU's answers; what builds operators is the CPU's."""

    Stream = torch.Stream
    Event = torch.Event

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._name = "pretend"
        self._communication_backend_name = "pretend-nccl"
        self._device, self._native = device, device.native

    def create_op_builder(self, class_name: str) -> Any:
        if class_name == "ShareMemCommBuilder":  # collectives by shared memory are for CPUs
            return None
        return super().create_op_builder(class_name)

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return "pretend" if device_index is None else f"pretend:{device_index}"

    def device(self, device_index: int | None = None) -> torch.device:
        return torch.device("pretend", self._index(device_index))

    def _index(self, device_index: int | None) -> int:
        return self.current_device() if device_index is None else device_index

    def set_device(self, device_index: int) -> None:
        self._device.set_device(device_index)

    def current_device(self) -> int:
        return self._device.current_device()

    def current_device_name(self) -> str:
        return f"pretend:{self.current_device()}"

    def device_count(self) -> int:
        return self._device.device_count()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "pretend"

    def synchronize(self, device_index: int | None = None) -> None:
        self._device.synchronize()

    def stream(self, stream: Any) -> Any:
        return nullcontext()

    def current_stream(self, device_index: int | None = None) -> torch.Stream:
        return torch.accelerator.current_stream(self.device(device_index))

    default_stream = current_stream

    def get_rng_state(self, device_index: int | None = None) -> torch.Tensor:
        return self._device.get_rng_state(device_index)

    def set_rng_state(self, new_state: torch.Tensor, device_index: int | None = None) -> None:
        self._device.set_rng_state(new_state, device_index)

    def memory_allocated(self, device_index: int | None = None) -> int:
        return self._native.in_use(self._index(device_index))

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return self._native.peak(self._index(device_index))

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        self._native.reset_peak(self._index(device_index))

    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats
    memory_reserved = memory_cached = memory_allocated
    max_memory_reserved = max_memory_cached = max_memory_allocated

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.memory_allocated(device_index),
            "allocated_bytes.all.peak": self.max_memory_allocated(device_index),
        }

    def total_memory(self, device_index: int | None = None) -> int:
        return TOTAL_BYTES

    def available_memory(self, device_index: int | None = None) -> int:
        return TOTAL_BYTES - self.memory_allocated(device_index)

    def is_fp16_supported(self) -> bool:
        return True

    def pin_memory(self, tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()
