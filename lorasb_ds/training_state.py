"""What training has changed in an engine: R and its optimizer's state, whole, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorasb_ds import zero
from lorasb_ds.adapter import LoraSBLinear
from lorasb_ds.config import RunConfig
from lorasb_ds.optimizer import fresh_state


def collect_state(
    engine: Any, adapters: Mapping[str, LoraSBLinear]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Collective.

    Returns:
        ``<layer>.lora_R`` and ``<layer>.lora_R.<key>``, (r, r) fp32 on rank 0's CPU, {} elsewhere;
        and the states that are one number for all, such as AdamW's step. They are the same for any
        number of processes.
    """
    flat, state = zero.optimizer_state(engine)
    keys = [k for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape]
    scalars = {key: float(value) for key, value in state.items() if key not in keys}
    tensors: dict[str, torch.Tensor] = {}
    for name, adapter in adapters.items():
        whole = {f"{name}.lora_R": zero.full_fp32(adapter.lora_R)}
        for key in keys:
            whole[f"{name}.lora_R.{key}"] = zero.full_optimizer_state(adapter.lora_R, key)
        if zero.rank() == 0:
            tensors |= {key: value.cpu().clone() for key, value in whole.items()}
    return tensors, scalars


def restore_state(
    engine: Any,
    adapters: Mapping[str, LoraSBLinear],
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float],
    config: RunConfig,
) -> None:
    """Put back what ``collect_state`` gave, on any number of processes. Collective.

    Args:
        tensors: equal on every rank.
    """
    keys = {key.rpartition(".lora_R.")[2] for key in tensors if ".lora_R." in key}
    if keys:
        states = [fresh_state(flat, config) for flat in zero.flat_masters(engine)]
        for state in states:
            for key, value in scalars.items():
                old = state[key]
                state[key] = torch.full_like(old, value) if torch.is_tensor(old) else int(value)
        zero.set_optimizer_state(engine, states)
    for name, adapter in adapters.items():
        zero.fill_trainable(adapter.lora_R, tensors[f"{name}.lora_R"])
        for key in keys:
            zero.fill_optimizer_state(adapter.lora_R, key, tensors[f"{name}.lora_R.{key}"])
