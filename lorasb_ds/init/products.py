"""Products ``δᵀ x`` in fp32 of factors in any dtype. Torch only, local."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def weight_gradient(long: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
    """Return ``longᵀ short`` in fp32, as exact as fp32 is.

    Args:
        long, short: (tokens, features), any floating dtypes.
    """
    with _exact_products(long, short):
        if long.dtype == short.dtype and _has_fp32_output(long):
            found: torch.Tensor = torch.mm(long.T, short, out_dtype=torch.float32)
            return found
        return long.float().T @ short.float()


def _has_fp32_output(factor: torch.Tensor) -> bool:
    """Return whether the device multiplies 16-bit numbers with results in fp32 (CUDA does)."""
    key = torch._C._dispatch_key_for_device(factor.device.type)
    return factor.dtype in (torch.bfloat16, torch.float16) and (
        torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype", key)
    )


@contextmanager
def _exact_products(*factors: torch.Tensor) -> Iterator[None]:
    """Let fp32 matrix products use bf16 or TF32 hardware if all factors came from bf16.

    Rounding such values to either format changes nothing, and sums stay in fp32: the result is
    that of fp32, at twice its speed on CPUs with AVX512-BF16.
    """
    if any(factor.dtype != torch.bfloat16 for factor in factors):
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
