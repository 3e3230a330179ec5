"""What every layer with an adapter has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.distributed import zero
from lorasb_ds.models.linear_layers import layer_shape
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
