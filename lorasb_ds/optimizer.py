"""What trains R, and how its learning rate goes. All of it is other projects'."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lorasb_ds.config import RunConfig

SGD_MOMENTUM = 0.9


def make_optimizer(
    params: Iterable[torch.nn.Parameter], config: RunConfig
) -> torch.optim.Optimizer:
    """Of ``config.optimizer``. Each works by elements, which ZeRO's flat partitions ask for."""
    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=SGD_MOMENTUM, **rates)
    if config.optimizer == "lion":
        from bitsandbytes.optim import Lion

        return Lion(params, **rates)
    return torch.optim.AdamW(params, **rates)


def make_scheduler(optimizer: torch.optim.Optimizer, config: RunConfig, num_steps: int) -> Any:
    """transformers' schedule, counted from 1: at 0 its warmup gives 0, and a step would be lost."""
    from transformers import get_scheduler

    warmup = math.ceil(config.warmup_ratio * num_steps)
    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    schedule = get_scheduler(name, optimizer, warmup, num_steps + 1)
    shape = schedule.lr_lambdas[0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: shape(done + 1))


def set_scheduler(scheduler: Any, updates: int) -> None:
    """Put a new schedule where ``updates`` optimizer steps have brought an earlier one."""
    rates = [
        base * shape(updates)
        for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    state = {"last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | state)


def fresh_state(flat: torch.Tensor, config: RunConfig) -> dict[str, Any]:
    """The optimizer's state of a parameter like ``flat``, as its first step makes it; its entries
    are to be overwritten.
    """
    parameter = torch.nn.Parameter(torch.zeros_like(flat))
    optimizer = make_optimizer([parameter], config)
    parameter.grad = torch.zeros_like(flat)
    optimizer.step()
    return optimizer.state[parameter]
