"""The adapters of a whole model: inject, disable and freeze them, list what is trainable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.adapters.layer import AdapterLinear, AdapterT
from lorasb_ds.adapters.lora import LoraLinear
from lorasb_ds.adapters.lora_sb import LoraSBLinear
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.models.experts import ExpertsLinear


def inject(
    model: nn.Module,
    targets: Iterable[str],
    r: int,
    dtype: torch.dtype,
    layer_class: Callable[[nn.Module, int, torch.dtype], AdapterT] = LoraSBLinear,  # type: ignore[assignment]
    ranks: Mapping[str, int] | None = None,
) -> dict[str, AdapterT]:
    """Wrap every target layer in a layer with an adapter, and freeze all other parameters.

    The model's output does not change.

    Args:
        targets: names of the layers to wrap, and of projections of experts (``ExpertsLinear``).
        dtype: of the adapters' factors.
        layer_class: makes the new layer from ``(base_layer, r, dtype)``.
        ranks: layer -> its r, of those that have another.
    Returns:
        The new layers by the names of the layers that they wrap, in the model's order.
    """
    model.requires_grad_(False)
    adapters = {}
    for name in targets:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        adapter = layer_class(parent.get_submodule(child), (ranks or {}).get(name, r), dtype)
        setattr(parent, child, adapter)
        adapters[name] = adapter
    return adapters


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad, ours or PEFT's, by name (``<layer>.<factor>``)."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_scale(adapters: Mapping[str, AdapterLinear], scale: float) -> None:
    """Set the factor that multiplies all branches; at 0 the model is exactly its base."""
    for adapter in adapters.values():
        adapter.scale = scale


@contextmanager
def disable_adapters(adapters: Mapping[str, AdapterLinear]) -> Iterator[None]:
    """Make the model exactly its base inside the ``with`` block."""
    set_scale(adapters, 0.0)
    try:
        yield
    finally:
        set_scale(adapters, 1.0)


@contextmanager
def freeze_factors(model: nn.Module) -> Iterator[None]:
    """Keep factors from getting gradients, and the engine from reducing any, in the block."""
    trained = trainable_parameters(model).values()
    for factor in trained:
        factor.requires_grad_(False)
    try:
        yield
    finally:
        for factor in trained:
            factor.requires_grad_(True)


def lora_sb_layer(
    base_layer: nn.Module,
    r: int,
    dtype: torch.dtype,
    expert_r: int | None = None,
    max_kept: int = 0,
) -> LoraSBLinear:
    """Make LoRA-SB's layer around a linear layer or a projection of experts.

    Args:
        expert_r: rank of the adapters of experts. [default: r]
        max_kept: as for ``LoraSBLinear``.
    """
    if isinstance(base_layer, ExpertsLinear):
        return LoraSBExperts(base_layer, expert_r or r, dtype, max_kept=max_kept)
    return LoraSBLinear(base_layer, r, dtype, max_kept=max_kept)


def layer_class_of(
    config: RunConfig, expert_r: int = 0, max_kept: int = 0
) -> Callable[[nn.Module, int, torch.dtype], AdapterLinear]:
    """Return ``inject``'s ``layer_class`` for a run with one of ``METHODS``.

    Args:
        expert_r: rank of the adapters of experts.
        max_kept: how many updates in earlier bases a layer may keep.
    """
    method = METHODS[config.method]
    if method.trains_r:
        return partial(lora_sb_layer, expert_r=expert_r, max_kept=max_kept)
    return partial(
        LoraLinear,
        scaling=method.scale(config.r, config.lora_alpha),
        offset=method.offset,
        precondition=config.precondition,
    )
