"""What ranks send each other, and how long a step may take. Pure and torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from lorasb_ds.planner.footprint import Footprint
from lorasb_ds.planner.gathers import gathers_blocks
from lorasb_ds.planner.init_plan import KRYLOV_BLOCK, blocks_prefix, takes_gram_way
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.placement import Placement
from lorasb_ds.planner.workload import Workload


@dataclass(frozen=True)
class Speeds:
    """What a rank can do: bytes, operations and seconds. Assumed, unless somebody measured it."""

    node_bandwidth: float = 200e9  # to other ranks of its host: two thirds of NVLink 3
    network_bandwidth: float = 25e9  # of a host to another: 200 Gbit/s
    host_bandwidth: float = 20e9  # to host memory: PCIe 4.0 x16
    memory_bandwidth: float = 1.5e12  # of the device's own memory
    flops: float = 312e12  # of bf16 products: A100
    flops_share: float = 0.4  # of which a training step makes use
    message_s: float = 2e-5


GPU_SPEEDS = Speeds()
CPU_SPEEDS = Speeds(2e9, 1e9, 1e10, 1e10, 5e10, 0.5, 2e-4)


@dataclass(frozen=True)
class Traffic:
    """Of one rank: bytes it receives, in how many collectives; bytes over its link to the host."""

    bytes: int
    messages: int
    host_bytes: int = 0


def step_traffic(shape: ModelShape, placement: Placement, work: Workload) -> Traffic:
    """Of one optimizer step with one micro-batch.

    ZeRO-3 gathers a block in the forward and again in the backward pass (arXiv 1910.02054, section
    7), and once more where activations are recomputed, unless it gathers whole blocks then
    (``gathers_blocks``); embedding and head in the forward pass only (``loss.LossHead``). A ring
    all-gather of S bytes over w ranks brings each (w - 1)/w S. R's gradients are reduced in fp32
    and R gathered.
    """
    gathered = _gathers(shape, placement, work, _passes(shape, placement, work))
    return Traffic(
        gathered.bytes + _share(work.num_trainable * (4 + placement.dtype_bytes), placement),
        gathered.messages + (2 if placement.world_size > 1 else 0),
        gathered.host_bytes,
    )


def init_traffic(
    shape: ModelShape, placement: Placement, work: Workload, memory: Footprint
) -> Traffic:
    """Of the whole init: gathers of its passes, gradients to their owners in fp32, and SVDs."""
    w = placement.world_size
    rounds = work.init_rounds(w)
    passes = _passes(shape, placement, work) + (len(memory.init.groups) > 1)
    gathered = _gathers(shape, placement, work, passes)
    sent, messages = gathered.bytes * rounds, gathered.messages * rounds
    if w > 1:
        numel = sum(out * in_ for out, in_ in work.targets.values())
        sent += rounds * _share(4 * numel, placement)
        messages += rounds * len(work.targets) * w
        for sides in work.targets.values():
            long, short = max(sides), min(sides)
            steps = 1 if takes_gram_way(short, work.r) else 3 + work.r // 4
            columns = short if steps == 1 else 2 * KRYLOV_BLOCK * steps
            sent += _share(4 * short * columns + 4 * work.r * (long + 3 * short), placement)
            messages += steps + 8
    return Traffic(sent, messages, gathered.host_bytes * rounds)


def step_seconds(
    shape: ModelShape,
    placement: Placement,
    work: Workload,
    traffic: Traffic,
    speeds: Speeds,
    num_nodes: int,
) -> float:
    """The longest of computing, gathering and fetching from the host: they overlap.

    Two operations for each parameter and token in the forward pass, two more in the backward
    (frozen weights have no gradient) and again two where activations are recomputed; attention
    multiplies every query with half of the keys and values. A quantized layer is read, written in
    the compute dtype and read again, in every pass.
    """
    passes = 3 if work.gradient_checkpointing else 2
    attention = 2 * work.max_length * shape.num_heads * shape.head_dim * shape.num_blocks
    compute = passes * work.tokens * (2 * shape.num_active + attention)
    dequantized = 0.0
    if placement.form in ("nf4", "int8"):
        numel = sum(out * in_ for out, in_ in shape.layers.values())
        dequantized = passes * numel * (2 * placement.dtype_bytes + 0.5) / speeds.memory_bandwidth
    bandwidth = speeds.node_bandwidth
    if num_nodes > 1:  # a ring over all ranks crosses each host's network once
        bandwidth = min(bandwidth, speeds.network_bandwidth)
    return max(
        compute / (speeds.flops * speeds.flops_share) + dequantized,
        traffic.bytes / bandwidth + traffic.messages * speeds.message_s,
        traffic.host_bytes / speeds.host_bandwidth,
    )


def _passes(shape: ModelShape, placement: Placement, work: Workload) -> int:
    """In which every layer is gathered, of a step."""
    return 3 if work.gradient_checkpointing and not gathers_blocks(shape, placement, work) else 2


def _share(num_bytes: int, placement: Placement) -> int:
    return num_bytes * (placement.world_size - 1) // placement.world_size


def _gathers(shape: ModelShape, placement: Placement, work: Workload, passes: int) -> Traffic:
    """ZeRO-3's all-gathers: parameters in the model's order, in buckets of prefetches.

    Args:
        passes: over the blocks.
    """
    if not placement.sharded:
        return Traffic(0, 0)
    d, ranks = placement.dtype_bytes, placement.shard_ranks
    prefix = blocks_prefix(work.targets) or ""
    of_blocks: list[int] = []
    once: list[int] = []
    for name, numel in shape.others.items():
        (of_blocks if prefix and name.startswith(prefix) else once).append(numel * d)
    table = shape.vocab_size * shape.hidden_size * d
    if once.count(table) == 1:
        once.append(table)  # the embedding is the head, too
    for name, sides in shape.layers.items():
        of_blocks.append(sum(placement.stored(sides)))
        if name in work.targets:
            of_blocks += [work.r * side * d for side in sides] * work.pairs
    total, messages = 0, 0
    for sizes, times in ((of_blocks, passes), (once, 1)):
        sizes = [n for n in sizes if n > placement.persistence_threshold * d]
        total += times * sum(sizes)
        messages += times * _buckets(sizes, placement.prefetch_bucket_size * d)
    from_host = total // ranks if placement.offload != "none" else 0
    if ranks == 1:
        return Traffic(0, 0, from_host)
    return Traffic(total * (ranks - 1) // ranks, messages, from_host)


def _buckets(sizes: list[int], bucket: int) -> int:
    """How many are filled; the last parameter overshoots."""
    count, filled = 0, bucket + 1
    for size in sizes:
        if filled > bucket:
            count, filled = count + 1, 0
        filled += size
    return count
