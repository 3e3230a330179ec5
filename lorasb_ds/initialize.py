"""The init phase of LoRA-SB: gradients -> update -> truncated SVD -> A, B and R.

DESIGN in one line: ``sign(G) ~ U S Vh``;  ``B = U``, ``A = Vh``, ``R = -eta S`` (arXiv 2411.19557),
the rank-r image of the first step that AdamW would take in full fine-tuning.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist

from lorasb_ds import accelerator, zero
from lorasb_ds.adapter import LoraSBLinear
from lorasb_ds.batches import Sample
from lorasb_ds.gradients import GradientShards, average_gradients, is_transposed
from lorasb_ds.init_plan import InitPlan
from lorasb_ds.init_report import InitReport, LayerInit
from lorasb_ds.linalg import TruncatedSVD, truncated_svds
from lorasb_ds.segments import SegmentError, gradients_by_segment
from lorasb_ds.sharding import Group, gather_rows
from lorasb_ds.step import choose_step

ADAM_EPSILON = 1e-8

# The update that the init imitates, as a function of the gradient; -eta is left to R.
UPDATES = {
    # AdamW's first step, in the limit of a small epsilon: the paper's.
    "sign": lambda G: G.sign().to(torch.int8),
    # AdamW's first step itself: entries near epsilon move less.
    "adam": lambda G: G / (G.abs() + ADAM_EPSILON),
    # The gradient: the first step of SGD.
    "raw": lambda G: G,
}


# On rank 0: "<layer>.lora_A" and ".lora_B" as the adapter stores them.
Basis = dict[str, torch.Tensor]


def initialize(
    engine: Any,
    adapters: Mapping[str, LoraSBLinear],
    sample: Sample,
    probe: Sample,
    plan: InitPlan,
    *,
    init_lr: float | Literal["auto"],
    update: str,
    offload: bool,
    seed: int,
) -> tuple[InitReport, Basis]:
    """Fill A, B and R of every adapter in place. Collective.

    Layers are done in the groups of the plan; which group a layer is in changes nothing.

    Args:
        engine: around the model with placeholders; its parameters may be sharded by ZeRO-3.
        sample: rows of the gradient; as many batches as on every other rank.
        probe: rows that are held back to measure losses on.
        init_lr: eta; "auto" measures it on the probe.
        update: a key of ``UPDATES``.
        offload: keep gradient shards in host memory.
        seed: of the completion of bases that a gradient does not fill.
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
    model = engine.module  # the engine itself would scale the loss and expect a step
    layers: dict[str, LayerInit] = {}
    basis: Basis = {}
    segments = 0
    gradients_s = communication_s = svd_s = 0.0
    began = time.perf_counter()
    for gradients in gradients_by_group(model, adapters, plan, sample, group, offload):
        zero.release(engine)
        segments += gradients.of_segment
        communication_s += gradients.communication.seconds()
        gradients_s += time.perf_counter() - began
        began = time.perf_counter()
        names = list(gradients.shards)
        for first in range(0, len(names), zero.world_size()):  # a layer for each rank's eigensolver
            G = {n: gradients.take(n) for n in names[first : first + zero.world_size()]}
            r = adapters[names[first]].r
            for name, (svd, slopes) in decompose(G, r, update, group, seed).items():
                adapter, reached = adapters[name], gradients.reached[name]
                layers[name] = describe(svd, slopes, adapter.lora_A.dtype, reached, group)
                basis |= fill_factors(name, adapter, *_factors(adapter, svd, group))
        svd_s += time.perf_counter() - began
        began = time.perf_counter()
    layers = {name: layers[name] for name in adapters}
    step = choose_step(engine, adapters, layers, probe, init_lr)
    num_batches = torch.tensor(
        sum(batch.num_label_tokens > 0 for batch in sample.batches), device=accelerator.device()
    )
    dist.all_reduce(num_batches, group=group)
    dist.destroy_process_group(group)
    report = InitReport(
        update=update,
        num_samples=sample.num_rows,
        num_label_tokens=sample.num_label_tokens,
        num_batches=int(num_batches),
        loss=gradients.loss,
        step=step,
        num_groups=len(plan.groups),
        passes=len(plan.groups) - segments + (segments > 0),
        by_segments=segments > 0,
        predicted_memory_bytes=plan.predicted_bytes,
        peak_memory_bytes=accelerator.peak_memory_bytes(),
        memory_at_start_bytes=memory_at_start,
        gradients_s=gradients_s - communication_s,
        communication_s=communication_s,
        svd_s=svd_s,
        total_s=time.perf_counter() - start,
        layers=layers,
    )
    return report, basis


def gradients_by_group(
    model: Any,
    adapters: Mapping[str, LoraSBLinear],
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
    gradients: Mapping[str, torch.Tensor], r: int, update: str, group: Group = None, seed: int = 0
) -> dict[str, tuple[TruncatedSVD, torch.Tensor]]:
    """SVD of the updates of some layers' gradients, and each direction's slope. Collective.

    Args:
        gradients: layer -> (rows here, short side), this rank's shard of its gradient or of the
            transpose. As many as there are ranks make use of all of them.
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
    updates = [UPDATES[update](G) for G in gradients.values()]
    results = {}
    svds = truncated_svds(updates, r, group=group, seed=seed)
    for (name, G), svd in zip(gradients.items(), svds, strict=True):
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


def _factors(
    adapter: LoraSBLinear, svd: TruncatedSVD, group: Group
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """One layer's A and B on rank 0. Collective."""
    U = gather_rows(svd.U_local, max(adapter.out_features, adapter.in_features), group)
    if U is None:
        return None, None
    if is_transposed(adapter.out_features, adapter.in_features):
        return U.T, svd.Vh.T  # Gᵀ ~ U S Vh, so G ~ Vhᵀ S Uᵀ
    return svd.Vh, U


def fill_factors(
    name: str, adapter: LoraSBLinear, A: torch.Tensor | None, B: torch.Tensor | None
) -> Basis:
    """Put rank 0's A and B of one layer in place; its part of the basis. Collective."""
    zero.fill(adapter.lora_A, A)
    zero.fill(adapter.lora_B, B)
    if A is None or B is None:
        return {}
    dtype = adapter.lora_A.dtype
    return {
        f"{name}.lora_A": A.to("cpu", dtype).contiguous(),
        f"{name}.lora_B": B.to("cpu", dtype).contiguous(),
    }
