"""What the init takes for one layer, or some experts of a projection. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

FP32_BYTES = 4
# On several ranks sharded_svd decomposes the Gram matrix where the shorter side is at most
# max(GRAM_SIDE_SHARED, GRAM_SHARE * r): it saves an all-reduce a step. Numbers from
# `scripts/bench.py svd` (docs/benchmarks.md).
GRAM_SIDE_SHARED, GRAM_SHARE = 1024, 6
# Columns of a Krylov block: wider ones need larger bases, narrower ones more steps.
KRYLOV_BLOCK = 16
# Experts' gradients are computed and reduced so many bytes at a time, and decomposed so many
# elements at a time.
EXPERT_GRADIENT_BYTES, EXPERT_SVD_ENTRIES = 1 << 27, 1 << 26
# Bytes for each element of an expert's update, with its copy for the SVD: a sign in int8 and fp32,
# which is also made in fp32; others in fp64, of which "raw" is the gradient itself.
SVD_BYTES = {"sign": 5, "adam": 12, "raw": 8, "weight": 8}


def takes_gram_way(short_side: int, r: int) -> bool:
    """Tell whether several ranks decompose a layer by its Gram matrix."""
    return short_side <= max(GRAM_SIDE_SHARED, GRAM_SHARE * r)


def shard_bytes(out_features: int, in_features: int, world_size: int) -> int:
    """Return the fp32 bytes of a layer's gradient, on the rank with most rows."""
    long_side, short_side = max(out_features, in_features), min(out_features, in_features)
    return -(-long_side // world_size) * short_side * FP32_BYTES


def backward_bytes(out_features: int, in_features: int, world_size: int, tokens: int) -> int:
    """Count one layer's fp32 x and δ, and a block of ``δᵀx``."""
    shard = shard_bytes(out_features, in_features, world_size)
    return tokens * (out_features + in_features) * FP32_BYTES + shard


def experts_backward_bytes(local: int, out_features: int, in_features: int, tokens: int) -> int:
    """Count one expert's fp32 x and δ, of all tokens at most, and a block of experts' ``δᵀx``.

    Args:
        local: experts of the projection that a rank has at a time.
    """
    expert = out_features * in_features * FP32_BYTES
    at_once = min(local, max(1, EXPERT_GRADIENT_BYTES // expert))
    return tokens * (out_features + in_features) * FP32_BYTES + at_once * expert


def largest_svd_bytes(
    targets: Mapping[str, tuple[int, int]],
    experts: Mapping[str, tuple[int, int, int]],
    r: int,
    expert_r: int,
    world_size: int,
    update: str,
) -> int:
    """Return what decomposing the layer, or the projection of experts, with most takes."""
    works = [svd_bytes(*shape, r, world_size, update) for shape in set(targets.values())]
    works += [
        experts_svd_bytes(-(-shape[0] // world_size), *shape, expert_r, update)
        for shape in set(experts.values())
    ]
    return max(works, default=0)


def experts_svd_bytes(
    local: int, num_experts: int, out_features: int, in_features: int, r: int, update: str
) -> int:
    """Return what decomposing a rank's experts takes (``batched_svd``), with their updates.

    Args:
        local: experts of the projection that a rank has at a time.
        num_experts: of the projection.
    """
    numel = out_features * in_features
    at_once = min(local, max(1, EXPERT_SVD_ENTRIES // numel))
    # Beside the gradients: their sum. Without: W of a rank's experts, as read and as decomposed.
    kept = 2 * local if update == "weight" else 1
    # U and Vh: a rank's, all of them on rank 0, and the factors made of them.
    factors = 3 * FP32_BYTES * num_experts * r * (out_features + in_features)
    return (at_once * SVD_BYTES[update] + kept * FP32_BYTES) * numel + factors


def svd_bytes(out_features: int, in_features: int, r: int, world_size: int, update: str) -> int:
    """Return what decomposing one layer takes (``sharded_svd``), with ``world_size`` updates."""
    shard = shard_bytes(out_features, in_features, world_size)
    short_side, both_sides = min(out_features, in_features), out_features + in_features
    # int8 signs multiplied in bf16, or fp32 numbers in fp64.
    signs = update == "sign"
    updates = world_size * (shard // 4 if signs else shard)
    products = shard // 2 if signs else 2 * shard
    gram = 0
    if takes_gram_way(short_side, r):
        gram = (20 if signs else 40) * short_side**2
    return updates + max(products, gram) + 32 * r * both_sides
