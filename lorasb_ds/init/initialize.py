"""The init phase: gradients (or weights) -> truncated SVD -> the adapter's factors.

LoRA-SB: ``sign(G) ~ U S Vh``;  ``B = U``, ``A = Vh``, ``R = -eta S`` (arXiv 2411.19557), the rank-r
approximation of the first step that AdamW would take in full fine-tuning. Others: methods.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.adapters.inject import disable_adapters
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.collectives import Group
from lorasb_ds.init.decomposition import decompose, decompose_matrices, describe_layer
from lorasb_ds.init.experts import (
    ExpertDirections,
    ExpertSVDs,
    decompose_weights,
    fill_experts,
    random_expert_directions,
    random_experts_report,
)
from lorasb_ds.init.factors import (
    Basis,
    Directions,
    InitSettings,
    fill_layer,
    gather_directions,
    random_directions,
    weight_rows,
)
from lorasb_ds.init.gradient_shards import GradientShards
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.init.init_report import ExpertsInit, InitReport, LayerInit
from lorasb_ds.init.segments import SegmentError, gradients_by_segment
from lorasb_ds.init.step_size import choose_step, measure_step
from lorasb_ds.init.turns import in_turns
from lorasb_ds.init.update_rules import step_scale
from lorasb_ds.planner.init_plan import InitPlan

# A layer's name, the directions that rank 0 fills it from, and its part of the report.
LayerResult: TypeAlias = tuple[
    str, Directions | ExpertDirections | None, LayerInit | ExpertsInit | None
]


def initialize(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    sample: Sample,
    probe: Sample,
    plan: InitPlan,
    settings: InitSettings,
    *,
    init_lr: float | Literal["auto"],
    offload: bool,
    keep: Callable[[Basis], None],
) -> InitReport:
    """Fill every adapter's factors in place. Collective.

    The plan's groups of layers are done one after the other; grouping changes the result
    by rounding at most.

    Args:
        engine: around the model with placeholders; its parameters may be sharded by ZeRO-3.
        sample: the rows to compute gradients on; every rank has the same number of batches.
        probe: other rows, to measure losses on.
        init_lr: eta; "auto" searches for it on the probe. Ignored by methods that take no step.
        offload: keep gradient shards in host memory.
        keep: is given each layer's part of the basis on rank 0, {} elsewhere; R is that of eta = 1
            or of none yet.
    Returns:
        The report, equal on every rank but for memory and times.
    Raises:
        FloatingPointError: on every rank, if a gradient is not finite.
    """
    start = time.perf_counter()
    accelerator.reset_peak_memory()
    memory_at_start = accelerator.memory_bytes()
    group = zero.new_group()  # apart from the engine's own communication
    method, gradients = settings.method, _GradientTotals()
    found: Iterator[LayerResult]
    if method.needs_gradient:
        found = _from_gradients(
            engine, adapters, plan, sample, settings, group, offload=offload, totals=gradients
        )
    elif method.matrix == "weight":
        found = _from_weights(adapters, plan, settings, group)
    else:
        found = _without_matrix(adapters, settings)
    layers: dict[str, LayerInit | ExpertsInit] = {}
    for name, directions, layer in found:
        if layer is not None:
            layers[name] = layer
        keep(_fill(name, adapters[name], directions, settings))
    filled_s = time.perf_counter() - start
    layers = {name: layers[name] for name in adapters if name in layers}
    if method.takes_step:
        step = choose_step(engine, adapters, layers, probe, init_lr)
    else:
        step = measure_step(engine, disable_adapters(adapters), probe)
    num_batches = torch.tensor(gradients.num_batches, device=accelerator.device())
    dist.all_reduce(num_batches, group=group)
    dist.destroy_process_group(group)
    return InitReport(
        update=settings.update if method.needs_gradient else method.matrix,
        num_samples=sample.num_rows if method.needs_gradient else 0,
        num_label_tokens=sample.num_label_tokens if method.needs_gradient else 0,
        num_batches=int(num_batches),
        loss=gradients.loss,
        step=step,
        num_groups=len(plan.groups) if method.needs_gradient else 1,
        passes=_passes(plan, gradients),
        by_segments=gradients.segments > 0,
        predicted_memory_bytes=plan.predicted_bytes,
        peak_memory_bytes=accelerator.peak_memory_bytes(),
        memory_at_start_bytes=memory_at_start,
        gradients_s=gradients.seconds - gradients.communication_s,
        communication_s=gradients.communication_s,
        svd_s=filled_s - gradients.seconds,
        total_s=time.perf_counter() - start,
        layers={name: of for name, of in layers.items() if isinstance(of, LayerInit)},
        experts={name: of for name, of in layers.items() if isinstance(of, ExpertsInit)},
    )


def _fill(name: str, adapter: AdapterLinear, directions: Any, settings: InitSettings) -> Basis:
    """Fill the factors of a layer, or of a projection of experts. Collective."""
    if isinstance(adapter, LoraSBExperts):
        return fill_experts(name, adapter, directions, settings)
    return fill_layer(name, adapter, directions, settings)


def _passes(plan: InitPlan, gradients: _GradientTotals) -> float:
    """Return how often a block was run forward and backward over the sample, on average."""
    by_segment = plan.passes * gradients.segments / len(plan.groups)
    return round(by_segment, 2) + gradients.groups - gradients.segments


@dataclass
class _GradientTotals:
    """Totals over the gradients of all groups, on this rank."""

    groups: int = 0
    segments: int = 0  # groups among them that were run as a segment, not by a whole pass
    num_batches: int = 0  # with a label
    loss: float | None = None
    seconds: float = 0.0
    communication_s: float = 0.0  # part of seconds


def _from_gradients(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    plan: InitPlan,
    sample: Sample,
    settings: InitSettings,
    group: Group,
    *,
    offload: bool,
    totals: _GradientTotals,
) -> Iterator[LayerResult]:
    """Yield each layer's SVD of the gradient, or of an optimizer's update. Collective.

    Args:
        totals: counts and times are added to it.
    """
    totals.num_batches = sum(batch.num_label_tokens > 0 for batch in sample.batches)
    all_experts, of_experts = _experts(adapters), dict[str, ExpertSVDs]()
    began = time.perf_counter()
    for gradients in gradients_by_group(engine.module, adapters, plan, sample, group, offload):
        zero.release(engine)
        totals.groups += 1
        totals.segments += gradients.from_segment
        totals.loss = gradients.loss
        totals.communication_s += gradients.exchange.waiting.seconds()
        totals.seconds += time.perf_counter() - began
        for name, experts in gradients.experts.items():
            if name not in of_experts:
                of_experts[name] = ExpertSVDs(name, all_experts[name], settings, group)
            of_experts[name].add(experts, gradients.take(name), gradients.tokens[name])
            if of_experts[name].is_complete:
                yield name, *of_experts.pop(name).result()
        of_layers = {name: adapters[name] for name in gradients.shards}
        for names, r, heights in in_turns(of_layers, settings, plan.budget_bytes):
            G = {name: gradients.take(name) for name in names}
            scales = {name: _step_scale(adapters[name], settings.update, group) for name in names}
            found = decompose(G, r, settings.update, group, settings.seed, scales, heights)
            for name, (svd, slopes) in found.items():
                dtype, reached = adapters[name].lora_A.dtype, gradients.batches_reached[name]
                own_r = adapters[name].r * settings.method.directions
                svd, slopes = svd.cut(own_r), slopes[:own_r]
                layer = describe_layer(svd, slopes, dtype, reached, group)
                yield name, gather_directions(adapters[name], svd, group), layer
        began = time.perf_counter()
    assert not of_experts, f"the plan leaves out experts of {', '.join(of_experts)}"


def _step_scale(adapter: AdapterLinear, update: str, group: Group) -> float:
    """Return ``step_scale`` of a layer. Collective."""

    def weight_rms() -> float:
        squares = torch.linalg.vector_norm(weight_rows(adapter, group)).double().square()
        dist.all_reduce(squares, group=group)
        return math.sqrt(squares.item() / (adapter.out_features * adapter.in_features))

    return step_scale(update, adapter.out_features, adapter.in_features, weight_rms)


def _from_weights(
    adapters: Mapping[str, AdapterLinear], plan: InitPlan, settings: InitSettings, group: Group
) -> Iterator[LayerResult]:
    """Yield each layer's SVD of W0. Collective."""
    all_experts = _experts(adapters)
    for name, experts in all_experts.items():
        yield name, *decompose_weights(experts, settings, group)
    of_layers = {name: of for name, of in adapters.items() if name not in all_experts}
    for names, r, heights in in_turns(of_layers, settings, plan.budget_bytes):
        rows = [weight_rows(adapters[name], group) for name in names]
        svds = decompose_matrices(rows, r, group, settings.seed, heights)
        for name, svd in zip(names, svds, strict=True):
            adapter = adapters[name]
            # Without a gradient the slopes are unknown; these let eta's search decide.
            layer = describe_layer(svd, svd.S.square(), adapter.lora_A.dtype, 0, group)
            yield name, gather_directions(adapter, svd, group), layer


