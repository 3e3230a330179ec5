"""Layers with an adapter: what all have, and LoRA-SB's; how they get into a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lorasb_ds.config.methods import TRAIN_R
from lorasb_ds.distributed import zero
from lorasb_ds.low_rank import LoraPair
from lorasb_ds.models.linear_layers import Shapes, layer_shape
from lorasb_ds.models.quantization import PackedLinear

Layer = TypeVar("Layer", bound="AdapterLinear")


class Tap(Protocol):
    """What watches a layer during the init."""

    def reached(self) -> None:
        """The layer was called; again when checkpointing recomputes it."""

    def add(self, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """In the backward pass: the layer's input (…, in) and its output's gradient (…, out)."""


class AdapterLinear(nn.Module, ABC):
    """A frozen linear layer with a low-rank branch, of which some factors are trained.

    All factors are zero until the init phase fills them: the layer is its base.

    Args:
        base_layer: ``nn.Linear``, a 4-bit layer, or transformers' ``Conv1D``, whose weight is
            (in, out); only its output is used, so that any of them and any bias will do.

    Attributes:
        lora_A, lora_B: (r, in) and (out, r).
        trained, frozen: names of the factors.
        scale: multiplies the branch; 1 but in the search for eta. At 0 the branch is not computed
            and the layer is exactly the base.
        tap: when set, sees every input and output gradient of the base layer.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base_layer: nn.Module, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = layer_shape(base_layer)
        self.r = r
        self.add_factor("lora_A", (r, self.in_features), dtype)
        self.add_factor("lora_B", (self.out_features, r), dtype)
        self.scale = 1.0
        self.tap: Tap | None = None
        # A subclass may compute something else than a linear layer does.
        self.has_plain_base = isinstance(base_layer, PackedLinear) or type(base_layer).forward in (
            nn.Linear.forward,
            Conv1D.forward,
        )

    def add_factor(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """A parameter of zeros, which requires grad if it is trained."""
        zeros = torch.zeros(shape, dtype=dtype, device=self.weight.device)
        setattr(self, name, nn.Parameter(zeros, requires_grad=name in self.trained))

    def factor(self, name: str) -> nn.Parameter:
        """One of ``trained`` and ``frozen``."""
        parameter: nn.Parameter = getattr(self, name)
        return parameter

    def factor_shape(self, name: str) -> torch.Size:
        """Its whole shape."""
        return zero.whole_shape(self.factor(name))

    @abstractmethod
    def plain_lora(self, values: Mapping[str, torch.Tensor]) -> LoraPair:
        """The update that some factors make, without ``scale``; fp32.

        Args:
            values: of all ``trained`` and ``frozen``, whole.
        """

    @property
    def weight(self) -> Any:
        """The base layer's, for models that look at it."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale != 0 and self.tap is None and self.has_plain_base:
            return self.fused(x)
        y = self.base_layer(x)
        if self.tap is not None:
            self.tap.reached()
            # A leaf that requires grad makes autograd reach this layer although everything below
            # is frozen, and no further down than the lowest layer that has one.
            anchor = torch.zeros(0, device=x.device, requires_grad=True)
            y = _TapFunction.apply(y, x, anchor, self.tap)
        if self.scale != 0:
            y = y + self.scale * self.branch(x)
        return y

    @abstractmethod
    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """Base and branch in one, where the base is a plain linear layer."""

    @abstractmethod
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """ΔW x, without ``scale``."""

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """W0 (out, in) in a dtype; dequantized anew where it has to be. Gathered, under ZeRO-3."""
        base: Any = self.base_layer
        if isinstance(base, PackedLinear):
            return base.dequantize().to(dtype)
        W = base.weight.T if isinstance(base, Conv1D) else base.weight
        return W.detach().to(dtype)


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


class _TapFunction(torch.autograd.Function):
    """The identity on ``y``; its backward shows ``(x, dL/dy)`` to the tap.

    x goes through ``save_for_backward``, so that gradient checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(ctx, y, x, anchor, tap):
        ctx.save_for_backward(x)
        ctx.tap = tap
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        ctx.tap.add(x.detach(), grad_y)
        return grad_y, None, None, None


def inject(
    model: nn.Module,
    targets: Shapes,
    r: int,
    dtype: torch.dtype,
    kind: Callable[[nn.Module, int, torch.dtype], Layer] = LoraSBLinear,  # type: ignore[assignment]
) -> dict[str, Layer]:
    """Put a layer with an adapter around every target. The model computes what it did.

    Everything but what the adapters train is frozen.

    Returns:
        The new layers by the name of the layer that each one wraps, in the model's order.
    """
    model.requires_grad_(False)
    adapters = {}
    for name in targets:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        adapter = kind(parent.get_submodule(child), r, dtype)
        setattr(parent, child, adapter)
        adapters[name] = adapter
    return adapters


def trained_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """All that is trained, whatever has put it there: ``<layer>.<factor>`` -> the parameter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_scale(adapters: Mapping[str, AdapterLinear], scale: float) -> None:
    """Multiply all branches; at 0 the model is exactly the base."""
    for adapter in adapters.values():
        adapter.scale = scale


def to_plain_lora(A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> LoraPair:
    """The LoRA pair of the same update: ``lora_A = A`` (r, in), ``lora_B = B R`` (out, r); fp32."""
    return LoraPair(A.float(), B.float() @ R.float())
