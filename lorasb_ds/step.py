"""The init's step: eta, given or measured, and R."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.adapters.inject import set_scale
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.gradients import branches_off
from lorasb_ds.init_report import LayerInit, Step
from lorasb_ds.line_search import search_init_lr
from lorasb_ds.models.loss import held_out_loss


def measure_step(engine: Any, base: AbstractContextManager[None], probe: Sample) -> Step:
    """What the factors do that are in place, of a method without an eta. Collective.

    Args:
        base: in which the model is its base.
    """
    start = time.perf_counter()
    with base:
        loss_before = held_out_loss(engine.module, probe.batches, accelerator.device())
    return Step(
        init_lr=None,
        num_samples=probe.num_rows,
        loss_before=loss_before,
        loss_after=held_out_loss(engine.module, probe.batches, accelerator.device()),
        losses={},
        seconds=time.perf_counter() - start,
    )


def choose_step(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    layers: Mapping[str, LayerInit],
    probe: Sample,
    init_lr: float | Literal["auto"],
) -> Step:
    """Find eta, unless it is given, and fill R. A and B are in place. Collective.

    With "auto" the loss of the probe is never above that of the base: eta = 0 is among those tried.
    """
    start = time.perf_counter()
    model = engine.module
    losses: dict[float, float] = {}
    if init_lr == "auto":
        num_entries = sum(a.out_features * a.in_features for a in adapters.values())
        squared_norm = sum(layer.squared_norm for layer in layers.values())
        # An entry of a sign matrix moves by eta, and so does one of other updates on average.
        unit = math.sqrt(num_entries / squared_norm) if squared_norm > 0 else 1.0
        losses = _measure_losses(model, adapters, layers, probe, unit)
        eta = min(losses, key=lambda tried: losses[tried])
        loss_before = losses[0.0]
    else:
        eta = init_lr
        with branches_off(adapters):
            loss_before = held_out_loss(model, probe.batches, accelerator.device())
    for name, adapter in adapters.items():
        zero.fill_trainable(adapter.factor("lora_R"), layers[name].R(eta))
    return Step(
        init_lr=eta,
        num_samples=probe.num_rows,
        loss_before=loss_before,
        loss_after=held_out_loss(model, probe.batches, accelerator.device()),
        losses={f"{tried:.3g}": loss for tried, loss in sorted(losses.items())},
        seconds=time.perf_counter() - start,
    )


def _measure_losses(
    model: nn.Module,
    adapters: Mapping[str, AdapterLinear],
    layers: Mapping[str, LayerInit],
    probe: Sample,
    unit: float,
) -> dict[float, float]:
    """Loss of the probe along the update, by a scale on the branch of R at eta = 1. Collective.

    Every rank is given rank 0's numbers, so that all take the same steps.
    """
    for name, adapter in adapters.items():
        zero.fill(adapter.factor("lora_R"), layers[name].R(1.0))

    def loss_at(eta: float) -> float:
        set_scale(adapters, eta)
        loss = torch.tensor(
            held_out_loss(model, probe.batches, accelerator.device()),
            dtype=torch.float64,
            device=accelerator.device(),
        )
        dist.broadcast(loss, src=0)
        return loss.item()

    try:
        return search_init_lr(loss_at, unit)
    finally:
        set_scale(adapters, 1.0)