def _without_matrix(
    adapters: Mapping[str, AdapterLinear], settings: InitSettings
) -> Iterator[LayerResult]:
    """Yield each layer's random directions, or none, as the method has it. Not collective."""
    is_random = settings.method.matrix == "random"
    for name, adapter in adapters.items():
        if isinstance(adapter, LoraSBExperts):
            of_experts = random_experts_report(adapter)
            yield name, random_expert_directions(name, adapter, settings), of_experts
            continue
        ones = (1.0,) * adapter.r
        random = LayerInit(1.0, ones, 0.0, 0.0, slopes=ones, batches_reached=0)
        yield name, random_directions(name, adapter, settings), random if is_random else None


def _experts(adapters: Mapping[str, AdapterLinear]) -> dict[str, LoraSBExperts]:
    """Return the adapters that are of experts."""
    return {name: of for name, of in adapters.items() if isinstance(of, LoraSBExperts)}


def gradients_by_group(
    model: Any,
    adapters: Mapping[str, AdapterLinear],
    plan: InitPlan,
    sample: Sample,
    group: Group,
    offload: bool,
) -> Iterator[GradientShards]:
    """Yield the gradients of one group of layers after the other. Collective.

    Several groups are computed by segments of the model where that is possible, else by a pass over
    the whole model for each group.
    """
    of_sample = (sample.batches, sample.num_label_tokens, group)
    remaining = list(plan.groups)
    if len(plan.groups) > 1 and plan.prefix is not None:
        try:
            for gradients in gradients_by_segment(
                model, adapters, plan.groups, plan.prefix, *of_sample, offload
            ):
                remaining.pop()  # it begins with the last
                yield gradients
        except SegmentError as error:
            if dist.get_rank(group) == 0:
                print(
                    f"lorasb: the init takes a whole pass for each group of layers, since {error}",
                    flush=True,
                )
    for layers in remaining:
        yield average_gradients(model, adapters, *of_sample, layers=layers, offload=offload)
