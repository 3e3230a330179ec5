"""The layer of LoRA-SB, which trains R between the frozen A and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lorasb_ds.adapters.layer import AdapterLinear, autocast
from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.methods import TRAIN_R


class LoraSBLinear(AdapterLinear):
    """``y = W0 x + b0 + B R A x`` (arXiv 2411.19557): R (r, r) is trained.

    A and B are frozen, and orthonormal in LoRA-SB: ``A Aᵀ = Bᵀ B = I``.
    """

    trained, frozen = TRAIN_R, ("lora_A", "lora_B")
    lora_R: nn.Parameter

    def __init__(self, base_layer: nn.Module, r: int, dtype: torch.dtype) -> None:
        super().__init__(base_layer, r, dtype)
        self.add_factor("lora_R", (r, r), dtype)

    def plain_lora(self, values: Mapping[str, torch.Tensor]) -> LoraPair:
        A, B, R = (values[name].float() for name in ("lora_A", "lora_B", "lora_R"))
        return LoraPair(A, B @ R)

    def fused_forward(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        return _LoraSBFunction.apply(x, self.lora_R, self)

    def branch(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        return F.linear(F.linear(F.linear(x, self.lora_A), self.lora_R), self.lora_B)

    def cast_factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return A, B and the scaled R in a dtype. Under ZeRO-3 they must be gathered."""
        R = self.lora_R if self.scale == 1 else self.scale * self.lora_R
        return tuple(factor.detach().to(dtype) for factor in (self.lora_A, self.lora_B, R))


class _LoraSBFunction(torch.autograd.Function):
    """``y = W0 x + b0 + B R A x``; saves only ``A x`` for the backward pass.

    The backward reads the weights from the layer again: ZeRO-3 has gathered them by then, and
    neither checkpointing nor quantization has to keep a copy. Between the passes no weight may
    change. For one token, with h = A x and δ = dL/dy::

        y = W0 x + b0 + B R h        dL/dR = Bᵀδ hᵀ        dL/dx = W0ᵀδ + Aᵀ Rᵀ Bᵀδ

    R is an argument so that autograd asks for its gradient. In both passes the branch is added in
    place to the base's product, transposed, since products in that order are up to 10 % faster on
    CPUs.
    """

    @staticmethod
    def forward(ctx, x, R, layer):
        x = autocast(x)
        A, B, R = layer.cast_factors(x.dtype)
        y = layer.base_product(x)
        h = x.flatten(0, -2) @ A.T
        y.view(-1, y.shape[-1]).T.addmm_(B, (h @ R.T).T)
        ctx.save_for_backward(h)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (h,) = ctx.saved_tensors
        A, B, R = ctx.layer.cast_factors(grad_y.dtype)
        delta = grad_y.flatten(0, -2)
        delta_B = delta @ B
        grad_R = ctx.layer.scale * (delta_B.T @ h) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = delta @ ctx.layer.base_weight(grad_y.dtype)
            grad_x.T.addmm_(A.T, (delta_B @ R).T)
            grad_x = grad_x.view(*grad_y.shape[:-1], -1)
        return grad_x, grad_R, None
