"""The LoRA-SB layer, and how it gets into a model and out of it as a plain LoRA pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_ds.config import ALL_LINEAR, ConfigError

# Called in the backward pass with a layer's input (…, in) and the gradient of its output (…, out).
Tap = Callable[[torch.Tensor, torch.Tensor], None]
Shapes = dict[str, tuple[int, int]]  # layer name -> (out, in)


class LoraSBLinear(nn.Module):
    """A frozen linear layer with a LoRA-SB branch: ``y = W0 x + b0 + B R A x`` (arXiv 2411.19557).

    A (r, in) and B (out, r) are frozen and orthonormal: ``A Aᵀ = Bᵀ B = I``. R (r, r) is trained.
    All three are zero until the init phase fills them.

    Attributes:
        enabled: False switches the branch off; the layer is then exactly the base.
        tap: when set, sees every input and output gradient of the base layer.
    """

    def __init__(self, base_layer: nn.Linear, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.lora_A = nn.Parameter(zeros(r, self.in_features), requires_grad=False)
        self.lora_B = nn.Parameter(zeros(self.out_features, r), requires_grad=False)
        self.lora_R = nn.Parameter(zeros(r, r))
        self.enabled = True
        self.tap: Tap | None = None

    @property
    def r(self) -> int:
        """The adapter's rank."""
        # ZeRO-3 keeps the whole shape of what it has sharded in ds_shape.
        return int(getattr(self.lora_R, "ds_shape", self.lora_R.shape)[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self.tap is not None:
            # A leaf that requires grad makes autograd reach this layer although everything below
            # is frozen, and no further down than the lowest layer that has one.
            anchor = torch.zeros(0, device=x.device, requires_grad=True)
            y = _TapFunction.apply(y, x, anchor, self.tap)
        if self.enabled:
            y = y + F.linear(F.linear(F.linear(x, self.lora_A), self.lora_R), self.lora_B)
        return y


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
        ctx.tap(x.detach(), grad_y)
        return grad_y, None, None, None


def linear_layers(model: Any) -> Shapes:
    """Every linear layer but the head, by name in the model's order. 4-bit layers count."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def select_targets(layers: Shapes, target_modules: str, r: int) -> Shapes:
    """The layers that get an adapter: all, or those whose name is or ends in a given one (PEFT).

    Raises:
        ConfigError: if a name matches nothing, or r is larger than a matched layer allows.
    """
    if target_modules == ALL_LINEAR:
        targets = layers
        missing = [] if layers else [ALL_LINEAR]
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
        adapter = LoraSBLinear(parent.get_submodule(child), r, dtype)  # type: ignore[arg-type]
        setattr(parent, child, adapter)
        adapters[name] = adapter
    return adapters


def enable(adapters: Mapping[str, LoraSBLinear], enabled: bool) -> None:
    """Switch all branches on or off; off, the model is exactly the base."""
    for adapter in adapters.values():
        adapter.enabled = enabled


def to_plain_lora(A: torch.Tensor, B: torch.Tensor, R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The LoRA pair of the same update: ``lora_A = A`` (r, in), ``lora_B = B R`` (out, r); fp32."""
    return A.float(), B.float() @ R.float()
