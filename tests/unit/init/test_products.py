"""Products as exact as fp32, whatever the environment allows."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorasb_ds.init.products import weight_gradient
from lorasb_ds.init.sharded_svd import truncated_svd


def test_products_keep_fp32_whatever_was_set_before() -> None:
    """TF32 that the environment turned on, and CUDA's 16-bit sums, end at our products."""
    matmul = torch.backends.cuda.matmul
    seen: list[tuple[str, bool]] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.mm.default:
                reduced = matmul.allow_bf16_reduced_precision_reduction
                seen.append((torch.get_float32_matmul_precision(), reduced))
            return func(*args, **(kwargs or {}))

    torch.set_float32_matmul_precision("high")
    try:
        with Spy():
            weight_gradient(torch.randn(5, 4), torch.randn(5, 3))
            truncated_svd(torch.randn(300, 250).sign().to(torch.int8), 4)
        assert set(seen) == {("highest", False)}
        assert torch.get_float32_matmul_precision() == "high"
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")
