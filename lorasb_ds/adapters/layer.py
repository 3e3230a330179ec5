"""The base class of linear layers with an adapter, and the hook that sees their gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasb_ds.adapters.low_rank import LoraPair
from lorasb_ds.distributed import zero
from lorasb_ds.models.experts import ExpertsLinear
from lorasb_ds.models.linear_layers import layer_shape
from lorasb_ds.models.quantization import PackedLinear

AdapterT = TypeVar("AdapterT", bound="AdapterLinear")


class GradientHook(Protocol):
    """Sees a layer's inputs and output gradients, from which its weight gradient is computed."""

    def on_forward(self, x: torch.Tensor, routing: Any = None) -> None:
        """Note that the layer was called with x (…, in), and again when it is recomputed.

        Args:
            routing: a ``Routing`` if the rows belong to experts.
        """

    def on_backward(self, x: torch.Tensor, grad_y: torch.Tensor, routing: Any = None) -> None:
        """Take the layer's input (…, in) and output gradient (…, out), in the backward pass."""


class AdapterLinear(nn.Module, ABC):
    """A frozen linear layer with a low-rank branch, some of whose factors are trained.

    All factors are zero until the init phase fills them; until then the layer equals its base.

    Args:
        base_layer: ``nn.Linear``, a quantized layer, or transformers' ``Conv1D``, whose weight is
            (in, out), each with or without a bias.
        dtype: of the factors.

    Attributes:
        lora_A, lora_B: (r, in) and (out, r).
        trained, frozen: names of the factors.
        kept: names of the factors of updates in earlier bases (``--rebase-every``).
        num_kept: how many updates those are; they are part of the frozen layer.
        scale: multiplies the branch. 0 skips the branch, so that the layer is exactly its base; the
            search for eta uses other values; else 1.
        gradient_hook: if set, sees every input and output gradient of the base layer.
        has_plain_base: whether the base computes ``W x + b`` and nothing else.
    """

    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    kept: tuple[str, ...] = ()
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
        self.num_kept = 0
        self.gradient_hook: GradientHook | None = None
        # A subclass of nn.Linear may override forward with something else.
        of_ours = isinstance(base_layer, PackedLinear | ExpertsLinear)
        plain = (nn.Linear.forward, Conv1D.forward)
        self.has_plain_base = of_ours or type(base_layer).forward in plain

    @property
    def num_matrices(self) -> int:
        """How many matrices (out, in) the layer has: one, or one for each expert."""
        return 1

    def add_factor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Add a parameter of zeros, which requires grad if it is one of ``trained``."""
        zeros = torch.zeros(shape, dtype=dtype, device=self.weight.device)
        setattr(self, name, nn.Parameter(zeros, requires_grad=name in self.trained))

    def factor(self, name: str) -> nn.Parameter:
        """Return one of the factors ``trained`` and ``frozen``, maybe sharded."""
        parameter: nn.Parameter = getattr(self, name)
        return parameter

    def factor_shape(self, name: str) -> torch.Size:
        """Return the whole shape of a factor that may be sharded."""
        return zero.whole_shape(self.factor(name))

    @abstractmethod
    def plain_lora(self, values: Mapping[str, torch.Tensor]) -> LoraPair:
        """Return the update that given factors make as a LoRA pair, without ``scale``; fp32.

        Args:
            values: name -> whole value, of all ``trained`` and ``frozen``.
        """

    @property
    def weight(self) -> Any:
        """The base layer's weight, for models that look at it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias, likewise."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        """Compute the layer.

        Args:
            x: (…, in).
            routing: the ``Routing`` of x's rows, if they belong to experts.
        """
        if self.scale != 0 and self.gradient_hook is None and self.has_plain_base:
            return self.fused_forward(x, *routing)
        y = self.frozen_output(x, *routing)
        if self.gradient_hook is not None:
            self.gradient_hook.on_forward(x, *routing)
            # A leaf that requires grad makes autograd run back to this layer although everything
            # below is frozen, and no further than the lowest layer with such a leaf.
            anchor = torch.zeros(0, device=x.device, requires_grad=True)
            y = _HookFunction.apply(y, x, anchor, self.gradient_hook, *routing)
        if self.scale != 0:
            y = y + self.scale * self.branch(x, *routing)
        return y

    def frozen_output(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        """Compute the layer without its branch."""
        y: torch.Tensor = self.base_layer(x, *routing)
        return y

    def kept_lora(self) -> LoraPair | None:
        """Return updates of earlier bases as a LoRA pair, fp32; None if there are none.

        Under ZeRO-3 the factors ``kept`` must be gathered.
        """
        return None

    @abstractmethod
    def fused_forward(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        """Compute base and branch in one autograd function; only where ``has_plain_base``."""

    @abstractmethod
    def branch(self, x: torch.Tensor, *routing: Any) -> torch.Tensor:
        """Return ΔW x, without ``scale``."""

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``W0 x + b0`` of a plain base, in x's dtype."""
        bias: Any = self.base_layer.bias
        return F.linear(x, self.base_weight(x.dtype), None if bias is None else bias.to(x.dtype))

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W0 (out, in) in a dtype, dequantized if necessary.

        Under ZeRO-3 the weight must be gathered.
        """
        base: Any = self.base_layer
        if isinstance(base, PackedLinear):
            return base.dequantize().to(dtype)
        W = base.weight.T if isinstance(base, Conv1D) else base.weight
        return W.detach().to(dtype)


def autocast(x: torch.Tensor) -> torch.Tensor:
    """Cast x to the dtype of its device's autocast, if that is enabled."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _HookFunction(torch.autograd.Function):
    """The identity on ``y``; its backward passes ``(x, dL/dy)`` to the hook.

    x goes through ``save_for_backward``, so that gradient checkpointing can drop and recompute it.
    """

    @staticmethod
    def forward(ctx, y, x, anchor, hook, *routing):
        ctx.save_for_backward(x)
        ctx.hook, ctx.routing = hook, routing
        return y.clone()  # not a view: some models add to a layer's output in place

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        ctx.hook.on_backward(x.detach(), grad_y, *ctx.routing)
        return grad_y, *(None for _ in ctx.needs_input_grad[1:])
