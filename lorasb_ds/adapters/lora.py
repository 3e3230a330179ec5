"""The layer of LoRA and its relatives: A and B are trained, from wherever they start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.methods import TRAIN_AB


class LoraLinear(AdapterLinear):
    """``y = W0 x + b0 + s (B A - B0 A0) x``: A (r, in) and B (out, r) are trained.

    Args:
        scaling: s.
        offset: whether there are B0 and A0, which stay what A and B were filled with. W0 is then
            left as it is where others subtract them from it, so that the adapter stays valid on
            the original base.
        precondition: λ of ``dB (A Aᵀ + λI)⁻¹`` and ``(Bᵀ B + λI)⁻¹ dA`` (arXiv 2502.01235,
            algorithm 1), or None. All ranks hold the same A and B and it is linear in the gradient,
            so that it goes before the engine's reduction as well as after; the norm by which
            gradients are clipped is that of the result.
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

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        return _LoraFunction.apply(x, self.lora_A, self.lora_B, self, True)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return _LoraFunction.apply(x, self.lora_A, self.lora_B, self, False) / self.scale

    def stacked(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of the whole scaled branch, (k, in) and (out, k). Gathered, under ZeRO-3."""
        A, B = self.lora_A.detach().to(dtype), self.lora_B.detach().to(dtype)
        if self.frozen:
            A = torch.cat([A, self.offset_A.detach().to(dtype)])
            B = torch.cat([B, -self.offset_B.detach().to(dtype)], 1)
        return A, (self.scale * self.scaling) * B


class _LoraFunction(torch.autograd.Function):
    """The branch, with or without the base's product; of it all x and ``A x`` are kept.

    Weights are read from the layer again in the backward pass, as in LoRA-SB's. With h = A x and
    δ = dL/dy, of one token each::

        dL/dB = s δ hᵀ        dL/dA = s Bᵀδ xᵀ        dL/dx = W0ᵀδ + s Aᵀ Bᵀδ
    """

    @staticmethod
    def forward(ctx, x, A, B, layer, with_base):
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x = x.to(dtype)
        all_A, all_B = layer.stacked(dtype)
        h = x.flatten(0, -2) @ all_A.T
        if with_base:
            bias = layer.base_layer.bias
            y = F.linear(x, layer.base_weight(dtype), None if bias is None else bias.to(dtype))
            y.view(-1, y.shape[-1]).T.addmm_(all_B, h.T)
        else:
            y = (h @ all_B.T).view(*x.shape[:-1], -1)
        ctx.save_for_backward(x, h[:, : layer.r].contiguous())  # a view would keep the offset's
        ctx.layer, ctx.with_base = layer, with_base
        ctx.dtypes = A.dtype, B.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, h = ctx.saved_tensors
        layer, dtype = ctx.layer, grad_y.dtype
        A, B = layer.stacked(dtype)
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
    """``(BᵀB + λI)⁻¹ dA`` and ``dB (AAᵀ + λI)⁻¹``, in fp32 (arXiv 2502.01235, algorithm 1).

    Args:
        damping: λ.
    """
    A, B = A.float(), B.float()
    identity = damping * torch.eye(len(A), device=A.device)
    return (
        torch.linalg.solve(B.T @ B + identity, grad_A.float()),
        torch.linalg.solve(A @ A.T + identity, grad_B.float(), left=False),
    )
