"""The layer of LoRA-SB, which trains R between the frozen A and B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lorasb_ds.adapters.layer import AdapterLinear, autocast
from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.config.methods import TRAIN_R

# Which products a function computes: "trained" is B R A x, "kept" that of earlier bases, "all" both
# and the base's.
Parts = Literal["all", "trained", "kept"]


class LoraSBLinear(AdapterLinear):
    """``y = W0 x + b0 + Σ_k B_k R_k A_k x + B R A x`` (arXiv 2411.19557): R (r, r) is trained.

    A and B are frozen, and orthonormal in LoRA-SB: ``A Aᵀ = Bᵀ B = I``.

    The sum over k is of the updates in earlier bases (``--rebase-every``). Like W0, they are
    neither trained nor multiplied by ``scale``.

    Args:
        max_kept: how many updates may be kept.

    Attributes:
        kept_A, kept_B, kept_R: their factors, (max_kept · r, in), (out, max_kept · r) and
            (max_kept, r, r), in the order in which they were trained; there if max_kept is not 0.
    """

    trained, frozen = TRAIN_R, ("lora_A", "lora_B")
    lora_R: nn.Parameter
    kept_A: nn.Parameter
    kept_B: nn.Parameter
    kept_R: nn.Parameter

    def __init__(
        self, base_layer: nn.Module, r: int, dtype: torch.dtype, *, max_kept: int = 0
    ) -> None:
        super().__init__(base_layer, r, dtype)
        self.add_factor("lora_R", (r, r), dtype)
        if max_kept:
            self.kept = ("kept_A", "kept_B", "kept_R")
            self.add_factor("kept_A", (max_kept * r, self.in_features), dtype)
            self.add_factor("kept_B", (self.out_features, max_kept * r), dtype)
            self.add_factor("kept_R", (max_kept, r, r), dtype)

    def plain_lora(self, values: Mapping[str, torch.Tensor]) -> LoraPair:
        A, B, R = (values[name].float() for name in ("lora_A", "lora_B", "lora_R"))
        return LoraPair(A, B @ R)

    def kept_lora(self) -> LoraPair | None:
        if not self.num_kept:
            return None
        A, B, R = self.cast_factors(torch.float32, "kept")
        return LoraPair(A, B @ R)

    def fused_forward(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        return _LoraSBFunction.apply(x, self.lora_R, self, "all")

    def frozen_output(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        y = super().frozen_output(x, *routing)
        return y + self.kept_branch(x, *routing) if self.num_kept else y

    def branch(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        return F.linear(F.linear(F.linear(x, self.lora_A), self.lora_R), self.lora_B)

    def kept_branch(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        """Return what the updates in earlier bases add."""
        return _LoraSBFunction.apply(x, self.kept_R, self, "kept")

    def cast_factors(self, dtype: torch.dtype, parts: Parts) -> tuple[torch.Tensor, ...]:
        """Return A, B and the scaled R in a dtype. Under ZeRO-3 they must be gathered.

        Several updates are one: the A's are stacked, trained ones first, so are the B's, and the
        R's are the blocks of a diagonal.
        """
        R = self.lora_R if self.scale == 1 else self.scale * self.lora_R
        trained = (self.lora_A, self.lora_B, R)
        if parts == "trained" or (parts == "all" and not self.num_kept):
            return tuple(factor.detach().to(dtype) for factor in trained)
        k, n = self.num_kept, self.num_kept * self.r
        kept = (self.kept_A[..., :n, :], self.kept_B[..., :n], self.kept_R[..., :k, :, :])
        A, B, blocks = (factor.detach().to(dtype) for factor in kept)
        if parts == "all":
            own_A, own_B, own_R = (factor.detach().to(dtype) for factor in trained)
            A, B = torch.cat([own_A, A], -2), torch.cat([own_B, B], -1)
            blocks = torch.cat([own_R.unsqueeze(-3), blocks], -3)
        return A, B, block_diagonal(blocks)


def block_diagonal(blocks: torch.Tensor) -> torch.Tensor:
    """Return the matrices (…, k r, k r) with the blocks (…, k, r, r) on their diagonals."""
    apart = torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2)  # (…, k, r, k, r)
    return apart.flatten(-4, -3).flatten(-2, -1)


class _LoraSBFunction(torch.autograd.Function):
    """``y = W0 x + b0 + B R A x``, or the branch alone; saves only ``A x`` for the backward pass.

    The backward reads the weights from the layer again: ZeRO-3 has gathered them by then, and
    neither checkpointing nor quantization has to keep a copy. Between the passes no weight may
    change. For one token, with h = A x and δ = dL/dy::

        y = W0 x + b0 + B R h        dL/dR = Bᵀδ hᵀ        dL/dx = W0ᵀδ + Aᵀ Rᵀ Bᵀδ

    R is an argument so that autograd asks for its gradient. In both passes the branch is added in
    place to the base's product, transposed, since products in that order are up to 10 % faster on
    CPUs.
    """

    @staticmethod
    def forward(ctx, x, R, layer, parts):
        x = autocast(x)
        A, B, R = layer.cast_factors(x.dtype, parts)
        h = x.flatten(0, -2) @ A.T
        if parts == "all":
            y = layer.base_product(x)
            y.view(-1, y.shape[-1]).T.addmm_(B, (h @ R.T).T)
        else:
            y = (h @ R.T @ B.T).view(*x.shape[:-1], -1)
        # Contiguous: a view would keep the part of kept updates in memory.
        ctx.save_for_backward(h[:, : layer.r].contiguous() if ctx.needs_input_grad[1] else None)
        ctx.layer, ctx.parts = layer, parts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (h,), layer = ctx.saved_tensors, ctx.layer
        A, B, R = layer.cast_factors(grad_y.dtype, ctx.parts)
        delta = grad_y.flatten(0, -2)
        delta_B = delta @ B
        grad_R = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_R = layer.scale * (delta_B[:, : layer.r].T @ h)
        if ctx.needs_input_grad[0]:
            if ctx.parts == "all":
                grad_x = delta @ layer.base_weight(grad_y.dtype)
                grad_x.T.addmm_(A.T, (delta_B @ R).T)
            else:
                grad_x = delta_B @ R @ A
            grad_x = grad_x.view(*grad_y.shape[:-1], -1)
        return grad_x, grad_R, None, None
