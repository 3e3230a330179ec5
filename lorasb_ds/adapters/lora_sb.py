"""The layer of LoRA-SB: A and B are frozen, R is trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lorasb_ds.adapters.layer import AdapterLinear
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
        return to_plain_lora(values["lora_A"], values["lora_B"], values["lora_R"])

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        return _LoraSBFunction.apply(x, self.lora_R, self)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(F.linear(x, self.lora_A), self.lora_R), self.lora_B)

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """A, B and the scaled R in a dtype. Gathered, under ZeRO-3."""
        R = self.lora_R if self.scale == 1 else self.scale * self.lora_R
        return tuple(factor.detach().to(dtype) for factor in (self.lora_A, self.lora_B, R))


class _LoraSBFunction(torch.autograd.Function):
    """``y = W0 x + b0 + B R A x``, and of it all only ``A x`` is kept for the backward pass.

    Weights are read from the layer again then: ZeRO-3 has gathered them, checkpointing and
    quantization have nothing to keep. With h = A x and δ = dL/dy, of one token each::

        y = W0 x + b0 + B R h        dL/dR = Bᵀδ hᵀ        dL/dx = W0ᵀδ + Aᵀ Rᵀ Bᵀδ

    R is an argument so that autograd asks for its gradient; between the passes nothing may change.
    The branch is added where the base's product lies already, in both passes; transposed, since
    products in that order are up to a tenth faster on CPUs.
    """

    @staticmethod
    def forward(ctx, x, R, layer):
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        A, B, R = layer.factors(dtype)
        bias = layer.base_layer.bias
        x = x.to(dtype)
        y = F.linear(x, layer.base_weight(dtype), None if bias is None else bias.to(dtype))
        h = x.flatten(0, -2) @ A.T
        y.view(-1, y.shape[-1]).T.addmm_(B, (h @ R.T).T)
        ctx.save_for_backward(h)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (h,) = ctx.saved_tensors
        A, B, R = ctx.layer.factors(grad_y.dtype)
        delta = grad_y.flatten(0, -2)
        delta_B = delta @ B
        grad_R = ctx.layer.scale * (delta_B.T @ h) if ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = delta @ ctx.layer.base_weight(grad_y.dtype)
            grad_x.T.addmm_(A.T, (delta_B @ R).T)
            grad_x = grad_x.view(*grad_y.shape[:-1], -1)
        return grad_x, grad_R, None


def to_plain_lora(A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> LoraPair:
    """The LoRA pair of the same update: ``lora_A = A`` (r, in), ``lora_B = B R`` (out, r); fp32."""
    return LoraPair(A.float(), B.float() @ R.float())
