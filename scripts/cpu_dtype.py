"""Print bf16, or fp32 where this machine's CPUs emulate bf16, which is many times slower."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from lorasb_ds.distributed.accelerator import emulates_bf16

print("fp32" if emulates_bf16() else "bf16")
