"""4-bit bases: NF4 with double quantization, shardable. The only import of bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


def pack_linear_layers(model: nn.Module) -> None:
    """Put a ``PackedLinear4bit`` in the place of every Linear4bit of bitsandbytes, one by one."""
    from bitsandbytes.nn import Linear4bit

    # Names only: a list of layers would keep every replaced one alive.
    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name in names:
        layer = model.get_submodule(name)
        model.set_submodule(name, PackedLinear4bit(layer))
        # The layer and its weight refer to each other: without this, memory of the whole model
        # would wait for the garbage collector.
        del layer.weight


class PackedLinear4bit(nn.Linear):
    """``y = W x + b``, W (out, in) in NF4 with double quantization (QLoRA, arXiv 2305.14314).

    All that W is made of lies in one frozen parameter, since ZeRO-3 shards parameters and nothing
    else. bitsandbytes' layer keeps the scales of its blocks outside, whole on every rank; its
    backward holds on to the bytes that ZeRO-3 gathered for the forward; and on CPUs with
    AVX512-BF16 it repacks them in place. Dequantized by bitsandbytes, to the same bits.

    Attributes:
        weight: bytes seen as a flat bf16 vector, which DeepSpeed neither casts nor skips; they are
            no numbers. In this order, padded to an even length:
            the codes of W, row by row, two in a byte;
            the scale of every block of ``blocksize`` weights, uint8;
            the scale of every block of 256 scales, fp32;
            the mean of the scales, fp32.
        dtype: of W dequantized, and so of x, b and y.
    """

    def __init__(self, layer: Any) -> None:
        """The same weight as a quantized Linear4bit of bitsandbytes; its bias is shared."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        state = layer.weight.quant_state
        if state.quant_type != "nf4" or not state.nested or state.state2.blocksize != 256:
            raise ValueError("the layer must be quantized to NF4 with double quantization")
        self.bias = layer.bias
        self.blocksize, self.dtype = state.blocksize, state.dtype
        parts = [layer.weight, state.absmax, state.state2.absmax, state.offset]
        parts = [part.detach().reshape(-1).view(torch.uint8) for part in parts]
        self._num_bytes = [len(part) for part in parts]
        packed = torch.cat([*parts, parts[0].new_zeros(sum(self._num_bytes) % 2)])
        self.weight = nn.Parameter(packed.view(torch.bfloat16), requires_grad=False)

    def dequantize(self) -> torch.Tensor:
        """W (out, in) in ``dtype``, newly made. Under ZeRO-3 the weight must be gathered."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        packed = self.weight.detach().view(torch.uint8)
        codes, absmax, *fp32 = packed[: sum(self._num_bytes)].split(self._num_bytes)
        # Copied, since an fp32 view must be aligned; a 16384th of the numbers is not much.
        absmax2, offset = (part.clone().view(torch.float32) for part in fp32)
        scales = dequantize_blockwise(absmax, absmax=absmax2, blocksize=256).add_(offset)
        shape = torch.Size((self.out_features, self.in_features))
        state = QuantState(
            scales, shape, blocksize=self.blocksize, quant_type="nf4", dtype=self.dtype
        )
        return dequantize_4bit(codes, state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Linear4bitFunction.apply(x, self)


class _Linear4bitFunction(torch.autograd.Function):
    """``F.linear`` that keeps no weight for its backward, neither packed nor dequantized.

    The backward reads the layer's parameter as it is then: ZeRO-3 has gathered it again.
    """

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y @ ctx.layer.dequantize(), None
