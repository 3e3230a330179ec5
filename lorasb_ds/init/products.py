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
    # Rounding bf16 values to bf16 or TF32 changes nothing, and sums stay in fp32: the result is
    # that of fp32, at twice its speed on CPUs with AVX512-BF16.
    from_bf16 = long.dtype == short.dtype == torch.bfloat16
    with full_precision("medium" if from_bf16 else "highest"):
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
def full_precision(of_fp32: str = "highest") -> Iterator[None]:
    """Keep matrix products' sums in fp32 inside, and their factors as ``of_fp32`` says.

    Also a decorator. Environments turn TF32 on for products of fp32 (NVIDIA's containers, by
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1), and CUDA may keep partial sums of 16-bit products in 16
    bits, which is torch's default.

    Args:
        of_fp32: as ``torch.set_float32_matmul_precision`` takes it.
    """
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(of_fp32)
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
