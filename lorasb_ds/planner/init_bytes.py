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
# Ranks exchange gradients so many bytes at a time; experts' are decomposed so many elements at a
# time.
EXCHANGE_BYTES, EXPERT_SVD_ENTRIES = 1 << 27, 1 << 26
# Bytes for each element of an expert's update, with its copy for the SVD: a sign in int8 and fp32,
# which is also made in fp32; others in fp64, of which "raw" is the gradient itself.
SVD_BYTES = {"sign": 5, "adam": 12, "raw": 8, "weight": 8}
# Several ranks decompose each layer together where one of them would need more than this for it.
WHOLE_SVD_BYTES = 1 << 30


def takes_gram_way(short_side: int, r: int) -> bool:
    """Tell whether several ranks decompose a layer by its Gram matrix."""
    return short_side <= max(GRAM_SIDE_SHARED, GRAM_SHARE * r)


def shard_bytes(out_features: int, in_features: int, world_size: int) -> int:
    """Return the fp32 bytes of a layer's gradient, on the rank with most rows."""
    long_side, short_side = max(out_features, in_features), min(out_features, in_features)
    return -(-long_side // world_size) * short_side * FP32_BYTES


def sends_activations(activation_bytes: int, gradient_bytes: int) -> bool:
    """Tell whether ranks exchange a layer's x and δ, and not the fp32 sums of ``δᵀx``.

    Args:
        activation_bytes: of all rows of x and δ that a rank gets, its own included.
        gradient_bytes: of the whole layer, or of all its experts, in fp32.
    """
    return activation_bytes <= min(gradient_bytes, EXCHANGE_BYTES)


def backward_bytes(
    out_features: int, in_features: int, world_size: int, tokens: int, dtype_bytes: int
) -> int:
    """Count what one layer's ``δᵀx`` takes: fp32 x and δ, and what ranks exchange of two layers."""
    shard = shard_bytes(out_features, in_features, world_size)
    width = out_features + in_features
    if world_size == 1:
        return tokens * width * FP32_BYTES + shard
    long_side, short_side = max(out_features, in_features), min(out_features, in_features)
    received = world_size * tokens * width * dtype_bytes
    if sends_activations(received, long_side * short_side * FP32_BYTES):
        own_rows = -(-long_side // world_size) + short_side
        factors = world_size * tokens * own_rows * FP32_BYTES
        return factors + shard + 2 * (received + received // world_size)
    sums = min(world_size * shard, max(EXCHANGE_BYTES, world_size * short_side * FP32_BYTES))
    return tokens * width * FP32_BYTES + 2 * (sums + sums // world_size)


def experts_backward_bytes(
    local: int,
    shape: tuple[int, int, int],
    world_size: int,
    tokens: int,
    routed_rows: int,
    dtype_bytes: int,
) -> int:
    """Count what ``δᵀx`` of a projection's experts takes, and what ranks exchange of two of them.

    Which of both ways they go depends on the data.

    Args:
        local: experts that a rank has at a time.
        shape: of the projection: experts, out, in.
        routed_rows: tokens times the experts of each.
    """
    num_experts, out_features, in_features = shape
    width, expert = out_features + in_features, out_features * in_features * FP32_BYTES
    product = tokens * width * FP32_BYTES + expert  # one expert may get all tokens
    if world_size == 1:
        return product
    sent = routed_rows * width * dtype_bytes
    received = min(world_size * sent, num_experts * expert, EXCHANGE_BYTES)
    in_fp32 = received * FP32_BYTES // dtype_bytes
    of_rows = expert + in_fp32 + received + 2 * (sent + received)  # received ones are sorted
    at_once = min(local, max(1, EXCHANGE_BYTES // expert))
    return max(of_rows, product + 2 * at_once * expert)


def largest_svd_bytes(
    targets: Mapping[str, tuple[int, int]],
    experts: Mapping[str, tuple[int, int, int]],
    r: int,
    expert_r: int,
    world_size: int,
    update: str,
    budget_bytes: int | None = None,
) -> int:
    """Return what decomposing the layer, or the projection of experts, with most takes.

    Args:
        budget_bytes: --init-memory-gib.
    """
    shapes = set(targets.values())
    works = [svd_bytes(*shape, r, world_size, update, budget_bytes) for shape in shapes]
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


def element_bytes(update: str) -> int:
    """Return the bytes of a number of the matrix that is decomposed: int8 signs, or fp32."""
    return 1 if update == "sign" else FP32_BYTES


def decomposes_whole(
    out_features: int, in_features: int, r: int, update: str, budget_bytes: int | None
) -> bool:
    """Tell whether one of several ranks decomposes a layer alone, for which it has the memory.

    Args:
        budget_bytes: --init-memory-gib.
    """
    limit = WHOLE_SVD_BYTES if budget_bytes is None else min(WHOLE_SVD_BYTES, budget_bytes // 8)
    return whole_svd_bytes(out_features, in_features, r, update) <= limit


def whole_svd_bytes(out_features: int, in_features: int, r: int, update: str) -> int:
    """Return what decomposing one layer takes on one of several ranks (``whole_svd``).

    They are as many updates as there are ranks, of which this rank has some rows: they are as large
    as one layer, and sent and received in buffers of that size.
    """
    numel, short_side = out_features * in_features, min(out_features, in_features)
    # Signs are multiplied in bf16 or fp32, fp32 numbers in fp64.
    element, product = element_bytes(update), 4 if update == "sign" else 8
    gram = 5 * product * short_side**2 if short_side <= GRAM_SHARE * r else 0
    work = max(element, product) * numel + gram
    return 2 * element * numel + work + 32 * r * (out_features + in_features)


def svd_bytes(
    out_features: int,
    in_features: int,
    r: int,
    world_size: int,
    update: str,
    budget_bytes: int | None = None,
) -> int:
    """Return what decomposing one layer takes, alone or by all ranks, with ``world_size`` updates.

    Args:
        budget_bytes: --init-memory-gib.
    """
    if world_size > 1 and decomposes_whole(out_features, in_features, r, update, budget_bytes):
        return whole_svd_bytes(out_features, in_features, r, update)
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
