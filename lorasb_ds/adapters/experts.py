"""The adapters of MoE experts: every expert of a projection has its own B, R and A."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lorasb_ds.adapters.layer import autocast
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.models.experts import ExpertsLinear, Routing, grouped_mm, grouped_outer


class LoraSBExperts(LoraSBLinear):
    """``y_i = W_e x_i + B_e R_e A_e x_i`` for rows i that are sorted by expert e.

    The factors are LoRA-SB's, with the experts as their first dimension: A (experts, r, in), R
    (experts, r, r) and B (experts, out, r). No expert's update is ever formed.

    Args:
        base_layer: an ``ExpertsLinear``.
    """

    base_layer: ExpertsLinear

    @property
    def num_experts(self) -> int:
        return self.base_layer.num_experts

    @property
    def num_matrices(self) -> int:
        return self.num_experts

    def add_factor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().add_factor(name, (self.num_experts, *shape), dtype)

    def fused_forward(self, x: torch.Tensor, *routing: Routing) -> torch.Tensor:
        return _LoraSBExpertsFunction.apply(x, self.lora_R, self, *routing, "all")

    def branch(self, x: torch.Tensor, *routing: Routing) -> torch.Tensor:
        return _LoraSBExpertsFunction.apply(x, self.lora_R, self, *routing, "trained") / self.scale

    def kept_branch(self, x: torch.Tensor, *routing: Routing) -> torch.Tensor:
        return _LoraSBExpertsFunction.apply(x, self.kept_R, self, *routing, "kept")


class _LoraSBExpertsFunction(torch.autograd.Function):
    """The base's product with all branches, or some of them; saves only ``h_i = A_e x_i``.

    As in LoRA-SB's function for linear layers, the backward reads the weights from the layer again.
    For row i and its expert e, with δ_i = dL/dy_i::

        y_i = W_e x_i + B_e R_e h_i        dL/dR_e = Σ_i B_eᵀ δ_i h_iᵀ
        dL/dx_i = W_eᵀ δ_i + A_eᵀ R_eᵀ B_eᵀ δ_i
    """

    @staticmethod
    def forward(ctx, x, R, layer, routing, parts):
        x = autocast(x)
        A, B, R = layer.cast_factors(x.dtype, parts)
        h = grouped_mm(x, A.mT, routing)
        y = grouped_mm(grouped_mm(h, R.mT, routing), B.mT, routing)
        if parts == "all":
            y += layer.base_layer.product(x, routing)
        ctx.save_for_backward(h[:, : layer.r].contiguous() if ctx.needs_input_grad[1] else None)
        ctx.layer, ctx.routing, ctx.parts = layer, routing, parts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (h,), layer, routing = ctx.saved_tensors, ctx.layer, ctx.routing
        delta = grad_y.contiguous()
        A, B, R = layer.cast_factors(delta.dtype, ctx.parts)
        delta_B = grouped_mm(delta, B, routing)
        grad_R = grad_x = None
        if ctx.needs_input_grad[1]:
            of_trained = delta_B[:, : layer.r].contiguous()
            grad_R = layer.scale * grouped_outer(of_trained, h, routing)
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(grouped_mm(delta_B, R, routing), A, routing)
            if ctx.parts == "all":
                grad_x += layer.base_layer.product(delta, routing, transposed=True)
        return grad_x, grad_R, None, None, None
