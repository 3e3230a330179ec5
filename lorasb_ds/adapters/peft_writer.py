"""Write adapters as PEFT folders: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.adapters.low_rank import LoraPair, padded
from lorasb_ds.adapters.peft_config import PREFIX
from lorasb_ds.adapters.peft_experts import ExpertPair, expert_tensors
from lorasb_ds.adapters.peft_targets import TargetFields
from lorasb_ds.config.run_layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorasb_ds.distributed import zero
from lorasb_ds.models.tokenizer_files import TokenizerFiles
from lorasb_ds.system.files import publish, write_json
from lorasb_ds.system.safetensors_writer import save_tensors

# All that ``save_peft_adapter`` writes into adapter_config.json.
PLAIN_FIELDS = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout"),
    *("bias", "fan_in_fan_out", "inference_mode", "target_modules", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "modules_to_save"),
}


def collect_lora(adapters: Mapping[str, AdapterLinear]) -> dict[str, torch.Tensor]:
    """Return the adapter as plain LoRA tensors with PEFT's names, on rank 0's CPU; {} elsewhere.

    Collective: one layer at a time is gathered. Trainable factors are read from their fp32 masters.
    An offset is folded in, so that such a pair has rank 2 r; and so is every update that
    ``--rebase-every`` has kept, each of which adds r.

    Raises:
        FloatingPointError: on every rank, if a trainable factor is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    experts: dict[str, ExpertPair] = {}
    for name, adapter in adapters.items():
        values = {
            key: trained_value(f"{key} of {name}", adapter.factor(key)) for key in adapter.trained
        }
        frozen = {key: adapter.factor(key) for key in adapter.frozen}
        kept = [adapter.factor(key) for key in adapter.kept]
        with zero.gathered([*frozen.values(), *kept]):
            if zero.rank() != 0:
                continue
            values |= {key: parameter.data for key, parameter in frozen.items()}
            pairs = [pair for pair in (adapter.plain_lora(values), adapter.kept_lora()) if pair]
            A = torch.cat([pair.A.cpu() for pair in pairs], -2)
            B = torch.cat([pair.B.cpu() for pair in pairs], -1)
            if isinstance(adapter, LoraSBExperts):
                experts[name] = ExpertPair(A, B)
            else:
                tensors |= peft_tensors(name, A, B)
    return tensors | expert_tensors(experts)


def collect_whole(model: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return parameters that are trained whole, with PEFT's names, on rank 0's CPU; {} elsewhere.

    Collective.

    Args:
        names: of trained parameters (``Base.head``).
    Raises:
        FloatingPointError: on every rank, if one is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        value = trained_value(name, model.get_parameter(name))
        if zero.rank() == 0:
            tensors[f"{PREFIX}{name}"] = value.cpu().clone()
    return tensors


def trained_value(name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return the whole fp32 master of a trainable parameter. Collective.

    Args:
        name: of the parameter, for messages.
    Raises:
        FloatingPointError: on every rank, if it is not finite.
    """
    value = zero.full_fp32(parameter)
    if not torch.isfinite(value).all():
        raise FloatingPointError(f"{name} is not finite: the last step overflowed.")
    return value


def peft_names(name: str) -> tuple[str, str]:
    """Return PEFT's names of a layer's A and B."""
    prefix = f"{PREFIX}{name}.lora_"
    return f"{prefix}A.weight", f"{prefix}B.weight"


def peft_tensors(name: str, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a layer's factors by PEFT's names."""
    return dict(zip(peft_names(name), (A, B), strict=True))


def with_ranks(
    tensors: Mapping[str, torch.Tensor], fields: TargetFields, ranks: Mapping[str, int], r: int
) -> tuple[Mapping[str, torch.Tensor], TargetFields]:
    """Return an adapter's tensors and fields with the ranks of layers that have another than r.

    They get a pattern each, before those of experts: PEFT takes the first one that matches. Layers
    that it finds by their weights are padded to r, since it would look for other patterns of them.

    Args:
        fields: as from ``target_fields`` and ``expert_fields``.
        ranks: layer -> its rank, below r.
        r: of adapter_config.json.
    """
    weights = tuple(f".{name}" for name in fields.get("target_parameters", ()))
    by_weight = [name for name in ranks if f".{name}.weight".endswith(weights)]
    padded_tensors = dict(tensors)
    for name in by_weight:
        pair = LoraPair(*(tensors[key] for key in peft_names(name)))
        padded_tensors |= peft_tensors(name, *padded(pair, r))
    own = {name: rank for name, rank in ranks.items() if name not in by_weight}
    if not own:
        return padded_tensors, fields
    # Theirs may name a layer, too, and must not replace its rank.
    patterns = {**own, **fields.get("rank_pattern", {}), **own}
    return padded_tensors, {**fields, "rank_pattern": patterns}


def save_peft_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    r: int,
    target_modules: Sequence[str],
    base_model: str | None,
    target_parameters: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    modules_to_save: Sequence[str] = (),
    tokenizer: TokenizerFiles | None = None,
) -> None:
    """Write a plain LoRA that ``PeftModel.from_pretrained`` loads; see ``write_adapter``.

    Args:
        tensors: as from ``collect_lora`` and ``expert_tensors``.
        r: also written as lora_alpha: scaling is 1.
        target_modules, target_parameters: as from ``target_fields`` and ``expert_fields``.
        base_model: name of the base in adapter_config.json.
        rank_pattern: as from ``expert_fields`` and ``with_ranks``; also written as alpha_pattern.
        modules_to_save: the modules of a classification head, whose tensors are there, too.
        tokenizer: to put beside it.
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if modules_to_save else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": target_modules,
    }
    if target_parameters:
        config["target_parameters"] = target_parameters
    if rank_pattern:
        config |= {"rank_pattern": rank_pattern, "alpha_pattern": rank_pattern}
    if modules_to_save:
        config["modules_to_save"] = modules_to_save
    write_adapter(folder, tensors, config, tokenizer)


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    tokenizer: TokenizerFiles | None = None,
) -> None:
    """Write a PEFT folder, which appears whole or not at all.

    Replaces an existing folder: the caller has checked that it may.

    Args:
        config: the content of adapter_config.json.
        tokenizer: to put beside it.
    """
    aside = folder.with_name(folder.name + ".tmp")
    if aside.exists():
        shutil.rmtree(aside)
    try:
        aside.mkdir(parents=True)
        save_tensors(aside / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
        write_json(aside / ADAPTER_CONFIG, config)
        if tokenizer is not None:
            tokenizer.copy_into(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # room for others
        raise
    if folder.exists():
        shutil.rmtree(folder)
    publish(aside, folder)


def peft_target_modules(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return short names (q_proj, …) if they select exactly the targets, else the full names.

    Args:
        targets: the layers with an adapter.
        modules: all modules of the model. A layer of an nn.Sequential is named by a number, as
            decoder blocks are.
    """
    chosen = list(targets)
    short = {name.rpartition(".")[2] for name in chosen}
    if {name for name in modules if name.rpartition(".")[2] in short} == set(chosen):
        return sorted(short)
    return chosen
