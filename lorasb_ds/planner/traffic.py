"""Bytes that a rank receives, in a training step and in the init. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from lorasb_ds.planner.footprint import Footprint
from lorasb_ds.planner.gathers import gathers_blocks
from lorasb_ds.planner.init_bytes import (
    KRYLOV_BLOCK,
    decomposes_whole,
    element_bytes,
    sends_activations,
    takes_gram_way,
)
from lorasb_ds.planner.layer_groups import blocks_prefix
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.placement import Placement
from lorasb_ds.planner.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives."""

    bytes: int  # from other ranks
    host_bytes: int = 0  # from the memory of its host

    @property
    def total_bytes(self) -> int:
        return self.bytes + self.host_bytes


def step_traffic(shape: ModelShape, placement: Placement, work: Workload) -> Traffic:
    """Count the bytes of one optimizer step with one micro-batch.

    ZeRO-3 gathers a block in the forward and again in the backward pass (arXiv 1910.02054, section
    7), and once more where activations are recomputed, unless it gathers whole blocks then
    (``gathers_blocks``); embedding and head in the forward pass only (``loss.LossHead``). A ring
    all-gather of S bytes over w ranks brings each (w - 1)/w S. R's gradients are reduced in fp32
    and R gathered.
    """
    gathered = _gathers(shape, placement, work, _passes(shape, placement, work))
    of_trained = work.num_trainable * (4 + placement.dtype_bytes)
    return Traffic(gathered.bytes + _received(of_trained, placement), gathered.host_bytes)


def init_traffic(
    shape: ModelShape, placement: Placement, work: Workload, memory: Footprint
) -> Traffic:
    """Count the bytes of the whole init.

    They are those of the gathers of its passes, of gradients or the activations that they are made
    of (``sends_activations``), and of the SVDs.
    """
    w, work = placement.world_size, work.in_init
    rounds = work.init_rounds(w)
    of_groups = memory.init.blocks_of_groups(shape.num_blocks)
    passes = _passes(shape, placement, work) * sum(of_groups) / shape.num_blocks
    # By segments there is a forward pass before; each of their runs embeds the tokens again.
    segmented = len(of_groups) > 1 and memory.init.prefix is not None
    runs = len(of_groups) + segmented
    gathered = _gathers(shape, placement, work, passes + segmented, runs)
    sent = gathered.bytes * rounds
    if w > 1:
        d = placement.dtype_bytes
        rows = work.tokens * shape.experts_per_token
        exchanged = [exchanged_bytes(1, *of, w * work.tokens, d) for of in work.targets.values()]
        exchanged += [exchanged_bytes(*of, rows, d) for of in work.expert_targets.values()]
        sent += rounds * _received(sum(exchanged), placement)
        # An expert's owner decomposes its gradient alone, and sends the factors.
        sent += _received(4 * work.num_in_expert_pairs, placement)
        sent += sum(_received(_svd_bytes(*of, work, w), placement) for of in work.targets.values())
    return Traffic(sent, gathered.host_bytes * rounds)


def _svd_bytes(out: int, in_: int, work: Workload, world_size: int) -> int:
    """Count the bytes of a layer's SVD on all ranks, U on its way to the first rank included."""
    r, long, short = work.svd_r, max(out, in_), min(out, in_)
    if decomposes_whole(out, in_, r, work.svd_update, work.init_memory_bytes):
        # One layer for each rank at a time, whose U goes back.
        of_one = element_bytes(work.svd_update) * long * short + 4 * r * long
        return of_one // world_size + 4 * r * (long + short)
    steps = 1 if takes_gram_way(short, r) else 3 + r // 4
    columns = short if steps == 1 else 2 * KRYLOV_BLOCK * steps
    return 4 * short * columns + 4 * r * (long + 3 * short)


def exchanged_bytes(matrices: int, out: int, in_: int, rows: int, dtype_bytes: int) -> int:
    """Count the bytes of the gradients of a layer or of experts on all ranks, or of x and δ.

    Args:
        rows: of x and δ that a rank gets, its own included.
    """
    gradients, activations = 4 * matrices * out * in_, rows * (out + in_) * dtype_bytes
    return activations if sends_activations(activations, gradients) else gradients


def _passes(shape: ModelShape, placement: Placement, work: Workload) -> int:
    """Count the passes of a step in which every block is gathered."""
    return 3 if work.gradient_checkpointing and not gathers_blocks(shape, placement, work) else 2


def _received(num_bytes: int, placement: Placement) -> int:
    """Return what a ring over all ranks brings to each."""
    return num_bytes * (placement.world_size - 1) // placement.world_size


def _gathers(
    shape: ModelShape, placement: Placement, work: Workload, passes: float, runs: int = 1
) -> Traffic:
    """Count the bytes of ZeRO-3's all-gathers in so many passes over the blocks.

    Args:
        runs: how often the tokens are embedded.
    """
    if not placement.sharded:
        return Traffic(0)
    d, ranks = placement.dtype_bytes, placement.shard_ranks
    prefix = blocks_prefix(work.adapted) or ""
    of_blocks: list[int] = []
    once: list[int] = []
    for name, numel in shape.others.items():
        (of_blocks if prefix and name.startswith(prefix) else once).append(numel * d)
    table = shape.vocab_size * shape.hidden_size * d
    if once.count(table) == 1:
        once.append(table)  # the embedding is the head, too
    once += [table] * (runs - 1)
    for name, sides in shape.layers.items():
        of_blocks.append(sum(placement.stored(sides)))
        if name in work.targets:
            of_blocks += [work.rank_of(name) * side * d for side in sides] * work.pairs
    for name, (num_experts, out, in_) in shape.experts.items():
        of_blocks.append(sum(placement.stored_experts((num_experts, out, in_))))
        if name in work.expert_targets:
            factors = [num_experts * work.expert_r * side * d for side in (out, in_)]
            of_blocks += factors * work.pairs
    kept = placement.persistence_threshold * d
    total = sum(
        int(times * sum(n for n in sizes if n > kept))
        for sizes, times in ((of_blocks, passes), (once, 1))
    )
    from_host = total // ranks if placement.offload != "none" else 0
    return Traffic(total * (ranks - 1) // ranks, from_host)
