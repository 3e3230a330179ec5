"""The experts of MoE blocks: their projections as layers, whole or quantized.

transformers keeps a projection of all experts of a block in one parameter (experts, out, in), and
computes with it by a function of a registry, which a configuration names. ``split_experts`` makes
every such parameter a layer, ``ExpertsLinear``, which can be quantized and get an adapter as linear
layers do, and has the block computed by ``experts_forward``. ZeRO-3 then gathers one projection of
a block at a time. Every rank calls it once in every pass, wherever its tokens go: ranks that route
differently do not wait for each other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lorasb_ds.models.quantization import (
    Kind,
    PackedLinear,
    PackedLinear4bit,
    PackedLinear8bit,
)
from lorasb_ds.planner.placement import EXPERT_ALIGNMENT

# Name of a projection, as transformers names its parameter -> (experts, out, in).
ExpertShapes = Mapping[str, tuple[int, int, int]]

IMPLEMENTATION = "lorasb"  # in transformers' registry
ALIGNMENT = EXPERT_ALIGNMENT // 2  # of a packed expert, in bf16 elements


@dataclass(frozen=True)
class Routing:
    """Which rows go to which expert, for rows that are sorted by expert.

    Attributes:
        experts: (rows,), the expert of each row, ascending.
        offsets: (experts,) int32, where the rows of each expert end.
    """

    experts: torch.Tensor
    offsets: torch.Tensor

    @classmethod
    def of(cls, experts: torch.Tensor, num_experts: int) -> Routing:
        """Make the routing of sorted expert numbers."""
        numbers = torch.arange(num_experts, device=experts.device, dtype=experts.dtype)
        return cls(experts, torch.searchsorted(experts, numbers, right=True, out_int32=True))

    @cached_property
    def ends(self) -> list[int]:
        """``offsets`` on the host. Its first use waits for the device."""
        ends: list[int] = self.offsets.tolist()
        return ends

    def rows(self) -> Iterator[tuple[int, slice]]:
        """Yield every expert that has rows, and the range of its rows."""
        start = 0
        for expert, end in enumerate(self.ends):
            if end > start:
                yield expert, slice(start, end)
            start = end


def grouped_mm(x: torch.Tensor, weights: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return ``x_i W_e`` (rows, n) for every row i and its expert e. Not differentiable.

    Args:
        x: (rows, k), sorted by expert.
        weights: (experts, k, n) in x's dtype; may be a transposed view.
    """
    if _has_grouped_mm(x, weights):
        return torch.nn.functional.grouped_mm(x, weights, offs=routing.offsets)
    result = x.new_empty(len(x), weights.shape[-1])
    for expert, rows in routing.rows():
        torch.mm(x[rows], weights[expert], out=result[rows])
    return result


