"""The init phase of LoRA-SB: gradients -> update -> truncated SVD -> A, B and R.

DESIGN in one line: ``sign(G) ~ U S Vh``;  ``B = U``, ``A = Vh``, ``R = -eta S`` (arXiv 2411.19557),
the rank-r image of the first step that AdamW would take in full fine-tuning.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds import zero
from lorasb_ds.adapter import LoraSBLinear, set_scale
from lorasb_ds.data import Batch
from lorasb_ds.gradients import (
    GradientShards,
    average_gradients,
    branches_off,
    is_transposed,
    no_dropout,
)
from lorasb_ds.linalg import Group, TruncatedSVD, row_range, truncated_svds
from lorasb_ds.line_search import search_init_lr
from lorasb_ds.loss import token_loss_sum
from lorasb_ds.plan import InitPlan
from lorasb_ds.segments import SegmentError, gradients_by_segment

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


@dataclass(frozen=True)
class Sample:
    """Rows as micro-batches, this rank's; and their numbers, of all ranks together."""

    batches: Sequence[Batch]
    num_rows: int
    num_label_tokens: int


@dataclass(frozen=True)
class LayerInit:
    """What the init found in one layer. The update is that of ``UPDATES``, without eta."""

    captured_energy: float  # share of its squared Frobenius norm in the r directions kept
    spectrum: tuple[float, ...]  # its r largest singular values
    orthonormality_error: float  # largest entry of |UᵀU - I| and |Vh Vhᵀ - I|, in fp32
    stored_orthonormality_error: float  # the same as A and B are stored, in the run's dtype
    slopes: tuple[float, ...]  # S_i u_iᵀ G v_i of each direction
    batches_reached: int  # micro-batches of all ranks that called the layer

    @property
    def slope(self) -> float:
        """<U S Vh, G>: to first order the loss falls by eta times this. R is 0 where it is not
        positive: without a gradient (the basis is then arbitrary), or where the rank-r image of the
        update points uphill, since few entries dominate G."""
        return sum(self.slopes)

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the update, all directions."""
        return sum(s * s for s in self.spectrum) / self.captured_energy

    def R(self, eta: float) -> torch.Tensor:
        """(r, r), fp32: ``-eta diag(S)``, or 0."""
        return torch.diag((-eta if self.slope > 0 else 0.0) * torch.tensor(self.spectrum))


@dataclass(frozen=True)
class Step:
    """The eta that was taken, and what it does to rows that the gradient has not seen."""

    init_lr: float
    num_samples: int
    loss_before: float  # at the base
    loss_after: float  # with A, B and R filled
    losses: dict[str, float]  # every eta that was tried and its loss; empty where eta was given
    seconds: float


@dataclass(frozen=True)
class InitReport:
    update: str
    num_samples: int  # rows of the gradient
    num_label_tokens: int
    num_batches: int  # micro-batches of all ranks
    loss: float  # of the gradient's rows, at the base
    step: Step
    num_groups: int  # of layers, whose gradients were held at the same time
    passes: int  # forward and backward over the sample; by segments it is one, and a forward more
    by_segments: bool
    predicted_memory_bytes: int  # of gradients and SVD, without activations (plan.py)
    peak_memory_bytes: int  # of rank 0, all that it holds
    memory_at_start_bytes: int
    gradients_s: float  # forward, backward and the gathers of ZeRO in them
    communication_s: float  # reductions of gradients into shards; not in gradients_s
    svd_s: float  # with the filling of A and B
    total_s: float  # with the step's
    layers: dict[str, LayerInit]

    @property
    def not_descending(self) -> list[str]:
        """Layers whose R starts at 0."""
        return [name for name, layer in self.layers.items() if layer.slope <= 0]

    @property
    def partly_reached(self) -> dict[str, int]:
        """Layers that some micro-batches never called, and how many did."""
        return {
            name: layer.batches_reached
            for name, layer in self.layers.items()
            if layer.batches_reached < self.num_batches
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
    zero.reset_peak_memory()
    memory_at_start = zero.memory_bytes()
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
        sum(batch.num_label_tokens > 0 for batch in sample.batches), device=zero.device()
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
        peak_memory_bytes=zero.peak_memory_bytes(),
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
    finite = finite.to(zero.device())
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


def gather_rows(local: torch.Tensor, num_rows: int, group: Group) -> torch.Tensor | None:
    """The whole matrix on rank 0 of the group, None elsewhere. Collective.

    Args:
        local: (rows here, r), the shard of ``row_range(num_rows, rank, world_size)``.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if world_size == 1:
        return local
    sizes = [len(row_range(num_rows, k, world_size)) for k in range(world_size)]
    padded = local.new_zeros(max(sizes), local.shape[1])  # gather wants equal sizes
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sizes] if rank == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    if parts is None:
        return None
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def choose_step(
    engine: Any,
    adapters: Mapping[str, LoraSBLinear],
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
            loss_before = sample_loss(model, probe)
    for name, adapter in adapters.items():
        zero.fill_trainable(adapter.lora_R, layers[name].R(eta))
    return Step(
        init_lr=eta,
        num_samples=probe.num_rows,
        loss_before=loss_before,
        loss_after=sample_loss(model, probe),
        losses={f"{tried:.3g}": loss for tried, loss in sorted(losses.items())},
        seconds=time.perf_counter() - start,
    )


def _measure_losses(
    model: nn.Module,
    adapters: Mapping[str, LoraSBLinear],
    layers: Mapping[str, LayerInit],
    probe: Sample,
    unit: float,
) -> dict[float, float]:
    """Loss of the probe along the update, by a scale on the branch of R at eta = 1. Collective.

    Every rank is given rank 0's numbers, so that all take the same steps.
    """
    for name, adapter in adapters.items():
        zero.fill(adapter.lora_R, layers[name].R(1.0))

    def loss_at(eta: float) -> float:
        set_scale(adapters, eta)
        loss = torch.tensor(sample_loss(model, probe), dtype=torch.float64, device=zero.device())
        dist.broadcast(loss, src=0)
        return loss.item()

    try:
        return search_init_lr(loss_at, unit)
    finally:
        set_scale(adapters, 1.0)


@torch.no_grad()
def sample_loss(model: nn.Module, sample: Sample) -> float:
    """Mean cross-entropy over the sample's label tokens, adapters as they are. Collective."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=zero.device())
    with no_dropout(model):
        for batch in sample.batches:
            loss_sum += token_loss_sum(model, batch).double()
    dist.all_reduce(loss_sum)
    return loss_sum.item() / sample.num_label_tokens
