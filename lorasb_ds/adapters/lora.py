"""The layer of LoRA and its relatives, which train A and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lorasb_ds.adapters.layer import AdapterLinear, autocast
from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.methods import TRAIN_AB


class LoraLinear(AdapterLinear):
    """``y = W0 x + b0 + s (B A - B0 A0) x``: A (r, in) and B (out, r) are trained.

    Args:
        scaling: s.
        offset: whether there are B0 and A0, which keep the initial B and A. Other implementations
            subtract ``s B0 A0`` from W0; here W0 does not change, so that the adapter is valid on
            the original base.
        precondition: λ of ``dB (A Aᵀ + λI)⁻¹`` and ``(Bᵀ B + λI)⁻¹ dA`` (arXiv 2502.01235,
            algorithm 1), or None. It is linear in the gradient, and A and B are the same on all
            ranks, so it may come before the engine's reduction. Gradients are clipped by the norm
            of the preconditioned gradient.
    """

    trained = TRAIN_AB
    frozen: tuple[str, ...] = ()
    offset_A: nn.Parameter
    offset_B: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        dtype: torch.dtype,
        *,
        scaling: float = 1.0,
        offset: bool = False,
        precondition: float | None = None,
    ) -> None:
        super().__init__(base_layer, r, dtype)
        self.scaling = scaling
        self.precondition = precondition
        if offset:
            self.frozen = ("offset_A", "offset_B")
            self.add_factor("offset_A", (r, self.in_features), dtype)
            self.add_factor("offset_B", (self.out_features, r), dtype)

    def plain_lora(self, values: Mapping[str, torch.Tensor]) -> LoraPair:
        A, B = values["lora_A"].float(), self.scaling * values["lora_B"].float()
        if not self.frozen:
            return LoraPair(A, B)
        offset_B = self.scaling * values["offset_B"].float()
        return LoraPair(torch.cat([A, values["offset_A"].float()]), torch.cat([B, -offset_B], 1))

    def fused_forward(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        return _LoraFunction.apply(x, self.lora_A, self.lora_B, self, True)

    def branch(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        return _LoraFunction.apply(x, self.lora_A, self.lora_B, self, False) / self.scale

    def stacked_factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the whole scaled branch in a dtype, (k, in) and (out, k).

        k is r, or 2 r with an offset. Under ZeRO-3 the factors must be gathered.
        """
        A, B = self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)
        if self.frozen:
            A = torch.cat([A, self.offset_A.detach().to(dtype)])
            B = torch.cat([B, -self.offset_B.detach().to(dtype)], 1)
        return A, (self.scale * self.scaling) * B


class _LoraFunction(torch.autograd.Function):
    """The branch, with or without the base's product; saves only x and ``A x``.

    The backward reads the weights from the layer again, as LoRA-SB's does. For one token, with
    h = A x and δ = dL/dy::

        dL/dB = s δ hᵀ        dL/dA = s Bᵀδ xᵀ        dL/dx = W0ᵀδ + s Aᵀ Bᵀδ
    """

    @staticmethod
    def forward(ctx, x, A, B, layer, with_base):
        x = autocast(x)
        all_A, all_B = layer.stacked_factors(x.dtype)
        h = x.flatten(0, -2) @ all_A.T
        if with_base:
            y = layer.base_product(x)
            y.view(-1, y.shape[-1]).T.addmm_(all_B, h.T)
        else:
            y = (h @ all_B.T).view(*x.shape[:-1], -1)
        # Contiguous: a view would keep the offset's part in memory.
        ctx.save_for_backward(x, h[:, : layer.r].contiguous())
        ctx.layer, ctx.with_base = layer, with_base
        ctx.dtypes = A.dtype, B.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, h = ctx.saved_tensors
        layer, dtype = ctx.layer, grad_y.dtype
        A, B = layer.stacked_factors(dtype)
        delta, r = grad_y.flatten(0, -2), layer.r
        delta_B = delta @ B
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_A = delta_B[:, :r].T @ x.flatten(0, -2)
            grad_B = (layer.scale * layer.scaling) * (delta.T @ h)
            if layer.precondition is not None:
                grad_A, grad_B = preconditioned(
                    grad_A, grad_B, layer.lora_A.detach(), layer.lora_B.detach(), layer.precondition
                )
            grad_A, grad_B = grad_A.to(ctx.dtypes[0]), grad_B.to(ctx.dtypes[1])
        if ctx.needs_input_grad[0]:
            if ctx.with_base:
                grad_x = delta @ layer.base_weight(dtype)
                grad_x.T.addmm_(A.T, delta_B.T)
            else:
                grad_x = delta_B @ A
            grad_x = grad_x.view(*grad_y.shape[:-1], -1)
        return grad_x, grad_A, grad_B, None, None


def preconditioned(
    grad_A: torch.Tensor, grad_B: torch.Tensor, A: torch.Tensor, B: torch.Tensor, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(BᵀB + λI)⁻¹ dA`` and ``dB (AAᵀ + λI)⁻¹``, in fp32.

    Source: arXiv 2502.01235, algorithm 1.

    Args:
        damping: λ.
    """
    A, B = A.float(), B.float()
    identity = damping * torch.eye(len(A), device=A.device)
    return (
        torch.linalg.solve(B.T @ B + identity, grad_A.float()),
        torch.linalg.solve(A @ A.T + identity, grad_B.float(), left=False),
    )
