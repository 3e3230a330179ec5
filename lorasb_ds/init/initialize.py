"""The init phase: gradients (or weights) -> truncated SVD -> the adapter's factors.

Of LoRA-SB: ``sign(G) ~ U S Vh``;  ``B = U``, ``A = Vh``, ``R = -eta S`` (arXiv 2411.19557), the
rank-r image of the first step that AdamW would take in full fine-tuning. Of others: methods.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Sample
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.collectives import Group
from lorasb_ds.init.factors import (
    Basis,
    Directions,
    Recipe,
    fill_layer,
    own_directions,
    weight_rows,
    whole_directions,
)
from lorasb_ds.init.gradients import GradientShards, average_gradients, branches_off
from lorasb_ds.init.init_report import InitReport, LayerInit
from lorasb_ds.init.segments import SegmentError, gradients_by_segment
from lorasb_ds.init.sharded_svd import TruncatedSVD, truncated_svds
from lorasb_ds.init.step_size import choose_step, measure_step
from lorasb_ds.init.update_rules import UPDATES, finished, step_scale
from lorasb_ds.planner.init_plan import InitPlan

# A layer's name, what rank 0 fills it with, and what is told of it.
Found: TypeAlias = tuple[str, Directions | None, LayerInit | None]


def initialize(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    sample: Sample,
    probe: Sample,
    plan: InitPlan,
    recipe: Recipe,
    *,
    init_lr: float | Literal["auto"],
    offload: bool,
) -> tuple[InitReport, Basis]:
    """Fill every adapter's factors in place. Collective.

    Layers are done in the groups of the plan; which group a layer is in changes nothing.

    Args:
        engine: around the model with placeholders; its parameters may be sharded by ZeRO-3.
        sample: rows of the gradient; as many batches as on every other rank.
        probe: rows that are held back to measure losses on.
        init_lr: eta; "auto" measures it on the probe. Methods without a step have none.
        offload: keep gradient shards in host memory.
    Returns:
        The report (equal on every rank but for memory and times), and on rank 0 the basis; empty
        elsewhere.
    Raises:
        FloatingPointError: on every rank, if a gradient is not finite.
    """
    start = time.perf_counter()
    accelerator.reset_peak_memory()
    memory_at_start = accelerator.memory_bytes()
    group = zero.new_group()  # the engine's own traffic goes through another
    method, gradients = recipe.method, _Gradients()
    found: Iterator[Found]
    if method.needs_gradient:
        found = _of_gradients(
            engine, adapters, plan, sample, recipe, group, offload=offload, totals=gradients
        )
    elif method.matrix == "weight":
        found = _of_weights(adapters, recipe, group)
    else:
        found = _of_nothing(adapters, recipe)
    layers: dict[str, LayerInit] = {}
    basis: Basis = {}
    for name, directions, layer in found:
        if layer is not None:
            layers[name] = layer
        basis |= fill_layer(name, adapters[name], directions, recipe)
    filled_s = time.perf_counter() - start
    layers = {name: layers[name] for name in adapters if name in layers}
    if method.step:
        step = choose_step(engine, adapters, layers, probe, init_lr)
    else:
        step = measure_step(engine, branches_off(adapters), probe)
    num_batches = torch.tensor(gradients.num_batches, device=accelerator.device())
    dist.all_reduce(num_batches, group=group)
    dist.destroy_process_group(group)
    report = InitReport(
        update=recipe.update if method.needs_gradient else method.matrix,
        num_samples=sample.num_rows if method.needs_gradient else 0,
        num_label_tokens=sample.num_label_tokens if method.needs_gradient else 0,
        num_batches=int(num_batches),
        loss=gradients.loss,
        step=step,
        num_groups=len(plan.groups) if method.needs_gradient else 1,
        passes=gradients.groups - gradients.segments + (gradients.segments > 0),
        by_segments=gradients.segments > 0,
        predicted_memory_bytes=plan.predicted_bytes,
        peak_memory_bytes=accelerator.peak_memory_bytes(),
        memory_at_start_bytes=memory_at_start,
        gradients_s=gradients.seconds - gradients.communication_s,
        communication_s=gradients.communication_s,
        svd_s=filled_s - gradients.seconds,
        total_s=time.perf_counter() - start,
        layers=layers,
    )
    return report, basis


@dataclass
class _Gradients:
    """What the gradients of all groups came to, on this rank."""

    groups: int = 0
    segments: int = 0  # of them: not by a pass of their own
    num_batches: int = 0  # with a label
    loss: float | None = None
    seconds: float = 0.0
    communication_s: float = 0.0  # of those


def _of_gradients(
    engine: Any,
    adapters: Mapping[str, AdapterLinear],
    plan: InitPlan,
    sample: Sample,
    recipe: Recipe,
    group: Group,
    *,
    offload: bool,
    totals: _Gradients,
) -> Iterator[Found]:
    """By the SVD of the gradient, or of the step that an optimizer would make of it. Collective."""
    totals.num_batches = sum(batch.num_label_tokens > 0 for batch in sample.batches)
    began = time.perf_counter()
    for gradients in gradients_by_group(engine.module, adapters, plan, sample, group, offload):
        zero.release(engine)
        totals.groups += 1
        totals.segments += gradients.of_segment
        totals.loss = gradients.loss
        totals.communication_s += gradients.communication.seconds()
        totals.seconds += time.perf_counter() - began
        for names in _turns(gradients.shards):
            G = {name: gradients.take(name) for name in names}
            k = adapters[names[0]].r * recipe.method.directions
            scales = {name: _step_scale(adapters[name], recipe.update, group) for name in names}
            found = decompose(G, k, recipe.update, group, recipe.seed, scales)
            for name, (svd, slopes) in found.items():
                dtype, reached = adapters[name].lora_A.dtype, gradients.reached[name]
                layer = describe(svd, slopes, dtype, reached, group)
                yield name, whole_directions(adapters[name], svd, group), layer
        began = time.perf_counter()


def _step_scale(adapter: AdapterLinear, update: str, group: Group) -> float:
    """``step_scale`` of a layer. Collective."""

    def weight_rms() -> float:
        squares = torch.linalg.vector_norm(weight_rows(adapter, group)).double().square()
        dist.all_reduce(squares, group=group)
        return math.sqrt(squares.item() / (adapter.out_features * adapter.in_features))

    return step_scale(update, adapter.out_features, adapter.in_features, weight_rms)


def _of_weights(
    adapters: Mapping[str, AdapterLinear], recipe: Recipe, group: Group
) -> Iterator[Found]:
    """By the SVD of W0. Collective."""
    for names in _turns(adapters):
        rows = [weight_rows(adapters[name], group) for name in names]
        k = adapters[names[0]].r * recipe.method.directions
        svds = truncated_svds(rows, k, group=group, seed=recipe.seed)
        for name, svd in zip(names, svds, strict=True):
            adapter = adapters[name]
            # There is no gradient that a step could be held against: eta's search decides.
            layer = describe(svd, svd.S.square(), adapter.lora_A.dtype, 0, group)
            yield name, whole_directions(adapter, svd, group), layer


def _of_nothing(adapters: Mapping[str, AdapterLinear], recipe: Recipe) -> Iterator[Found]:
    """By random directions, or none. Not collective."""
    for name, adapter in adapters.items():
        ones = (1.0,) * adapter.r
        random = LayerInit(1.0, ones, 0.0, 0.0, slopes=ones, batches_reached=0)
        is_random = recipe.method.matrix == "random"
        yield name, own_directions(name, adapter, recipe), random if is_random else None


def _turns(names: Iterable[str]) -> Iterator[list[str]]:
    """Some layers at a time: one for each rank's eigensolver."""
    all_names = list(names)
    for first in range(0, len(all_names), zero.world_size()):
        yield all_names[first : first + zero.world_size()]