def grouped_outer(a: torch.Tensor, b: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Return ``Σ a_i b_iᵀ`` (experts, m, n) over the rows i of every expert. Not differentiable.

    Args:
        a, b: (rows, m) and (rows, n), sorted by expert.
    """
    if _has_grouped_mm(a, b):
        return torch.nn.functional.grouped_mm(a.T, b, offs=routing.offsets)
    result = a.new_zeros(len(routing.offsets), a.shape[1], b.shape[1])
    for expert, rows in routing.rows():
        torch.mm(a[rows].T, b[rows], out=result[expert])
    return result


def _has_grouped_mm(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether torch's kernel takes both: on GPUs bf16, and rows of whole 16 bytes."""
    sides = (a.shape[1], *b.shape[1:])
    if any(side * a.element_size() % 16 for side in sides):
        return False
    device = a.device.type
    return device == "cpu" or (device == "cuda" and a.dtype == torch.bfloat16)


class ExpertsLinear(nn.Module):
    """``y_i = W_e x_i`` for rows i that are sorted by expert e; all W_e are frozen.

    Attributes:
        weight: (experts, out, in). Packed: a flat bf16 vector of the bytes of one ``PackedLinear``
            for each expert, so that every expert's matrix has the bits that bitsandbytes makes of
            it alone. On the meta device until it is filled.
        kind: how it is packed; None: it is not.
        stored_transposed: whether the model's own parameter is (experts, in, out).
    """

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        kind: Kind | None = None,
        stored_transposed: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.out_features, self.in_features = out_features, in_features
        self.dtype, self.kind = dtype, kind
        self.stored_transposed = stored_transposed
        # It packs and unpacks one expert's matrix. In a tuple, so that it is no submodule.
        self._packing: tuple[PackedLinear, ...] = ()
        if kind is not None:
            packed = PackedLinear4bit if kind == "4bit" else PackedLinear8bit
            self._packing = (packed(in_features, out_features, None, dtype),)
        self.weight = nn.Parameter(self.empty_weight(torch.device("meta")), requires_grad=False)

    def empty_weight(self, device: torch.device) -> torch.Tensor:
        """Return a value for ``weight``, to be filled by ``set_expert``."""
        if not self._packing:
            shape = (self.num_experts, self.out_features, self.in_features)
            return torch.empty(shape, dtype=self.dtype, device=device)
        size = -(-self._packing[0].weight.numel() // ALIGNMENT) * ALIGNMENT
        return torch.zeros(self.num_experts * size, dtype=torch.bfloat16, device=device)

    def set_expert(self, weight: torch.Tensor, expert: int, W: torch.Tensor) -> None:
        """Set one expert's part of a value for ``weight``, quantizing it if necessary.

        Args:
            weight: from ``empty_weight``.
            W: (out, in), in ``dtype``.
        Raises:
            ValueError: if W cannot be quantized.
        """
        if not self._packing:
            weight[expert].copy_(W)
            return
        packed = self._packing[0].quantize_whole(W)
        weight.view(self.num_experts, -1)[expert, : packed.numel()] = packed

    def expert_weight(self, expert: int) -> torch.Tensor:
        """Return an expert's W (out, in) in ``dtype``. Under ZeRO-3 ``weight`` must be gathered."""
        if not self._packing:
            return self.weight[expert].detach()
        size = self._packing[0].weight.numel()
        return self._packing[0].dequantize(self.weight.view(self.num_experts, -1)[expert, :size])

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        return _ExpertsFunction.apply(x, self, routing)

    def product(
        self, x: torch.Tensor, routing: Routing, *, transposed: bool = False
    ) -> torch.Tensor:
        """Return ``W_e x_i`` (rows, out) for x (rows, in), unpacking one packed W at a time.

        Args:
            transposed: return ``W_eᵀ x_i`` (rows, in) for x (rows, out).
        """
        if not self._packing:
            weights = self.weight.detach().to(x.dtype)
            return grouped_mm(x, weights if transposed else weights.mT, routing)
        y = x.new_empty(len(x), self.in_features if transposed else self.out_features)
        for expert, rows in routing.rows():
            W = self.expert_weight(expert).to(x.dtype)
            torch.mm(x[rows], W if transposed else W.T, out=y[rows])
        return y


class _ExpertsFunction(torch.autograd.Function):
    """The products of ``ExpertsLinear``; saves no weight, neither packed nor unpacked.

    The backward reads the layer's parameter at that time: ZeRO-3 has gathered it again.
    """

    @staticmethod
    def forward(ctx, x, layer, routing):
        ctx.layer, ctx.routing = layer, routing
        return layer.product(x, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        delta = grad_y.contiguous()
        return ctx.layer.product(delta, ctx.routing, transposed=True), None, None


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts of a block whose projections are ``ExpertsLinear`` layers.

    Args:
        self: transformers' module of experts, whose class says how a projection is gated.
        hidden_states: (tokens, hidden).
        top_k_index: (tokens, k), the experts of each token.
        top_k_weights: (tokens, k), their weights.
    """
    k = top_k_index.shape[-1]
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    up, down = up_projection(self), "down_proj"
    routing = Routing.of(experts, getattr(self, down).num_experts)

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        y = getattr(self, name)(x, routing)
        return y + getattr(self, f"{name}_bias")[experts] if self.has_bias else y

    x = project(up, hidden_states[order // k])
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = project(down, x)
    if self.has_post_expert_norm:
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    x = x[order.argsort()].view(len(hidden_states), k, -1).sum(1)
    return x.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


def up_projection(experts: Any) -> str:
    """Return the name of the projection from hidden states, of transformers' module of experts."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """Return the modules of experts that transformers computes by its registry, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        # Set by transformers' decorator of such classes.
        if hasattr(module, "is_transposed") and hasattr(module, "has_post_expert_norm")
    }


def projections(model: nn.Module) -> ExpertShapes:
    """Return the projections of experts of an unsplit model, in the model's order."""
    found: dict[str, tuple[int, int, int]] = {}
    for prefix, experts in experts_modules(model).items():
        for name in (up_projection(experts), "down_proj"):
            num_experts, rows, columns = getattr(experts, name).shape
            sides = (columns, rows) if experts.is_transposed else (rows, columns)
            found[f"{prefix}.{name}"] = (num_experts, *sides)
    return found


def split_experts(model: nn.Module, dtype: torch.dtype, kind: Kind | None) -> None:
    """Make an ``ExpertsLinear`` of every projection of an empty model's experts, in place.

    Args:
        model: with parameters on the meta device.
        dtype: of the experts' weights.
        kind: how they are packed; None: they are not.
    """
    shapes = projections(model)
    for prefix, experts in experts_modules(model).items():
        for name in (up_projection(experts), "down_proj"):
            delattr(experts, name)
            shape = shapes[f"{prefix}.{name}"]
            setattr(experts, name, ExpertsLinear(*shape, dtype, kind, experts.is_transposed))
        # A copy, since models that are not split may share the configuration.
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation = IMPLEMENTATION
