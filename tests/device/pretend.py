"""Build pretend.cpp, and make it the device ``pretend`` of this process: ``torch.pretend``."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("pretend.cpp")
ROOT = SOURCE.parents[2]


def missing() -> str | None:
    """What is not here that builds the extension, as scripts/setup.sh asks for it."""
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"there is no {compiler}"
    return None if cpp_extension.is_ninja_available() else "there is no ninja"


def load() -> ModuleType:
    """Build the extension if its source or torch has changed, some 40 s, and load it.

    It is kept where DeepSpeed's operators are. Processes that build at once wait for each other;
    torch's own lock would outlast a process that is killed.
    """
    base = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(base) / f"lorasb_pretend_{sys.implementation.cache_tag}_torch{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "build.lock"):
        (folder / "lock").unlink(missing_ok=True)
        return cpp_extension.load(
            "lorasb_pretend",
            [str(SOURCE)],
            build_directory=str(folder),
            extra_cflags=["-O0"],  # the CPU's kernels do the work
        )


class Device:
    """``torch.pretend``: what torch and DeepSpeed ask of a device's module."""

    def __init__(self, native: ModuleType) -> None:
        self.native = native
        self.set_device = lambda device: native.set_device(self._index(device))
        self.current_device = native.current_device
        self.device_count = native.count

    def _index(self, device: Any) -> int:
        index = device if isinstance(device, int) else torch.device(device or "pretend").index
        return self.current_device() if index is None else index

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        self.native.default_generator(self.current_device()).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for index in range(self.device_count()):
            self.native.default_generator(index).manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.native.default_generator(self._index(device)).get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.native.default_generator(self._index(device)).set_state(state)

    def synchronize(self, device: Any = None) -> None:
        _count_wait("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_autocast_enabled(self) -> bool:
        return False


COUNTED = ("lorasb_ds", "deepspeed", "transformers", "bitsandbytes", "peft")
OF_THE_DEVICE = ("pretend.py", "accelerator.py")  # they only pass a call on

# (why, the line that asked for it) -> how often this process's host has waited for its device.
host_waits: Counter[tuple[str, str]] = Counter()


def _count_wait(why: str) -> None:
    """Count a wait for the innermost line of the project or of a library; else for the caller's."""
    frame: Any = sys._getframe(1)
    other = None
    while frame is not None:
        path = frame.f_code.co_filename
        if any(f"/{package}/" in path for package in COUNTED):
            break
        if other is None and "/torch/" not in path and Path(path).name not in OF_THE_DEVICE:
            other = frame
        frame = frame.f_back
    frame = frame or other
    where = "?"
    if frame is not None:
        path = frame.f_code.co_filename
        where = f"{path.rpartition('site-packages/')[-1].removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
    host_waits[why, where] += 1


def enable() -> Device:
    """Make this process's device ``pretend``; its accelerator in torch, too."""
    torch.utils.rename_privateuse1_backend("pretend")
    device = Device(load())
    device.native.when_host_waits(_count_wait)
    torch._register_device_module("pretend", device)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.Tensor.data = property(_data.__get__, _set_data)  # type: ignore[assignment]
    return device


_data = torch._C.TensorBase.data


def _set_data(self: torch.Tensor, value: torch.Tensor) -> None:
    """``tensor.data = value``: torch lets it change the device to CUDA, but not to other kinds."""
    kinds = {self.device.type, value.device.type}
    if len(kinds) == 1 or "meta" in kinds:
        _data.__set__(self, value)
        return
    is_parameter = isinstance(self, torch.nn.Parameter)
    swapped = torch.nn.Parameter(value, self.requires_grad) if is_parameter else value.detach()
    kept = dict(vars(self))
    torch.utils.swap_tensors(self, swapped)
    vars(self).update(kept)


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """The waits inside the ``with`` block, in the counter once it has ended."""
    before, inside = host_waits.copy(), Counter[tuple[str, str]]()
    yield inside
    inside.update(host_waits - before)
