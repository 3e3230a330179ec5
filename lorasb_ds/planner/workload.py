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
    trains_r: bool = True  # or A and B
    offset: bool = False  # of two more factors like A and B, frozen
    directions: int = 1  # of the init's SVD, times r
    tracks_gradient: bool = False  # while it trains (--track-alignment)
    decomposes: str = "gradient"  # in the init; or "weight", or "nothing"
    whole_matrices: bool = False  # the optimizer's (matrix_optimizer.py)
    # Numbers of every parameter that is trained, where PEFT's configuration says which there are,
    # and of all that its layers keep beside them.
    trained_sizes: tuple[int, ...] | None = None
    num_kept: int = 0

    @property
    def tokens(self) -> int:
        """Of a rank's micro-batch."""
        return self.micro_batch_size * self.max_length

    @property
    def pairs(self) -> int:
        """Factors like A and B of a layer, by twos."""
        return 2 if self.offset else 1

    @property
    def num_trainable(self) -> int:
        """Numbers."""
        if self.trained_sizes is not None:
            return sum(self.trained_sizes)
        if self.trains_r:
            return len(self.targets) * self.r**2
        return sum(self.r * (out + in_) for out, in_ in self.targets.values())

    def init_rounds(self, world_size: int) -> int:
        """Micro-batches of each rank in the init: rows are dealt out in those."""
        return -(-self.init_samples // (self.micro_batch_size * world_size))
