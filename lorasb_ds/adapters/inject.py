"""Adapters of a whole model: put in place, listed, switched on and off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from lorasb_ds.adapters.layer import AdapterLinear, Layer
from lorasb_ds.adapters.lora import LoraLinear
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.models.linear_layers import Shapes


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


def layer_kind(config: RunConfig) -> Callable[[nn.Module, int, torch.dtype], AdapterLinear]:
    """What ``inject`` puts around the layers of a run with one of ``METHODS``."""
    method = METHODS[config.method]
    if method.trains_r:
        return LoraSBLinear
    return partial(
        LoraLinear,
        scaling=method.scale(config.r, config.lora_alpha),
        offset=method.offset,
        precondition=config.precondition,
    )
