"""4-bit bases, and the only import of bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def nf4_config(compute_dtype: torch.dtype) -> Any:
    """NF4 with double quantization, as transformers' ``quantization_config``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def keep_weights_as_stored(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack weights in place.

    On CPUs with AVX512-BF16 its ``Linear4bit`` does so at the first forward in eval mode. Under
    ZeRO-3 the repacked bytes would be read as the stored ones after the next gather, and in train
    mode they cannot be differentiated through: wrong numbers without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dequantized(weight: nn.Parameter) -> torch.Tensor:
    """The whole weight (out, in) of a 4-bit layer, in its compute dtype."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
