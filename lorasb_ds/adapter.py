"""The LoRA-SB layer, and how it gets into a model and out of it as a plain LoRA pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lorasb_ds.config import ALL_LINEAR, ConfigError
from lorasb_ds.quantization import PackedLinear

Shapes = dict[str, tuple[int, int]]  # layer name -> (out, in)


class Tap(Protocol):
    """What watches a layer during the init."""

    def reached(self) -> None:
        """The layer was called; again when checkpointing recomputes it."""

    def add(self, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """In the backward pass: the layer's input (…, in) and its output's gradient (…, out)."""


class LoraSBLinear(nn.Module):
    """A frozen linear layer with a LoRA-SB branch: ``y = W0 x + b0 + B R A x`` (arXiv 2411.19557).

    A (r, in) and B (out, r) are frozen and orthonormal: ``A Aᵀ = Bᵀ B = I``. R (r, r) is trained.
    All three are zero until the init phase fills them.

    Args:
        base_layer: ``nn.Linear``, a 4-bit layer, or transformers' ``Conv1D``, whose weight is
            (in, out); only its output is used, so that any of them and any bias will do.

    Attributes:
        scale: multiplies the branch; 1 but in the search for eta. At 0 the branch is not computed
            and the layer is exactly the base.
        tap: when set, sees every input and output gradient of the base layer.
    """

    def __init__(self, base_layer: nn.Module, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        weight: Any = base_layer.weight
        device = weight.device
        self.base_layer = base_layer
        self.out_features, self.in_features = layer_shape(base_layer)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.lora_A = nn.Parameter(zeros(r, self.in_features), requires_grad=False)
        self.lora_B = nn.Parameter(zeros(self.out_features, r), requires_grad=False)
        self.lora_R = nn.Parameter(zeros(r, r))
        self.scale = 1.0
        self.tap: Tap | None = None
        # A subclass may compute something else than a linear layer does.
        self._has_plain_base = isinstance(base_layer, PackedLinear) or type(base_layer).forward in (
            nn.Linear.forward,
            Conv1D.forward,
        )

    @property
    def r(self) -> int:
        """The adapter's rank."""
        # ZeRO-3 keeps the whole shape of what it has sharded in ds_shape.
        return int(getattr(self.lora_R, "ds_shape", self.lora_R.shape)[0])

    @property
    def weight(self) -> Any:
        """The base layer's, for models that look at it."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale != 0 and self.tap is None and self._has_plain_base:
            return _LoraSBFunction.apply(x, self.lora_R, self)
        y = self.base_layer(x)
        if self.tap is not None:
            self.tap.reached()
            # A leaf that requires grad makes autograd reach this layer although everything below
            # is frozen, and no further down than the lowest layer that has one.
            anchor = torch.zeros(0, device=x.device, requires_grad=True)
            y = _TapFunction.apply(y, x, anchor, self.tap)
        if self.scale != 0:
            branch = F.linear(F.linear(F.linear(x, self.lora_A), self.lora_R), self.lora_B)
            y = y + self.scale * branch
        return y

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """W0 (out, in) in a dtype; dequantized anew where it has to be. Gathered, under ZeRO-3."""
        base: Any = self.base_layer
        if isinstance(base, PackedLinear):
            return base.dequantize().to(dtype)
        W = base.weight.T if isinstance(base, Conv1D) else base.weight
        return W.detach().to(dtype)

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


def layer_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer of any kind."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def linear_layers(model: Any) -> Shapes:
    """Every linear layer but the head, by name in the model's order. 4-bit layers count.

    A layer that two parents share is left out: PEFT would load its adapter into one of them only.
    (Blocks that are used several times are fine: their layers have one parent.)
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parents: defaultdict[nn.Module, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for child in module.children():
            parents[child].add(module)
    return {
        name: layer_shape(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and len(parents[module]) == 1
    }


def expert_layers(model: nn.Module) -> dict[str, int]:
    """Modules that hold the experts of an MoE block as 3-D parameters, and their elements.

    They are no linear layers, so that they get no adapter and stay frozen.
    """
    return {
        name: sum(p.numel() for p in experts)
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv1d)
        and (experts := [p for p in module.parameters(recurse=False) if p.ndim == 3])
    }


def select_targets(layers: Shapes, target_modules: str, r: int) -> Shapes:
    """The layers that get an adapter: all, or those whose name is or ends in a given one (PEFT).

    All are all with more than one output: gates such as Qwen-MoE's of shared experts have one.

    Raises:
        ConfigError: if a name matches nothing, or r is larger than a matched layer allows.
    """
    if target_modules == ALL_LINEAR:
        targets = {name: shape for name, shape in layers.items() if min(shape) > 1}
        missing = [] if targets else [ALL_LINEAR]
    else:
        wanted = [name.strip() for name in target_modules.split(",") if name.strip()]
        matches = {w: {n for n in layers if n == w or n.endswith("." + w)} for w in wanted}
        missing = [w for w, names in matches.items() if not names] or ([] if wanted else ["''"])
        targets = {n: s for n, s in layers.items() if any(n in m for m in matches.values())}
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in layers})
        raise ConfigError(
            f"--target-modules {target_modules}: no linear layer matches {', '.join(missing)}. The "
            f"model has linear layers named {', '.join(kinds) or '(none)'}."
        )
    name, shape = min(targets.items(), key=lambda item: min(item[1]))
    if r > min(shape):
        raise ConfigError(
            f"--r {r} exceeds min(out, in) = {min(shape)} of {name}; lower --r, or leave such "
            "layers out by --target-modules."
        )
    return targets


def inject(
    model: nn.Module, targets: Shapes, r: int, dtype: torch.dtype
) -> dict[str, LoraSBLinear]:
    """Put a LoRA-SB layer around every target. The model computes what it did: R is zero.

    Everything but R is frozen.

    Returns:
        The new layers by the name of the layer that each one wraps, in the model's order.
    """
    model.requires_grad_(False)
    adapters = {}
    for name in targets:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        adapter = LoraSBLinear(parent.get_submodule(child), r, dtype)
        setattr(parent, child, adapter)
        adapters[name] = adapter
    return adapters


def set_scale(adapters: Mapping[str, LoraSBLinear], scale: float) -> None:
    """Multiply all branches; at 0 the model is exactly the base."""
    for adapter in adapters.values():
        adapter.scale = scale


def to_plain_lora(A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The LoRA pair of the same update: ``lora_A = A`` (r, in), ``lora_B = B R`` (out, r); fp32."""
    return A.float(), B.float() @ R.float()
