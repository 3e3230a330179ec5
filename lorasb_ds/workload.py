"""What is computed, as far as bytes and messages depend on it. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """What is computed: the adapter, the batches and the init's sample."""

    targets: Mapping[str, tuple[int, int]]  # layers with an adapter
    r: int
    max_length: int  # tokens of the longest row
    num_labels: int  # positions of a micro-batch from which some row predicts a label, at most
    micro_batch_size: int
    gradient_checkpointing: bool
    init_samples: int  # rows of the gradient
    init_memory_bytes: int | None = None
    init_update: str = "sign"
    init_offload: bool = False

    @property
    def tokens(self) -> int:
        """Of a rank's micro-batch."""
        return self.micro_batch_size * self.max_length

    @property
    def num_trainable(self) -> int:
        return len(self.targets) * self.r**2

    def init_rounds(self, world_size: int) -> int:
        """Micro-batches of each rank in the init: rows are dealt out in those."""
        return -(-self.init_samples // (self.micro_batch_size * world_size))
