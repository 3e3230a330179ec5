"""The state of an engine that training changes: trained parameters and their optimizer's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.masters import flat_masters
from lorasb_ds.distributed.matrix_optimizer import MatrixOptimizer
from lorasb_ds.distributed.optimizer_state import (
    fill_optimizer_state,
    full_optimizer_state,
    optimizer_state,
    set_optimizer_state,
    torch_optimizer,
)
from lorasb_ds.training.optimizer import fresh_state


def collect_state(
    engine: Any, trained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Collect trained parameters and optimizer state, whole. Collective.

    Args:
        trained: trained parameters, by name.
    Returns:
        The tensors ``<name>`` (the parameter) and ``<name>.<key>`` (its optimizer state), fp32 on
        rank 0's CPU, {} elsewhere; and the states that are one number for all parameters, such as
        AdamW's step. Both are the same for any number of processes.
    """
    optimizer = torch_optimizer(engine)
    if isinstance(optimizer, MatrixOptimizer):
        return _collect_matrices(optimizer, trained)
    flat, state = optimizer_state(engine)
    keys = [k for k, v in state.items() if torch.is_tensor(v) and v.shape == flat.shape]
    scalars = {key: float(value) for key, value in state.items() if key not in keys}
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trained.items():
        whole = {name: zero.full_fp32(parameter)}
        for key in keys:
            whole[f"{name}.{key}"] = full_optimizer_state(parameter, key)
        if zero.rank() == 0:
            tensors |= {key: value.cpu().clone() for key, value in whole.items()}
    return tensors, scalars


def _collect_matrices(
    optimizer: MatrixOptimizer, trained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Do the same where every rank has whole states. Collective."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, float] = {}
    for name, parameter in trained.items():
        whole = {name: zero.full_fp32(parameter)}
        for key, value in optimizer.state_of(parameter).items():
            if value.ndim:
                whole[f"{name}.{key}"] = value
            else:
                scalars[key] = float(value)
        if zero.rank() == 0:
            tensors |= {key: value.cpu().clone() for key, value in whole.items()}
    return tensors, scalars


def restore_state(
    engine: Any,
    trained: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    scalars: Mapping[str, float],
    config: RunConfig,
) -> None:
    """Restore what ``collect_state`` returned, on any number of processes. Collective.

    Args:
        tensors: equal on every rank.
    """
    optimizer = torch_optimizer(engine)
    if isinstance(optimizer, MatrixOptimizer):
        for name, parameter in trained.items():
            zero.fill_trainable(parameter, tensors[name])
            # Adafactor has other states for a vector than for a matrix.
            if keys := _state_keys(name, tensors):
                whole = {key: tensors[f"{name}.{key}"].to(accelerator.device()) for key in keys}
                numbers = {key: torch.tensor(value) for key, value in scalars.items()}
                optimizer.set_state(parameter, whole | numbers)
        return
    keys = _state_keys(next(iter(trained)), tensors)
    if keys:
        states = [fresh_state(flat, config) for flat in flat_masters(engine)]
        for state in states:
            for key, value in scalars.items():
                old = state[key]
                state[key] = torch.full_like(old, value) if torch.is_tensor(old) else int(value)
        set_optimizer_state(engine, states)
    for name, parameter in trained.items():
        zero.fill_trainable(parameter, tensors[name])
        for key in keys:
            fill_optimizer_state(parameter, key, tensors[f"{name}.{key}"])


def reset_optimizer(engine: Any) -> None:
    """Put the optimizer's state back to where its first step begins. Not collective.

    In place: DeepSpeed links each parameter to its part of a state.
    """
    optimizer = torch_optimizer(engine)
    states: dict[Any, dict[str, Any]] = optimizer.state
    if isinstance(optimizer, MatrixOptimizer):
        states = optimizer.inner_state
    for state in states.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            elif isinstance(value, int | float):
                state[key] = 0


def _state_keys(name: str, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    return {key.removeprefix(f"{name}.") for key in tensors if key.startswith(f"{name}.")}


def rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's (host and device), Python's and numpy's random generators."""
    numpy_state: Any = np.random.get_state(legacy=True)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*numpy_state[1].tolist(), numpy_state[2]], dtype=torch.int64),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set the generators' states; the device's is left alone if ``states`` has none for it."""
    torch.set_rng_state(states["torch"])
    random.setstate((3, tuple(states["python"].tolist()), None))
    *key, position = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), position, 0, 0.0))
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)
