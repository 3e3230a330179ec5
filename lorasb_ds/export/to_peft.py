"""Write a stored adapter as a plain LoRA folder, truncated to a smaller rank if asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorasb_ds.adapters.low_rank import LoraPair, energy_kept, padded, product_svd
from lorasb_ds.adapters.peft_experts import expert_fields, expert_tensors
from lorasb_ds.adapters.peft_targets import TargetFields
from lorasb_ds.adapters.peft_writer import PLAIN_FIELDS, peft_tensors, save_peft_adapter
from lorasb_ds.config.overwriting import check_replaceable, names_in, read_object
from lorasb_ds.config.paths import expand_home
from lorasb_ds.config.run_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CARD
from lorasb_ds.errors import ConfigError
from lorasb_ds.export.chat_format import tokenizer_files
from lorasb_ds.export.expert_layers import Expert, join
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.models.loading import DTYPES
from lorasb_ds.models.tokenizer_files import MORE_TEMPLATES, NAMES, TokenizerFiles

ADAPTER_FILES = {name + end for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) for end in ("", ".tmp")}
ADAPTER_FILES |= {*NAMES, MORE_TEMPLATES, MODEL_CARD}
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class EnergyKept:
    """Fractions of ``‖ΔW‖²`` in the first k directions of every layer, k = 1, 2, …, r."""

    total: list[float]  # of all layers together
    lowest: list[float]  # of the layer that loses most

    def smallest_r(self, energy: float) -> int:
        """Return the smallest k that keeps this fraction of all layers together."""
        enough = energy - 1e-12  # rounding leaves sums of fractions below 1
        return next((k for k, kept in enumerate(self.total, 1) if kept >= enough), len(self.total))


def measure_energy(adapter: StoredAdapter) -> EnergyKept:
    """Compute what every smaller rank would keep, by the exact SVD of every layer's update."""
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
        r: truncate to the best approximation of this rank. [default: the adapter's]
        dtype: of the written tensors: "fp32", "bf16" or "fp16".
        overwrite: replace an adapter that is already in ``out``.
    Returns:
        The bytes of its tensors.
    Raises:
        ConfigError: if r is larger than the adapter's, a number exceeds the range of ``dtype``, or
            ``out`` may not be written.
    """
    folder = check_folder(out, [adapter], overwrite)
    pairs = dict(truncated(adapter, r, dtype))
    fields, experts = adapter.target_fields, adapter.experts
    beside = tokenizer_files(adapter)
    return write_adapter(folder, pairs, r or adapter.r, fields, experts, adapter.base_path, beside)


def truncated(adapter: StoredAdapter, r: int | None, dtype: str) -> Iterator[tuple[str, LoraPair]]:
    """Yield every layer with its update, truncated to rank r and rounded.

    Args:
        r: None, or a rank that is not reached: nothing is cut.
    Raises:
        ConfigError: if r is larger than the adapter's, or a number exceeds the range of ``dtype``.
    """
    if r is not None and not 1 <= r <= adapter.r:
        raise ConfigError(f"--r {r}: the adapter has rank {adapter.r}; give 1 to {adapter.r}.")
    for name in adapter.layers:
        pair = adapter.pair(name)
        cut = product_svd(pair).pair(r) if r is not None and r < len(pair.A) else pair
        yield name, rounded(name, cut, dtype)


def rounded(name: str, pair: LoraPair, dtype: str) -> LoraPair:
    """Round a layer's factors to ``dtype``.

    Raises:
        ConfigError: if a number exceeds its range.
    """
    result = LoraPair(*(factor.to(DTYPES[dtype]) for factor in pair))
    if not all(factor.isfinite().all() for factor in result):
        raise ConfigError(f"--dtype {dtype}: the factors of {name} exceed its range.")
    return result


def write_adapter(
    folder: Path,
    pairs: Mapping[str, LoraPair],
    r: int,
    fields: TargetFields,
    experts: Mapping[str, Expert],
    base: str | None,
    tokenizer: TokenizerFiles | None = None,
) -> int:
    """Write a PEFT folder, replacing one that is there (see ``check_folder``).

    Linear layers are padded to rank r, experts to the highest rank in their projection.

    Args:
        pairs: layer -> its update.
        fields: as from ``target_fields``, of the linear layers.
        experts: layer -> the expert that it is.
        tokenizer: to put beside it.
    Returns:
        The bytes of the tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        if name not in experts:
            tensors |= peft_tensors(name, *padded(pair, r))
    if of_experts := join(pairs, experts):
        tensors |= expert_tensors(of_experts)
        ranks = {name: pair.A.shape[1] for name, pair in of_experts.items()}
        # Which other experts the base has is not known here, so that all are named in full.
        fields = expert_fields(r, fields, ranks, ())
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_peft_adapter(folder, tensors, r=r, base_model=base, tokenizer=tokenizer, **fields)
    return sum(tensor.nbytes for tensor in tensors.values())


def check_folder(out: Path, adapters: Sequence[StoredAdapter], overwrite: bool) -> Path:
    """Return the folder of ``--out`` if it may be written.

    Raises:
        ConfigError: if it holds something that is not an adapter or may not be replaced, one of the
            ``adapters``, or this shell.
    """
    folder = Path(expand_home(str(out))).resolve()
    sources = [adapter.path.resolve() for adapter in adapters]
    if any(folder in (path, *path.parents) for path in (*sources, Path.cwd())):
        raise ConfigError(f"--out {out} holds what is read, or this shell. Name another folder.")
    kind = "the folder of an adapter that lorasb has exported"
    check_replaceable("--out", folder, overwrite, _foreign, kind)
    aside = folder.with_name(folder.name + ".tmp")  # where ``write_adapter`` writes
    check_replaceable("--out, written as", aside, True, _foreign, "what an export has left")
    return folder


def _foreign(folder: Path) -> list[str]:
    """Return the names in a folder that no export has written; PEFT writes other fields."""
    if others := [name for name in names_in(folder) if name not in ADAPTER_FILES]:
        return others
    config = read_object(folder / ADAPTER_CONFIG)
    return [] if config.keys() <= PLAIN_FIELDS else [ADAPTER_CONFIG]


def max_lora_rank(r: int) -> int | None:
    """Return the smallest ``--max-lora-rank`` with which vLLM loads rank r; None if it cannot."""
    return next((allowed for allowed in VLLM_RANKS if r <= allowed), None)
