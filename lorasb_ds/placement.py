"""Where the base lies and in which form: what a ds_config and the options say of it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Form = Literal["fp32", "bf16", "nf4", "int8"]


@dataclass(frozen=True)
class Placement:
    """One way to hold the base on a job's ranks. Numbers of DeepSpeed's count stored elements."""

    form: Form
    world_size: int
    stage: int = 3
    offload: Literal["none", "cpu", "nvme"] = "none"
    shard_ranks: int = 1  # that hold one copy of the base together; 1 below stage 3
    secondary_ranks: int = 1  # ZeRO++: that hold a second copy together, within a node
    max_live_parameters: int = 0
    prefetch_bucket_size: int = 0
    persistence_threshold: int = 0
    reduce_bucket_size: int = 0
    nvme_buffer_elements: int = 0

    @property
    def sharded(self) -> bool:
        return self.stage == 3

    @property
    def dtype_bytes(self) -> int:
        """Of the numbers that are computed with."""
        return 4 if self.form == "fp32" else 2

    def stored(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Bytes of a linear layer's weight as it is kept: of its numbers, and of their scales.

        NF4 with double quantization (QLoRA, arXiv 2305.14314): half a byte for each number, one
        for every 64 of them, 4 for every 256 of those and 4 for the layer. 8 bits: a byte for
        each number, 4 for every row. Both lie in one vector of even length (quantization.py).
        """
        out_features, in_features = shape
        numel = out_features * in_features
        if self.form == "nf4":
            numbers, blocks = -(-numel // 2), -(-numel // 64)
            scales = blocks + 4 * -(-blocks // 256) + 4
        elif self.form == "int8":
            numbers, scales = numel, 4 * out_features
        else:
            return numel * self.dtype_bytes, 0
        return numbers, scales + (numbers + scales) % 2


def placement_of(ds_config: Mapping[str, Any], form: Form, world_size: int) -> Placement:
    """What a resolved ds_config makes of a base. What it does not say is DeepSpeed's default.

    Defaults: DeepSpeedZeroConfig (deepspeed/runtime/zero/config.py), OffloadParam's.
    """
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    offload = zero.get("offload_param") or {}
    return Placement(
        form=form,
        world_size=world_size,
        stage=stage,
        offload=offload.get("device", "none") if stage == 3 else "none",
        shard_ranks=world_size if stage == 3 else 1,
        secondary_ranks=zero.get("zero_hpz_partition_size", 1) if stage == 3 else 1,
        max_live_parameters=int(zero.get("stage3_max_live_parameters", 1e9)),
        prefetch_bucket_size=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        reduce_bucket_size=int(zero.get("reduce_bucket_size", 5e8)),
        nvme_buffer_elements=int(offload.get("buffer_count", 5) * offload.get("buffer_size", 1e8)),
    )
