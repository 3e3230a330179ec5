"""Add stored adapters with weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasb_ds.adapters.low_rank import LoraPair, product_svd, weighted_sum
from lorasb_ds.adapters.peft_targets import TargetFields, target_fields
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.chat_format import tokenizer_files
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.export.to_peft import check_folder, rounded, write_adapter


@dataclass(frozen=True)
class Combined:
    """What ``combine_adapters`` wrote.

    Attributes:
        r: the rank of the sum.
        one_basis: all adapters have the same A in every layer, and R's are summed.
        energy_kept: fraction of the sum's ``‖ΔW‖²``; 1 where nothing was truncated.
    """

    r: int
    one_basis: bool
    energy_kept: float


def combine_adapters(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    out: Path,
    *,
    r: int | None = None,
    dtype: str = "fp32",
    overwrite: bool = False,
) -> Combined:
    """Write ``Σ wᵢ ΔWᵢ`` as a PEFT LoRA folder.

    Adapters of one basis (the same A) are summed exactly at their rank, whatever the weights. Other
    factors are stacked, which is exact at the sum of the ranks; with ``r``, the QR and SVD of the
    stack give the best update of that rank. A layer that an adapter lacks counts as 0.

    Args:
        weights: one for each adapter.
        r: truncate the sum to this rank. [default: the rank at which it is exact]
        dtype: of the written tensors: "fp32", "bf16" or "fp16".
        overwrite: replace an adapter that is already in ``out``.
    Raises:
        ConfigError: if they cannot be added (their layers have different shapes, …), or ``out`` may
            not be written.
    """
    _check(adapters, weights)
    folder = check_folder(out, adapters, overwrite)
    shapes = {name: shape for adapter in adapters for name, shape in adapter.shapes.items()}
    sums, one_basis = {}, True
    for name in shapes:
        having = [i for i, adapter in enumerate(adapters) if name in adapter.layers]
        pairs = [adapters[i].pair(name) for i in having]
        sums[name] = weighted_sum(pairs, [weights[i] for i in having])
        if not sums[name].B.isfinite().all():
            raise ConfigError(f"--weights: the sum of {name} exceeds fp32's range.")
        one_basis &= len(sums[name].A) == len(pairs[0].A)
    # An update's rank is at most its shorter side.
    largest = max(min(len(pair.A), *shapes[name]) for name, pair in sums.items())
    if r is not None and not 1 <= r <= largest:
        raise ConfigError(f"--r {r}: the sum has rank {largest} at most; give 1 to {largest}.")
    wanted = r or largest
    written: dict[str, LoraPair] = {}
    is_cut = any(len(pair.A) > wanted for pair in sums.values())
    kept, whole = 0.0, 0.0
    for name, pair in sums.items():
        if is_cut:
            svd = product_svd(pair)
            kept += svd.S[:wanted].square().sum().item()
            whole += svd.S.square().sum().item()
            if len(pair.A) > wanted:
                pair = svd.pair(wanted)
        written[name] = rounded(name, pair, dtype)
    first = adapters[0]
    same = set(shapes) == set(first.layers)  # else its target_modules would miss some
    experts = {name: expert for of in adapters for name, expert in of.experts.items()}
    linear = [name for name in shapes if name not in experts]
    fields = first.target_fields if same else _target_fields(adapters, linear)
    beside = tokenizer_files(first)
    write_adapter(folder, written, wanted, fields, experts, first.base_path, beside)
    return Combined(wanted, one_basis, kept / whole if whole else 1.0)


def _target_fields(adapters: Sequence[StoredAdapter], layers: Collection[str]) -> TargetFields:
    """Return the fields by which PEFT finds exactly these layers, which some adapters have."""
    by_weight = {
        name for adapter in adapters for name in adapter.layers if adapter.is_named_by_weight(name)
    }
    modules = [name for name in layers if name not in by_weight]
    return target_fields(adapters[0].model_type, modules, [f"{name}.weight" for name in by_weight])


def _check(adapters: Sequence[StoredAdapter], weights: Sequence[float]) -> None:
    if len(weights) != len(adapters):
        raise ConfigError(
            f"--weights has {len(weights)} numbers for {len(adapters)} adapters. Give one for each."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError("--weights must be finite numbers.")
    known: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for name, shape in adapter.shapes.items():
            if known.setdefault(name, shape) != shape:
                raise ConfigError(
                    f"{adapter.path}: {name} has shape {shape}, and {known[name]} in another "
                    "adapter. Only adapters of one base can be combined."
                )
