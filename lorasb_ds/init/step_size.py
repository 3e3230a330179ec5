"""The init's step: eta, given or measured, and R."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.adapters.inject import set_scale
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.init.gradients import branches_off
from lorasb_ds.init.init_report import LayerInit, Step
from lorasb_ds.models.loss import held_out_loss

FIRST_EXPONENT = -13  # 1.2e-4: the best one is within a factor of 4 as a rule
MAX_EVALUATIONS = 9


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


def search_init_lr(loss_at: Callable[[float], float], unit: float = 1.0) -> dict[float, float]:
    """Losses at a handful of eta, 0 among them; the best is the one to take.

    Steps of 4 until the best one lies between two worse ones, then its neighbours at a factor of 2.
    All are powers of two: multiplying by them is exact, so that the loss that was measured with
    a scaled branch is, bit for bit, that of the filled adapter.

    Args:
        loss_at: the loss with the update multiplied by its argument; infinite or nan is bad.
        unit: what eta is counted in, rounded to a power of two; 1 for a sign matrix.
    """
    unit = 2.0 ** round(math.log2(unit))
    losses: dict[int | None, float] = {}

    def measure(exponent: int | None) -> None:
        if exponent not in losses and len(losses) < MAX_EVALUATIONS:
            loss = loss_at(0.0 if exponent is None else unit * 2.0**exponent)
            losses[exponent] = loss if math.isfinite(loss) else math.inf

    def best() -> int:
        return min((e for e in losses if e is not None), key=lambda e: losses[e])

    measure(None)
    for exponent in (FIRST_EXPONENT, FIRST_EXPONENT + 2, FIRST_EXPONENT - 2):
        measure(exponent)
    low, high = FIRST_EXPONENT - 2, FIRST_EXPONENT + 2
    while len(losses) < MAX_EVALUATIONS - 2:
        if best() == high:
            high += 2
            measure(high)
        elif best() == low:
            low -= 2
            measure(low)
        else:
            break
    centre = best()
    measure(centre + 1)
    measure(centre - 1)
    return {0.0 if e is None else unit * 2.0**e: loss for e, loss in losses.items()}
