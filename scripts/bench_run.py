"""Common parts of the benchmarks of a run: a run up to its engine, its rows and its rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

R = 64
DATA = "reasoning-gym:gsm_symbolic?size={}&seed=5"


def started(config: Mapping[str, Any], zero_optimization: Mapping[str, Any] = {}) -> Any:
    """Make a run before its first step, its engine and adapters, without an init. Collective.

    Args:
        zero_optimization: what its ds_config has otherwise.
    """
    run, engine, adapters = started_empty(config, zero_optimization)
    _fill(adapters)
    engine.train()
    return run, engine, adapters


def started_empty(config: Mapping[str, Any], zero_optimization: Mapping[str, Any] = {}) -> Any:
    """Do the same with factors that are still 0. Collective."""
    from launcher.workers.quiet import quiet_libraries

    quiet_libraries()
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.distributed import zero
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import start_engine

    run = prepare(load_run_config(dict(config)), int(os.environ["WORLD_SIZE"]))
    run.ds_config["zero_optimization"] |= zero_optimization
    zero.init_process_group()
    return run, *start_engine(run)


def _fill(adapters: Mapping[str, Any]) -> None:
    """Fill in orthonormal A and B, and a small R: their values do not change a step's time."""
    from lorasb_ds.distributed import zero

    for adapter in adapters.values():
        for factor in (adapter.lora_A, adapter.lora_B):
            shape = getattr(factor, "ds_shape", factor.shape)
            zero.fill(factor, torch.nn.init.orthogonal_(torch.empty(*shape)))
        zero.fill_trainable(adapter.lora_R, 1e-3 * torch.eye(adapter.r))
