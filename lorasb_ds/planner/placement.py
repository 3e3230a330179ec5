"""How a ds_config and the options hold the base: its form, its shards, offloading. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["fp32", "fp16", "bf16", "nf4", "int8"]

# bitsandbytes' defaults: QLoRA's block of weights (arXiv 2305.14314), and a block of their scales.
BLOCKSIZE, NESTED_BLOCKSIZE = 64, 256
EXPERT_ALIGNMENT = 16  # of a packed expert's bytes, since GPU kernels read so many at a time


@dataclass(frozen=True)
class Placement:
    """One way to hold the base on a job's ranks.

    DeepSpeed's numbers (from ``max_live_parameters`` on) count stored elements.
    """

    form: Form
    world_size: int
    stage: int = 3
    offload: Literal["none", "cpu", "nvme"] = "none"
    secondary_ranks: int = 1  # ZeRO++: ranks of a node that share a second copy
    max_live_parameters: int = 0
    prefetch_bucket_size: int = 0
    persistence_threshold: int = 0
    reduce_bucket_size: int = 0
    nvme_buffer_elements: int = 0

    @property
    def sharded(self) -> bool:
        return self.stage == 3

    @property
    def shard_ranks(self) -> int:
        """Return how many ranks share one copy of the base."""
        return self.world_size if self.sharded else 1

    @property
    def quantized(self) -> bool:
        return self.form in ("nf4", "int8")

    @property
    def dtype_bytes(self) -> int:
        """Return the bytes of an element in the compute dtype."""
        return 4 if self.form == "fp32" else 2

    def stored(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the bytes of a stored (out, in) weight and of its scales.

        Where it is quantized, their sum is padded to an even number (quantization.py).
        """
        if self.form == "nf4":
            numbers, *scales = bytes_4bit(*shape)
        elif self.form == "int8":
            numbers, *scales = bytes_8bit(*shape)
        else:
            return shape[0] * shape[1] * self.dtype_bytes, 0
        return numbers, sum(scales) + (numbers + sum(scales)) % 2

    def stored_experts(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Return the bytes of a stored (experts, out, in) weight and of its scales.

        Each expert is quantized by itself, and padded to ``EXPERT_ALIGNMENT`` (experts.py).
        """
        num_experts, *sides = shape
        numbers, scales = self.stored((sides[0], sides[1]))
        if self.quantized:
            scales += -(numbers + scales) % EXPERT_ALIGNMENT
        return num_experts * numbers, num_experts * scales


def bytes_4bit(
    out_features: int, in_features: int, blocksize: int = BLOCKSIZE, nested: bool = True
) -> list[int]:
    """Return the bytes of each part of a 4-bit weight (QLoRA, arXiv 2305.14314).

    An element takes half a byte. With double quantization (``nested``) every block of elements
    takes one more, every 256 blocks 4 and the layer 4; without it every block takes 4.
    """
    numel = out_features * in_features
    blocks = -(-numel // blocksize)
    scales = [blocks, 4 * -(-blocks // NESTED_BLOCKSIZE), 4] if nested else [4 * blocks]
    return [-(-numel // 2), *scales]


def bytes_8bit(out_features: int, in_features: int) -> list[int]:
    """Return the bytes of each part of an 8-bit weight: one for an element, 4 for a row."""
    return [out_features * in_features, 4 * out_features]


def placement_of(ds_config: Mapping[str, Any], form: Form, world_size: int) -> Placement:
    """Return how a resolved ds_config holds a base.

    What it leaves out has the default of DeepSpeed's DeepSpeedZeroConfig
    (deepspeed/runtime/zero/config.py) and of its OffloadParam.
    """
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    offload = zero.get("offload_param") or {}
    return Placement(
        form=form,
        world_size=world_size,
        stage=stage,
        offload=offload.get("device", "none") if stage == 3 else "none",
        secondary_ranks=zero.get("zero_hpz_partition_size", 1) if stage == 3 else 1,
        max_live_parameters=int(zero.get("stage3_max_live_parameters", 1e9)),
        prefetch_bucket_size=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        reduce_bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
        nvme_buffer_elements=int(offload.get("buffer_count", 5) * offload.get("buffer_size", 1e8)),
    )
