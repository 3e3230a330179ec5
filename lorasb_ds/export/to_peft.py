"""A stored adapter as a plain LoRA folder, cut to a smaller rank where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasb_ds.adapters.low_rank import LoraPair, energy_kept, padded, product_svd
from lorasb_ds.adapters.peft_writer import peft_tensors, save_peft_adapter
from lorasb_ds.config.run_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.adapter_reader import StoredAdapter
from lorasb_ds.models.loading import DTYPES
from lorasb_ds.system.files import check_replaceable

ADAPTER_FILES = {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class EnergyKept:
    """Shares of ``‖ΔW‖²`` that the first k directions of every layer hold, k = 1, 2, …, r."""

    total: list[float]  # of all layers together
    lowest: list[float]  # of the layer that loses most

    def smallest_r(self, energy: float) -> int:
        """The first k that keeps so much in all."""
        enough = energy - 1e-12  # sums of shares end below 1 by their rounding
        return next((k for k, kept in enumerate(self.total, 1) if kept >= enough), len(self.total))


def measure_energy(adapter: StoredAdapter) -> EnergyKept:
    """What every smaller rank would keep, from the exact SVD of every layer's update."""
    kept = torch.ones(len(adapter.layers), adapter.r, dtype=torch.float64)
    energies = torch.zeros(len(adapter.layers), dtype=torch.float64)
    for i, name in enumerate(adapter.layers):
        S = product_svd(adapter.pair(name)).S
        kept[i, : len(S)] = energy_kept(S)
        energies[i] = S.square().sum()
    weights = energies / energies.sum() if energies.sum() > 0 else torch.zeros_like(energies)
    total = weights @ kept if energies.sum() > 0 else kept[0]
    return EnergyKept(total.tolist(), kept.min(0).values.tolist())


def export_adapter(
    adapter: StoredAdapter,
    out: Path,
    *,
    r: int | None = None,
    dtype: str = "fp32",
    overwrite: bool = False,
) -> int:
    """Write a PEFT LoRA folder with alpha = r, every layer of rank r.

    Args:
        r: cut to it, by the best approximation of that rank. [default: the adapter's]
        overwrite: replace an adapter that is there.
    Returns:
        The bytes of its tensors.
    Raises:
        ConfigError: if r is larger than the adapter's, a number does not fit into ``dtype``, or
            ``out`` may not be written.
    """
    folder = check_folder(out, [adapter], overwrite)
    if r is not None and not 1 <= r <= adapter.r:
        raise ConfigError(f"--r {r}: the adapter has rank {adapter.r}; give 1 to {adapter.r}.")
    tensors: dict[str, torch.Tensor] = {}
    for name in adapter.layers:
        pair = adapter.pair(name)
        cut = product_svd(pair).pair(r) if r is not None and r < len(pair.A) else pair
        tensors |= peft_tensors(name, *rounded(name, padded(cut, r or adapter.r), dtype))
    write_adapter(folder, tensors, r or adapter.r, adapter.target_modules, adapter.base_path)
    return sum(tensor.nbytes for tensor in tensors.values())


def rounded(name: str, pair: LoraPair, dtype: str) -> LoraPair:
    """In ``dtype``. ConfigError if a number becomes infinite there."""
    result = LoraPair(*(factor.to(DTYPES[dtype]) for factor in pair))
    if not all(factor.isfinite().all() for factor in result):
        raise ConfigError(f"--dtype {dtype}: the factors of {name} exceed its range.")
    return result


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    r: int,
    target_modules: list[str],
    base: str | None,
) -> None:
    """A PEFT folder, in the place of one that is there: see ``check_folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_peft_adapter(folder, tensors, r=r, target_modules=target_modules, base_model=base)


def check_folder(out: Path, adapters: Sequence[StoredAdapter], overwrite: bool) -> Path:
    """The folder of ``--out``, which may be written.

    Raises:
        ConfigError: if something is there that is no adapter or may not be replaced, or that is
            read.
    """
    folder = out.expanduser().resolve()
    sources = [adapter.path.resolve() for adapter in adapters]
    if any(folder in (path, *path.parents) for path in (*sources, Path.cwd())):
        raise ConfigError(f"--out {out} holds what is read, or this shell. Name another folder.")
    check_replaceable(
        folder,
        overwrite,
        lambda it: {p.name for p in it.iterdir()} <= ADAPTER_FILES,
        "adapter's folder",
    )
    return folder


def max_lora_rank(r: int) -> int | None:
    """The smallest ``--max-lora-rank`` with which vLLM loads an adapter of rank r."""
    return next((allowed for allowed in VLLM_RANKS if r <= allowed), None)