def gradients_by_group(
    model: Any,
    adapters: Mapping[str, AdapterLinear],
    plan: InitPlan,
    sample: Sample,
    group: Group,
    offload: bool,
) -> Iterator[GradientShards]:
    """A group of layers after the other: by segments of the model, or else in whole passes.

    Collective.
    """
    of_sample = (sample.batches, sample.num_label_tokens, group)
    remaining = list(plan.groups)
    if len(plan.groups) > 1 and plan.prefix is not None:
        try:
            for gradients in gradients_by_segment(
                model, adapters, plan.groups, plan.prefix, *of_sample, offload
            ):
                remaining.remove(tuple(gradients.shards))
                yield gradients
        except SegmentError as error:
            if dist.get_rank(group) == 0:
                print(f"lorasb: a pass for each group: not in segments, since {error}", flush=True)
    for names in remaining:
        yield average_gradients(model, adapters, *of_sample, names=names, offload=offload)


def decompose(
    gradients: Mapping[str, torch.Tensor],
    r: int,
    update: str,
    group: Group = None,
    seed: int = 0,
    scales: Mapping[str, float] | None = None,
) -> dict[str, tuple[TruncatedSVD, torch.Tensor]]:
    """SVD of the updates of some layers' gradients, and each direction's slope. Collective.

    Args:
        gradients: layer -> (rows here, short side), this rank's shard of its gradient or of the
            transpose. As many as there are ranks make use of all of them.
        update: a key of ``UPDATES``.
        scales: layer -> its ``step_scale``; 1 where it is not given.
    Returns:
        layer -> its SVD, and ``S_i u_iᵀ G v_i``, (r,); they are the same for the transpose.
    Raises:
        FloatingPointError: on every rank, if a gradient is not finite.
    """
    finite = torch.tensor([float(torch.isfinite(G).all()) for G in gradients.values()])
    finite = finite.to(accelerator.device())
    dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
    if bad := [name for name, ok in zip(gradients, finite.tolist(), strict=True) if not ok]:
        raise FloatingPointError(
            f"the gradient of {', '.join(bad)} is not finite. The base or the data hold values "
            "that overflow in its dtype; look at the loss of the base, or try --dtype fp32."
        )
    updates = [UPDATES[update].matrix(G, group) for G in gradients.values()]
    results = {}
    svds = truncated_svds(updates, r, group=group, seed=seed)
    for (name, G), svd in zip(gradients.items(), svds, strict=True):
        svd = finished(svd, update, (scales or {}).get(name, 1.0))
        along = ((svd.U_local.T @ G) * svd.Vh).sum(1)  # (r,): u_iᵀ G v_i, of the rows here
        dist.all_reduce(along, group=group)
        results[name] = svd, svd.S * along
    return results


def describe(
    svd: TruncatedSVD,
    slopes: torch.Tensor,
    stored_dtype: torch.dtype,
    batches_reached: int,
    group: Group,
) -> LayerInit:
    """Collective."""

    def error(dtype: torch.dtype) -> float:
        U, Vh = (factor.to(dtype).float() for factor in (svd.U_local, svd.Vh))
        gram = U.T @ U
        dist.all_reduce(gram, group=group)
        identity = torch.eye(len(gram), device=gram.device)
        return max((M - identity).abs().max().item() for M in (gram, Vh @ Vh.T))

    return LayerInit(
        captured_energy=svd.captured_energy,
        spectrum=tuple(svd.S.tolist()),
        orthonormality_error=error(torch.float32),
        stored_orthonormality_error=error(stored_dtype),
        slopes=tuple(slopes.tolist()),
        batches_reached=batches_reached,
    )
