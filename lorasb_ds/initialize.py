"""The init phase of LoRA-SB: gradients -> their sign -> truncated SVD -> A, B and R.

DESIGN in one line: ``sign(G) ~ U S Vh``;  ``B = U``, ``A = Vh``, ``R = -eta S`` (arXiv 2411.19557),
the rank-r image of the first step that AdamW would take in full fine-tuning.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds import zero
from lorasb_ds.adapter import LoraSBLinear
from lorasb_ds.data import Batch
from lorasb_ds.gradients import (
    average_gradients,
    is_transposed,
    no_dropout,
)
from lorasb_ds.linalg import Group, TruncatedSVD, row_range, truncated_svd
from lorasb_ds.loss import token_loss_sum


@dataclass(frozen=True)
class LayerInit:
    """What the init found in one layer."""

    captured_energy: float  # share of ‖sign(G)‖² in the r directions kept
    largest_singular_value: float
    smallest_singular_value: float  # the r-th
    descent: float  # <B R A, G> for R = -eta S: negative, or R starts at 0


@dataclass(frozen=True)
class InitReport:
    num_samples: int
    num_label_tokens: int
    init_lr: float
    loss_before: float  # of the init sample, at the base
    loss_after: float  # of the same sample, with A, B and R filled
    gradients_s: float
    svd_s: float
    total_s: float
    peak_memory_bytes: int  # of rank 0, from the phase's start to its end
    layers: dict[str, LayerInit]

    @property
    def not_descending(self) -> list[str]:
        """Layers whose R starts at 0: without a gradient (their basis is then arbitrary), or where
        the rank-r image of sign(G) points uphill, since few entries dominate G."""
        return [name for name, layer in self.layers.items() if layer.descent >= 0]


# On rank 0: "<layer>.lora_A" and ".lora_B" as the adapter stores them, and ".S" (r,) in fp32.
Basis = dict[str, torch.Tensor]


def initialize(
    engine: Any,
    adapters: Mapping[str, LoraSBLinear],
    batches: Sequence[Batch],
    *,
    num_samples: int,
    num_label_tokens: int,
    init_lr: float,
    seed: int,
) -> tuple[InitReport, Basis]:
    """Fill A, B and R of every adapter in place. Collective.

    Args:
        engine: around the model with placeholders; its parameters may be sharded by ZeRO-3.
        batches: this rank's micro-batches of the sample, as many as on every other rank.
        num_samples, num_label_tokens: of the whole sample, all ranks together.
        init_lr: eta.
        seed: of the completion of bases that a gradient does not fill.
    Returns:
        The report (equal on every rank but for memory and times), and on rank 0 the basis; empty
        elsewhere.
    Raises:
        FloatingPointError: on every rank, if a gradient is not finite.
    """
    start = time.perf_counter()
    zero.reset_peak_memory()
    group = zero.new_group()  # the engine's own traffic goes through another
    model = engine.module  # the engine itself would scale the loss and expect a step
    gradients, loss_before = average_gradients(model, adapters, batches, num_label_tokens, group)
    zero.release(engine)
    after_gradients = time.perf_counter()

    layers: dict[str, LayerInit] = {}
    basis: Basis = {}
    for name, adapter in adapters.items():
        G = gradients.shards.pop(name)
        svd, layers[name] = decompose(name, G, adapter.r, init_lr, group, seed)
        step = -init_lr if layers[name].descent < 0 else 0.0
        basis |= _fill(name, adapter, svd, torch.diag(step * svd.S), group)
    after_svd = time.perf_counter()

    loss_after = sample_loss(model, batches, num_label_tokens)
    dist.destroy_process_group(group)
    report = InitReport(
        num_samples=num_samples,
        num_label_tokens=num_label_tokens,
        init_lr=init_lr,
        loss_before=loss_before,
        loss_after=loss_after,
        gradients_s=after_gradients - start,
        svd_s=after_svd - after_gradients,
        total_s=time.perf_counter() - start,
        peak_memory_bytes=zero.peak_memory_bytes(),
        layers=layers,
    )
    return report, basis


def decompose(
    name: str,
    G: torch.Tensor,
    r: int,
    init_lr: float,
    group: Group = None,
    seed: int = 0,
) -> tuple[TruncatedSVD, LayerInit]:
    """SVD of the sign of one layer's gradient, and the check that its update descends. Collective.

    Args:
        G: (rows here, short side), this rank's shard of the gradient or of its transpose.
    """
    finite = torch.tensor(float(torch.isfinite(G).all()), device=G.device)
    dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
    if not finite:
        raise FloatingPointError(
            f"the gradient of {name} is not finite. The base or the data hold values that overflow "
            "in its dtype; look at the loss of the base, or try --dtype fp32."
        )
    svd = truncated_svd(G.sign().to(torch.int8), r, group=group, seed=seed)
    # <B R A, G> = -eta Σ_i S_i u_iᵀ G v_i, the same for the transpose.
    along = ((svd.U_local.T @ G) * svd.Vh).sum(1)  # (r,): u_iᵀ G v_i, of the rows here
    dist.all_reduce(along, group=group)
    descent = -init_lr * (svd.S @ along).item()
    return svd, LayerInit(svd.captured_energy, svd.S[0].item(), svd.S[-1].item(), descent)


def _fill(
    name: str, adapter: LoraSBLinear, svd: TruncatedSVD, R: torch.Tensor, group: Group
) -> Basis:
    """Put one layer's A, B and R in place; return its part of the basis. Collective."""
    U = gather_rows(svd.U_local, max(adapter.out_features, adapter.in_features), group)
    B: torch.Tensor | None = U
    A: torch.Tensor | None = svd.Vh
    if is_transposed(adapter.out_features, adapter.in_features):
        # Gᵀ ~ U S Vh, so G ~ Vhᵀ S Uᵀ.
        B, A = svd.Vh.T, U.T if U is not None else None
    zero.fill(adapter.lora_A, A)
    zero.fill(adapter.lora_B, B)
    zero.fill_trainable(adapter.lora_R, R)
    if A is None or B is None:
        return {}
    dtype = adapter.lora_A.dtype
    return {
        f"{name}.lora_A": A.to("cpu", dtype).contiguous(),
        f"{name}.lora_B": B.to("cpu", dtype).contiguous(),
        f"{name}.S": svd.S.cpu(),
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


@torch.no_grad()
def sample_loss(model: nn.Module, batches: Sequence[Batch], num_label_tokens: int) -> float:
    """Mean cross-entropy over the sample's label tokens, adapters as they are. Collective."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=zero.device())
    with no_dropout(model):
        for batch in batches:
            loss_sum += token_loss_sum(model, batch).double()
    dist.all_reduce(loss_sum)
    return loss_sum.item() / num_label_tokens
