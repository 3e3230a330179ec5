"""The optimizer of R (or of A and B) and its schedule, from torch, bitsandbytes, transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed.matrix_optimizer import MatrixOptimizer
from lorasb_ds.distributed.zero import whole_shape
from lorasb_ds.errors import ConfigError
from lorasb_ds.init.update_rules import ADAFACTOR_EPSILON, ADAFACTOR_SIZE

SGD_MOMENTUM = 0.9


def make_optimizer(
    params: Iterable[torch.nn.Parameter], config: RunConfig
) -> torch.optim.Optimizer:
    """Make the optimizer that ``config.optimizer`` names.

    AdamW, SGD and Lion work element by element, on ZeRO's flat masters; Adafactor and Muon work on
    whole matrices (``MatrixOptimizer``).

    Raises:
        ConfigError: for Muon, if a trained parameter is not a matrix.
    """
    params = list(params)
    rates: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=SGD_MOMENTUM, **rates)
    if config.optimizer == "lion":
        from bitsandbytes.optim import Lion

        return Lion(params, **rates)
    if config.optimizer == "adafactor":
        # torch squares the first; its default is larger than the gradients of a large model.
        eps = math.sqrt(ADAFACTOR_EPSILON), ADAFACTOR_SIZE
        return MatrixOptimizer(params, lambda p: torch.optim.Adafactor(p, eps=eps, **rates), rates)
    if config.optimizer == "muon":
        shapes = [tuple(whole_shape(p)) for p in params]
        if others := [shape for shape in shapes if len(shape) != 2]:
            raise ConfigError(
                f"--optimizer muon orthogonalizes matrices, but {len(others)} of the parameters "
                f"that --method {config.method} trains are not, such as one of shape {others[0]}. "
                "Use another optimizer: adamw, sgd, lion or adafactor."
            )
        return MatrixOptimizer(params, lambda p: torch.optim.Muon(p, **rates), rates)
    return torch.optim.AdamW(params, **rates)


def make_scheduler(optimizer: torch.optim.Optimizer, config: RunConfig, num_steps: int) -> Any:
    """Make transformers' schedule, counted from 1: its warmup gives 0 at 0, a step lost."""
    from transformers import get_scheduler

    warmup = math.ceil(config.warmup_ratio * num_steps)
    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    schedule = get_scheduler(name, optimizer, warmup, num_steps + 1)
    shape = schedule.lr_lambdas[0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: shape(done + 1))


def set_scheduler(scheduler: Any, updates: int) -> None:
    """Advance a new schedule to the position after ``updates`` optimizer steps."""
    rates = [
        base * shape(updates)
        for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    state = {"last_epoch": updates, "_step_count": updates + 1, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | state)


def fresh_state(flat: torch.Tensor, config: RunConfig) -> dict[str, Any]:
    """Return an element-wise optimizer's state for a parameter like ``flat``, to be overwritten.

    It has the entries that the optimizer's first step makes.
    """
    parameter = torch.nn.Parameter(torch.zeros_like(flat))
    optimizer = make_optimizer([parameter], config)
    parameter.grad = torch.zeros_like(flat)
    optimizer.step()
    return optimizer.state[parameter]
