"""What an adapter has learned, layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.adapter_files import StoredAdapter, read_init
from lorasb_ds.adapters.low_rank import (
    effective_rank,
    orthonormality_error,
    product_svd,
    weighted_sum,
)
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.models.streaming import TensorReader

BLOCK = re.compile(r"(.*?)\.?([0-9]{1,6})\.(.+)")  # before a block, its number, and within it


@dataclass(frozen=True)
class LayerUpdate:
    """One layer's ``ΔW = B R A``. With orthonormal A and B, R has its singular values.

    Attributes:
        orthonormality_error: the largest entry of ``|AAᵀ - I|`` and, where the basis is at hand,
            ``|BᵀB - I|``.
        norm: ``‖ΔW‖`` (Frobenius).
        relative_norm: ``‖ΔW‖ / ‖W0‖``; None where the base was not read.
        trained_share: ``‖ΔW - ΔW_init‖ / ‖ΔW‖``, what training has added to the init; None where
            no basis says what the init was.
    """

    r: int
    shape: tuple[int, int]
    orthonormality_error: float
    singular_values: tuple[float, ...]  # r of them
    effective_rank: float
    norm: float
    relative_norm: float | None
    trained_share: float | None


def inspect_adapter(
    adapter: StoredAdapter, base: Mapping[str, StoredTensor] | None = None
) -> dict[str, LayerUpdate]:
    """Layer -> its update, in the adapter's order.

    Args:
        base: layer -> its weight in the base's files; a few rows are read at a time.
    """
    found, start = {}, read_init(adapter)
    for name, shape in adapter.shapes.items():
        pair = adapter.pair(name)
        S = product_svd(pair).S
        size = S.norm().item()
        errors, share = [orthonormality_error(pair.A)], None
        if start is not None and name in start.layers and start.shapes[name] == shape:
            errors.append(orthonormality_error(start.read(start.layers[name].B)))
            added = weighted_sum([pair, start.pair(name)], [1.0, -1.0])
            share = product_svd(added).S.norm().item() / size if size else 0.0
        weight_norm = None if base is None or name not in base else _norm(name, base[name])
        found[name] = LayerUpdate(
            r=len(pair.A),
            shape=shape,
            orthonormality_error=max(errors),
            singular_values=tuple(S.tolist()),
            effective_rank=effective_rank(S),
            norm=size,
            relative_norm=size / weight_norm if weight_norm else None,
            trained_share=share,
        )
    return found


def _norm(name: str, weight: StoredTensor) -> float:
    """Frobenius norm of a stored tensor, a few rows at a time."""
    total = 0.0
    try:
        with closing(TensorReader({name: weight})) as reader:
            for rows in reader.rows(name, torch.float32):
                total += rows.double().square().sum().item()
    except ValueError as error:
        raise ConfigError(f"The base cannot be read: {error}.") from error
    return total**0.5


def draw_updates(path: Path, layers: Mapping[str, LayerUpdate]) -> None:
    """A PNG of heat maps, blocks of the model by modules: size, effective rank, what was trained.

    Args:
        layers: of ``inspect_adapter``.
    """
    import numpy as np
    from matplotlib.figure import Figure

    places = _places(layers)
    modules = list(dict.fromkeys(module for _, module in places.values()))
    blocks = sorted({block for block, _ in places.values()})
    has_base = any(layer.relative_norm is not None for layer in layers.values())
    panels: dict[str, str] = {
        "relative_norm" if has_base else "norm": "‖ΔW‖ / ‖W0‖" if has_base else "‖ΔW‖",
        "effective_rank": "effective rank",
    }
    if any(layer.trained_share is not None for layer in layers.values()):
        panels["trained_share"] = "‖ΔW - ΔW_init‖ / ‖ΔW‖"
    width = 1.5 + len(panels) * (1.2 + 0.5 * len(modules))
    figure = Figure(figsize=(width, 2 + 0.2 * len(blocks)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        grid = np.full((len(blocks), len(modules)), np.nan)
        for name, (block, module) in places.items():
            value: Any = getattr(layers[name], field)
            if value is not None:
                grid[blocks.index(block), modules.index(module)] = value
        image = axis.imshow(grid, aspect="auto", cmap="viridis")
        axis.set(title=title)
        axis.set_xticks(range(len(modules)), modules, rotation=60, ha="right", fontsize="small")
        figure.colorbar(image, ax=axis)
    labels = ["-" if block < 0 else str(block) for block in blocks]
    axes[0].set_yticks(range(len(blocks)), labels, fontsize="small")
    axes[0].set(ylabel="block")
    figure.savefig(path, dpi=120)


def _places(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Layer -> its block (-1: none), and what it is in it, in as few words as tell it apart."""
    parts = {name: BLOCK.fullmatch(name) for name in names}
    wholes = {
        name: (-1, name) if found is None else (int(found[2]), f"{found[1]}.{found[3]}")
        for name, found in parts.items()
    }
    modules = {module for _, module in wholes.values()}
    short = Counter(module.rpartition(".")[2] for module in modules)
    return {
        name: (block, last if short[last := module.rpartition(".")[2]] == 1 else module)
        for name, (block, module) in wholes.items()
    }
