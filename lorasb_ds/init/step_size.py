"""The step at the end of the init: take eta as given or search for it, and fill R."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.adapters.inject import disable_adapters, set_scale
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.init.init_report import ExpertsInit, InitStep, LayerInit
from lorasb_ds.models.loss import held_out_loss

FIRST_EXPONENT = -13  # 2⁻¹³ = 1.2e-4: the best eta is usually within a factor of 4
MAX_EVALUATIONS = 9


def measure_step(engine: Any, base: AbstractContextManager[None], probe: Sample) -> InitStep:
    """Measure the loss before and after an init that takes no step. Collective.

    Args:
        engine: around the model with filled factors.
        base: inside which the model is its base (``disable_adapters``).
        probe: the rows to measure on.
    """
    start = time.perf_counter()
    with base:
        loss_before = held_out_loss(engine.module, probe.batches, accelerator.device())
    return InitStep(
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
    layers: Mapping[str, LayerInit | ExpertsInit],
    probe: Sample,
    init_lr: float | Literal["auto"],
) -> InitStep:
    """Choose eta and fill R, where A and B are filled already. Collective.

    Args:
        layers: what the init found, for R at any eta.
        probe: the rows to measure losses on.
        init_lr: eta, or "auto": the one that lowers the probe's loss most. The loss is then never
            above the base's, since eta = 0 is tried, too.
    """
    start = time.perf_counter()
    model = engine.module
    losses: dict[float, float] = {}
    if init_lr == "auto":
        num_entries = sum(
            a.num_matrices * a.out_features * a.in_features for a in adapters.values()
        )
        squared_norm = sum(layer.squared_norm for layer in layers.values())
        # In this unit eta is the RMS by which the update moves an entry; 1 for a sign matrix.
        unit = math.sqrt(num_entries / squared_norm) if squared_norm > 0 else 1.0
        losses = _measure_losses(model, adapters, layers, probe, unit)
        eta = min(losses, key=lambda tried: losses[tried])
        loss_before = losses[0.0]
    else:
        eta = init_lr
        with disable_adapters(adapters):
            loss_before = held_out_loss(model, probe.batches, accelerator.device())
    for name, adapter in adapters.items():
        zero.fill_trainable(adapter.factor("lora_R"), layers[name].R(eta))
    return InitStep(
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
    layers: Mapping[str, LayerInit | ExpertsInit],
    probe: Sample,
    unit: float,
) -> dict[float, float]:
    """Measure the probe's loss at several eta, by scaling the branch of R at eta = 1. Collective.

    All ranks use rank 0's losses, so that they search alike.
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
    """Measure the loss at 0 and at a few eta around the best one.

    The search moves by factors of 4 until the best eta is between two worse ones, then tries its
    neighbours at a factor of 2. Every eta is a power of two: multiplying by it is exact, so that
    the loss measured with a scaled branch is, bit for bit, that of the filled adapter.

    Args:
        loss_at: returns the loss with the update multiplied by eta; may return inf or nan.
        unit: the unit of eta, rounded to a power of two; 1 for a sign matrix.
    Returns:
        eta -> loss, at most ``MAX_EVALUATIONS`` of them; infinite where it is not finite.
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
