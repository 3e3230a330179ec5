"""What ZeRO-3 gathers at a time: a layer, a projection of experts, or a block. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lorasb_ds.planner.layer_groups import block_of, blocks_prefix
from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.placement import Placement
from lorasb_ds.planner.workload import Workload


def gathered_bytes(shape: ModelShape, placement: Placement, work: Workload) -> int:
    """Return the most bytes that ZeRO-3 has gathered at a time, without what it keeps whole.

    Its coordinator gathers what the current module needs (a linear layer with its A and B, or a
    projection of a block's experts with theirs; where activations are recomputed, a whole block:
    ``trainer.gather_together``). It prefetches while
    fewer than ``stage3_max_live_parameters`` elements are gathered, in buckets that the last
    parameter may overshoot; parts of a bucket are copied out of it.
    (deepspeed/runtime/zero/partitioned_param_coordinator.py, partition_parameters.py)
    """
    if not placement.sharded or (placement.shard_ranks == 1 and placement.offload == "none"):
        return 0
    d = placement.dtype_bytes
    by_name = gathered_by_name(shape, placement, work)
    modules = list(by_name.values())
    if gathers_blocks(shape, placement, work):
        modules = list(_by_block(by_name, work).values())
    total = sum(modules)
    if placement.prefetch_bucket_size == 0:
        return 2 * max(modules)
    live = placement.max_live_parameters * d + max(modules)
    bucket = min(placement.prefetch_bucket_size * d + max(modules), total)
    return min(live, total) + bucket


def gathers_blocks(shape: ModelShape, placement: Placement, work: Workload) -> bool:
    """Tell whether ZeRO-3 should gather a decoder block at a time (``trainer.gather_together``).

    This saves a third gather where activations are recomputed. It does not pay where a block leaves
    so little of ``stage3_max_live_parameters`` that DeepSpeed stops prefetching. From NVMe it is
    impossible: DeepSpeed has only a few buffers there, one a parameter.
    """
    prefix = blocks_prefix(work.adapted)
    if not work.gradient_checkpointing or not placement.sharded or prefix is None:
        return False
    if placement.offload == "nvme":
        return False
    by_block = _by_block(gathered_by_name(shape, placement, work), work)
    block = max(n for key, n in by_block.items() if isinstance(key, int)) // placement.dtype_bytes
    bucket = placement.prefetch_bucket_size
    return bucket == 0 or block + bucket <= placement.max_live_parameters


def gathered_by_name(shape: ModelShape, placement: Placement, work: Workload) -> dict[str, int]:
    """Return the bytes of what ZeRO-3 gathers together, by name.

    They are those of each linear layer or projection of experts with its A and B, and of each
    other parameter.
    """
    d = placement.dtype_bytes
    stored = {name: sum(placement.stored(sides)) for name, sides in shape.layers.items()}
    stored |= {name: sum(placement.stored_experts(s)) for name, s in shape.experts.items()}
    for name, (out, in_) in work.targets.items():
        # PEFT's methods may target what is no linear layer, such as norms.
        stored[name] = stored.get(name, 0) + work.pairs * work.rank_of(name) * (out + in_) * d
    for name, (num_experts, out, in_) in work.expert_targets.items():
        stored[name] += work.pairs * num_experts * work.expert_r * (out + in_) * d
    return stored | {name: n * d for name, n in shape.others.items()}


def _by_block(by_name: Mapping[str, int], work: Workload) -> dict[str | int, int]:
    """Sum up the parameters of each decoder block under its number."""
    prefix = blocks_prefix(work.adapted) or ""
    together: Counter[str | int] = Counter()
    for name, n in by_name.items():
        together[block_of(name, prefix) if prefix and name.startswith(prefix) else name] += n
    return dict(together)
