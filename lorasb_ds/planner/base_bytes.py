"""Bytes of the base on a rank: where it is held, while it is loaded, dequantized. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from lorasb_ds.planner.model_shape import ModelShape
from lorasb_ds.planner.placement import Placement

# The loader reads and quantizes so many elements at a time. As read and in the compute dtype each
# takes up to 8 bytes, and bitsandbytes' intermediates take 14 on a CPU.
LOAD_CHUNK, READ_BYTES, QUANTIZE_BYTES = 1 << 20, 8, 14


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of a base, on the rank with most.

    Attributes:
        whole: of all its tensors, scales included, over all ranks.
        kept: what a rank keeps whole.
        shards: its shards, scales included.
        scale_shards: those of scales.
        in_flight: what the load takes at its peak beyond what remains.
        dequantized: one layer, or one expert, with its scales in fp32.
    """

    whole: int
    kept: int
    shards: int
    scale_shards: int
    in_flight: int
    dequantized: int


def base_bytes(shape: ModelShape, placement: Placement) -> BaseBytes:
    """Count the bytes of a base."""
    tensors = _tensors(shape, placement)
    stored, scales = [n for n, _ in tensors], sum(scales for _, scales in tensors)
    whole = sum(stored)
    kept, shards = held_bytes(stored, placement)
    return BaseBytes(
        whole=whole,
        kept=kept,
        shards=shards,
        scale_shards=scales * shards // whole,  # sharded with the weights that they scale
        in_flight=_in_flight_bytes(stored, placement) + _read_bytes(shape, placement),
        dequantized=_dequantized_bytes(shape, placement),
    )


def held_bytes(stored: list[int], placement: Placement) -> tuple[int, int]:
    """Return the bytes that a rank keeps whole, and those of its shards."""
    if not placement.sharded:
        return sum(stored), 0
    threshold = placement.persistence_threshold * placement.dtype_bytes
    kept = sum(n for n in stored if n <= threshold) if placement.shard_ranks > 1 else 0
    shards = sum(-(-n // placement.shard_ranks) for n in stored)
    if placement.secondary_ranks > 1:
        kept += sum(-(-n // placement.secondary_ranks) for n in stored)
    return kept, shards


def _tensors(shape: ModelShape, placement: Placement) -> list[tuple[int, int]]:
    """Return the bytes of every tensor of the base, and those of its scales among them.

    They are in the order in which they are loaded: the largest of the files first.
    """
    found = [(out * in_, placement.stored((out, in_))) for out, in_ in shape.layers.values()]
    for num_experts, out, in_ in shape.experts.values():
        stored = placement.stored_experts((num_experts, out, in_))
        found.append((num_experts * out * in_, stored))
    found += [(n, (n * placement.dtype_bytes, 0)) for n in shape.others.values()]
    found.sort(reverse=True)
    return [(numbers + scales, scales) for _, (numbers, scales) in found]


def _in_flight_bytes(stored: list[int], placement: Placement) -> int:
    """Return what the load holds at its peak beyond what remains afterwards.

    As many tensors come at a time as there are ranks; each rank has read one of them. They are
    received and sharded one by one; a rank keeps its own until its turn.
    (streaming.stream_weights)

    Args:
        stored: bytes of each tensor, in the order in which they are loaded.
    """
    world_size = placement.world_size
    held = peak = 0
    for first in range(0, len(stored), world_size):
        turn = stored[first : first + world_size]
        for i, size in enumerate(turn):
            own = turn[i + 1] if i + 1 < len(turn) else 0
            shard = -(-size // placement.shard_ranks) if placement.sharded else 0
            on_device = shard if placement.offload == "none" else 0
            peak = max(peak, held + own + size + on_device)
            held += on_device if placement.sharded else size
    return peak - held


def _read_bytes(shape: ModelShape, placement: Placement) -> int:
    """Return what a rank holds of what it reads, beside the whole tensor that is made of it.

    These are a few rows; of experts a whole matrix, and the stored ones that are joined to it.
    """
    chunk = LOAD_CHUNK * (READ_BYTES + (QUANTIZE_BYTES if placement.quantized else 0))
    expert = max((out * in_ for _, out, in_ in shape.experts.values()), default=0)
    return chunk + 2 * expert * placement.dtype_bytes


def _dequantized_bytes(shape: ModelShape, placement: Placement) -> int:
    """Return a layer's or an expert's dequantized matrix, with its scales in fp32."""
    if not placement.quantized:
        return 0
    sides = [*shape.layers.values(), *(sides[1:] for sides in shape.experts.values())]
    numel = max(out * in_ for out, in_ in sides)
    return numel * placement.dtype_bytes + numel // 64 * 4
