"""Measure what an adapter has learned, layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lorasb_ds.adapters.low_rank import (
    effective_rank,
    orthonormality_error,
    product_svd,
    weighted_sum,
)
from lorasb_ds.config.run_layout import BASIS_FILE
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import read_init
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.models.tensor_reader import TensorReader

SIDES = ("lora_A", "lora_B")
BLOCK = re.compile(r"(.*?)\.?([0-9]{1,6})\.(.+)")  # before a block, its number, and within it


@dataclass(frozen=True)
class LayerUpdate:
    """One layer's ``ΔW = B R A``. With orthonormal A and B, R has its singular values.

    Attributes:
        orthonormality_error: the largest entry of ``|AAᵀ - I|`` and, where the basis is available,
            ``|BᵀB - I|``.
        norm: ``‖ΔW‖`` (Frobenius).
        relative_norm: ``‖ΔW‖ / ‖W0‖``; None where the base was not read.
        trained_share: ``‖ΔW - ΔW_init‖ / ‖ΔW‖``, what training has added to the init; None where
            no basis is available.
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
    """Measure the update of every layer.

    Args:
        base: layer -> its weight in the base's files, of which a few rows are read at a time; None:
            ``relative_norm`` is not measured.
    Returns:
        Layer -> its update, in the adapter's order.
    """
    found, start = {}, read_init(adapter)
    for name, shape in adapter.shapes.items():
        pair = adapter.pair(name)
        S = product_svd(pair).S
        size = S.norm().item()
        # A of the last basis comes first; those of earlier ones are not orthogonal to it.
        r = start.rank_of(name) if start is not None and name in start.layers else len(pair.A)
        errors, share = [orthonormality_error(pair.A[:r])], None
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
    """Compute a stored tensor's Frobenius norm, a few rows at a time."""
    total = 0.0
    try:
        with closing(TensorReader({name: weight})) as reader:
            for rows in reader.rows(name, torch.float32):
                total += rows.double().square().sum().item()
    except ValueError as error:
        raise ConfigError(f"The base cannot be read: {error}.") from error
    return total**0.5


def draw_updates(path: Path, layers: Mapping[str, LayerUpdate]) -> None:
    """Draw heat maps of blocks by modules as a PNG: norm, effective rank, what was trained.

    Args:
        layers: from ``inspect_adapter``.
    """
    import numpy as np
    from matplotlib.figure import Figure

    cells = _blocks_and_modules(layers)
    modules = list(dict.fromkeys(module for _, module in cells.values()))
    blocks = sorted({block for block, _ in cells.values()})
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
        for name, (block, module) in cells.items():
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


def _blocks_and_modules(names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Map layer -> its block (-1: none), and the shortest unambiguous name of its module there."""
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


@dataclass(frozen=True)
class Overlaps:
    """Means over layers, each between 0 (orthogonal subspaces) and 1 (the same one).

    Attributes:
        A: ``A[i][j]`` is that of the row spaces of A of runs i and j.
        B: of the column spaces of B.
        chance: of two random subspaces, for A and B: the mean of r / in, and of r / out.
    """

    A: list[list[float]]
    B: list[list[float]]
    chance: tuple[float, float]


def subspace_overlaps(bases: torch.Tensor) -> torch.Tensor:
    """Mean squared cosines of the principal angles between all pairs of subspaces.

    ``‖Q_iᵀ Q_j‖²_F / r``, where Q has orthonormal columns (Golub and Van Loan, section 6.4.3; Hu
    et al., arXiv 2106.09685, eq. 4, with i = j).

    Args:
        bases: (runs, n, r), r <= n: columns that span a subspace for each run; they need not be
            orthonormal, as those that were rounded to bf16 are not quite.
    Returns:
        (runs, runs), fp32; symmetric, with ones on the diagonal.
    """
    num_runs, n, r = bases.shape
    Q = torch.linalg.qr(bases.float()).Q
    columns = Q.transpose(0, 1).reshape(n, num_runs * r)
    cosines = (columns.T @ columns).reshape(num_runs, r, num_runs, r)
    return cosines.square().sum(dim=(1, 3)) / r


def basis_overlaps(folders: Sequence[Path]) -> Overlaps:
    """Return the overlaps of the bases of runs. One layer of every run is in memory at a time.

    Raises:
        ConfigError: if one of them is missing or broken, or they are not of the same layers with
            the same r.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_open(folder)) for folder in folders]
        shapes = [
            {name: file.get_slice(name).get_shape() for name in file.keys() if _is_factor(name)}  # noqa: SIM118
            for file in files
        ]
        for folder, found in zip(folders, shapes, strict=True):
            if found != shapes[0]:
                raise ConfigError(
                    f"{folder} and {folders[0]} have bases of other layers, or of another r: they "
                    "cannot be compared. Start anew in another --output-dir."
                )
        sums = {side: torch.zeros(len(files), len(files)) for side in SIDES}
        chance = dict.fromkeys(SIDES, 0.0)
        for name in shapes[0]:
            side = name.rpartition(".")[2]
            bases = torch.stack([_columns(file.get_tensor(name), side) for file in files])
            sums[side] += subspace_overlaps(bases)
            chance[side] += bases.shape[2] / bases.shape[1]
    num_layers = len(shapes[0]) // len(SIDES)
    means = {side: (total / num_layers).tolist() for side, total in sums.items()}
    A, B = SIDES
    return Overlaps(means[A], means[B], (chance[A] / num_layers, chance[B] / num_layers))


def _open(folder: Path) -> safe_open:
    try:
        return safe_open(folder / BASIS_FILE, "pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / BASIS_FILE} cannot be read: {error}. Remove the run's folder, and start "
            "the same command again: that run is done anew."
        ) from error


def _is_factor(name: str) -> bool:
    return name.rpartition(".")[2] in SIDES


def _columns(factor: torch.Tensor, side: str) -> torch.Tensor:
    """The directions as columns: A has them as rows."""
    return factor.T if side == "lora_A" else factor
