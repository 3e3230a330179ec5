"""What a run leaves behind: the adapter as a plain PEFT LoRA folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasb_ds import zero
from lorasb_ds.adapter import LoraSBLinear, Shapes, to_plain_lora
from lorasb_ds.files import publish, save_tensors, write_json
from lorasb_ds.peft_config import CONFIG_FILE, PREFIX, WEIGHTS_FILE


def collect_lora(adapters: Mapping[str, LoraSBLinear]) -> dict[str, torch.Tensor]:
    """The adapter as plain LoRA tensors with PEFT's names, on rank 0's CPU; {} elsewhere.

    Collective: a layer at a time is gathered. R is taken from the optimizer's fp32 master.

    Raises:
        FloatingPointError: on every rank, if an R is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        R = zero.full_fp32(adapter.lora_R)
        if not torch.isfinite(R).all():
            raise FloatingPointError(f"R of {name} is not finite: the last step overflowed.")
        with zero.gathered([adapter.lora_A, adapter.lora_B]):
            if zero.rank() != 0:
                continue
            A, B = to_plain_lora(adapter.lora_A.data, adapter.lora_B.data, R)
            tensors |= peft_tensors(name, A.cpu().clone(), B.cpu().clone())
    return tensors


def peft_tensors(name: str, A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer's factors by PEFT's names."""
    prefix = f"{PREFIX}{name}.lora_"
    return {f"{prefix}A.weight": A, f"{prefix}B.weight": B}


def save_peft_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    r: int,
    target_modules: Sequence[str] | str,
    base_model: str | None,
) -> None:
    """Write the folder that ``PeftModel.from_pretrained`` loads; it appears whole or not at all.

    A folder of that name is replaced: whoever calls has asked whether it may be.

    Args:
        tensors: of ``collect_lora``.
        target_modules: as PEFT takes them (``peft_target_modules``).
    """
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": target_modules,
    }
    aside = folder.with_name(folder.name + ".tmp")
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    save_tensors(aside / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_json(aside / CONFIG_FILE, config)
    if folder.exists():
        shutil.rmtree(folder)
    publish(aside, folder)


def peft_target_modules(targets: Shapes, layers: Shapes) -> list[str]:
    """PEFT's short names (q_proj, …) where they mean exactly the targets, else the full names."""
    short = {name.rpartition(".")[2] for name in targets}
    if {name for name in layers if name.rpartition(".")[2] in short} == set(targets):
        return sorted(short)
    return list(targets)
