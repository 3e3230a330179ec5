"""The layers of a model that can get an adapter."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasb_ds.config.adapter_options import ALL_LINEAR, wide_enough
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.classification import head_modules
from lorasb_ds.models.hybrids import MODELING, layers_read_by_parents
from lorasb_ds.models.multimodal import text_layers_prefix

Shapes = dict[str, tuple[int, int]]  # layer name -> (out, in)


def layer_shape(layer: Any) -> tuple[int, int]:
    """Return (out, in) of a linear layer of any kind."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def linear_layers(model: Any) -> Shapes:
    """Return every linear layer but the head, in the model's order, quantized ones included.

    A layer that two parents share is left out: PEFT would load its adapter into one of them only.
    (Blocks that are used several times are fine: their layers have one parent.) So are routers of
    experts, which are small, sensitive to rounding, and in some families give several tensors or
    read the weight themselves; layers that are not called at all (``hybrids``); and those that
    compute something else (``unlike_linear``). Of a multimodal model the text part's are returned.
    A classifier's head may be several layers (``head_modules``).
    """
    trained = tuple(f"{module}." for module in head_modules(model))
    prefix = text_layers_prefix(model) if hasattr(model, "get_decoder") else ""
    others = {*layers_read_by_parents(model), *unlike_linear(model)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    parents: defaultdict[nn.Module, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for child in module.children():
            parents[child].add(module)
    return {
        name: layer_shape(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(prefix)
        and module is not head
        and not f"{name}.".startswith(trained)
        and len(parents[module]) == 1
        and not _is_router(name, module, *parents[module])
        and name not in others
    }


def unlike_linear(model: nn.Module) -> dict[str, int]:
    """Return the layers that are linear by their class only, such as grouped projections.

    An adapter on one would add something else than ``x (B R A)ᵀ``, if anything that has its shape.

    Returns:
        Name -> elements of the weight.
    """
    found = {}
    for name, module in model.named_modules():
        kind: Any = type(module)
        if not isinstance(module, nn.Linear) or not kind.__module__.startswith(MODELING):
            continue  # such as a quantized layer
        if "router" not in kind.__name__.lower() and not _computes_linear(kind):
            found[name] = module.weight.numel()
    return found


@functools.cache
def _computes_linear(kind: Any) -> bool:
    """Return whether a class's forward is ``x Wᵀ + b``: tried on a layer of 2 x 3 numbers."""
    if kind.forward is nn.Linear.forward:
        return True
    layer = torch.nn.utils.skip_init(nn.Linear, 3, 2, device="cpu").requires_grad_(False)
    layer.weight.copy_(torch.arange(6).view(2, 3))
    layer.bias.copy_(torch.arange(2))
    layer.__class__ = kind
    x = torch.arange(12.0, device="cpu").view(1, 4, 3)
    try:
        y = layer(x)
    except Exception:  # it needs something that nn.Linear does not have
        return False
    return isinstance(y, torch.Tensor) and torch.equal(y, F.linear(x, layer.weight, layer.bias))


def _is_router(name: str, layer: nn.Module, parent: nn.Module) -> bool:
    """Return whether a layer routes tokens to experts.

    By its name, by the classes' names, or by its outputs: one for each of its parent's experts, of
    which the parent takes some.
    """
    if name.rpartition(".")[2] in ("gate", "router"):
        return True
    if any("router" in type(module).__name__.lower() for module in (layer, parent)):
        return True
    return hasattr(parent, "top_k") and layer_shape(layer)[0] == getattr(parent, "num_experts", 0)


def expert_layers(model: nn.Module) -> dict[str, int]:
    """Return the modules that hold MoE experts as parameters -> their number of elements.

    They are not linear layers: they get no adapter and stay frozen. The parameters are 3-D, or in
    DBRX 2-D; other modules with 3-D ones (recurrent gates, tables of positions) hold no experts.
    """
    found = {}
    for name, module in model.named_modules():
        if "expert" not in f"{name} {type(module).__name__}".lower():
            continue
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            continue
        parameters = [p for p in module.parameters(recurse=False) if p.ndim in (2, 3)]
        deepest = max((p.ndim for p in parameters), default=0)
        if size := sum(p.numel() for p in parameters if p.ndim == deepest):
            found[name] = size
    return found


def select_targets(
    layers: Shapes,
    target_modules: str,
    r: int,
    directions: int = 1,
    elsewhere: Iterable[str] = (),
) -> Shapes:
    """Select the layers that get an adapter, by PEFT's rule: a name, or the end of one.

    "all-linear" leaves out those that are too narrow (``wide_enough``); a name does not.

    Args:
        layers: of ``linear_layers``.
        target_modules: "all-linear", or names separated by commas.
        r: rank of the adapter.
        directions: the method takes ``directions * r`` singular directions of each layer.
        elsewhere: names that may be selected too, of projections of experts.
    Raises:
        ConfigError: if a name matches nothing, or r is larger than a matched layer allows.
    """
    if is_all_linear(target_modules):
        targets = wide_enough(layers, r * directions) or dict(layers)
        missing = [] if targets else [ALL_LINEAR]
    else:
        targets = {name: layers[name] for name in select_names(layers, target_modules)}
        wanted = _names_in(target_modules)
        everything = (*layers, *elsewhere)
        missing = [w for w in wanted if not any(_is_named(name, w) for name in everything)]
        missing = missing if wanted else ["''"]
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in (*layers, *elsewhere)})
        raise ConfigError(
            f"--target-modules {target_modules}: no linear layer matches {', '.join(missing)}. The "
            f"model has linear layers named {', '.join(kinds) or '(none)'}."
        )
    # Of all-linear only narrow ones are left where no layer is wide enough: the widest tells r.
    pick = max if is_all_linear(target_modules) else min
    name = pick(targets, key=lambda name: min(targets[name]), default=None)
    if name is not None and r * directions > (most := min(targets[name])):
        taken = "" if directions == 1 else f" times {directions} (the method takes so many)"
        raise ConfigError(
            f"--r {r}{taken} exceeds min(out, in) = {most} of {name}; lower --r, or leave such "
            "layers out by --target-modules."
        )
    return targets


def select_names(names: Iterable[str], target_modules: str) -> list[str]:
    """Return the names that ``--target-modules`` selects, by PEFT's rule."""
    if is_all_linear(target_modules):
        return list(names)
    wanted = _names_in(target_modules)
    return [name for name in names if any(_is_named(name, w) for w in wanted)]


def is_all_linear(target_modules: str) -> bool:
    """Return whether ``--target-modules`` asks for all layers."""
    return _names_in(target_modules) == [ALL_LINEAR]


def _is_named(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _names_in(target_modules: str) -> list[str]:
    return [name.strip() for name in target_modules.split(",") if name.strip()]
