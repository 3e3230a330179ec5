"""The state of an engine's optimizer, as checkpoints save and restore it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.masters import flat_masters
from lorasb_ds.distributed.zero import local_part


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that the engine was given."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def optimizer_state(engine: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return one flat master and the torch optimizer's state of it: {} before the first step.

    The states of all flat masters have the same keys.
    """
    flat = flat_masters(engine)[0]
    return flat, engine.optimizer.optimizer.state.get(flat, {})


def set_optimizer_state(engine: Any, states: Sequence[dict[str, Any]]) -> None:
    """Give every flat master a state; afterwards ``fill_optimizer_state`` can set its parts."""
    for flat, state in zip(flat_masters(engine), states, strict=True):
        engine.optimizer.optimizer.state[flat] = state
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Stages 1 and 2 link each parameter to its part of a state once the state exists. DeepSpeed
        # does so in its first step and has no public function for it.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def full_optimizer_state(param: torch.nn.Parameter, key: str) -> torch.Tensor:
    """Return a parameter's whole state, such as ``exp_avg``, in fp32 on every rank. Collective."""
    value = safe_get_full_optimizer_state(param, key)
    assert value is not None, "not a parameter that this engine trains"
    return value.detach().float()


def fill_optimizer_state(param: Any, key: str, value: torch.Tensor) -> None:
    """Set a parameter's state. Collective.

    Args:
        value: whole and equal on every rank.
    """
    value = value.to(accelerator.device(), torch.float32)
    if hasattr(param, "ds_id"):
        safe_set_local_optimizer_state(param, local_part(param, value), key)
    else:
        safe_set_full_optimizer_state(param, value, key)


def loss_scale_state(engine: Any) -> dict[str, float]:
    """Return the state of fp16's dynamic loss scale; {} for other dtypes."""
    if not engine.fp16_enabled():
        return {}
    return {
        name: value
        for name, value in vars(engine.optimizer.loss_scaler).items()
        if name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    }


def scale_is_smallest(engine: Any) -> bool:
    """Return whether fp16's dynamic loss scale is at its minimum; False for other dtypes."""
    scale = loss_scale_state(engine)
    return "cur_iter" in scale and scale["cur_scale"] <= engine.optimizer.loss_scaler.min_scale


def set_loss_scale_state(engine: Any, state: Mapping[str, float]) -> None:
    """Restore what ``loss_scale_state`` returned."""
    vars(engine.optimizer.loss_scaler).update(state)
