"""The adapter, the batches and the init's sample, as far as bytes depend on them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Workload:
    """What a run computes: the adapter, the batches and the init's sample."""

    targets: Mapping[str, tuple[int, int]]  # layers with an adapter
    r: int
    max_length: int  # tokens of the longest row
    num_labels: int  # most positions of a micro-batch from which some row predicts a label
    micro_batch_size: int
    gradient_checkpointing: bool
    init_samples: int  # rows of the gradient
    activation_offload: bool = False  # the inputs of blocks are in host memory
    sequence_parallel: int = 1  # ranks that compute a row together
    init_micro_batch_size: int | None = None  # [default: micro_batch_size]
    init_memory_bytes: int | None = None
    init_update: str = "sign"
    init_offload: bool = False
    trains_r: bool = True  # else A and B
    offset: bool = False  # a layer has two more frozen factors like A and B
    max_kept: int = 0  # updates in earlier bases that a layer has room for (--rebase-every)
    directions: int = 1  # of the init's SVD, times r
    tracks_gradient: bool = False  # in training, too (--track-alignment)
    decomposes: str = "gradient"  # in the init; or "weight", or "nothing"
    whole_matrices: bool = False  # the optimizer works on them (matrix_optimizer.py)
    # Elements of every trained parameter where PEFT's configuration decides which there are, and
    # of everything else that its layers keep.
    trained_sizes: tuple[int, ...] | None = None
    num_kept: int = 0
    # Projections of experts with an adapter, in which every expert has factors of its own.
    expert_targets: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    expert_r: int = 0
    head_size: int = 0  # elements of a classification head, which is trained, too
    # Layer -> its rank, of those that have another than r (--rank-allocation).
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def adapted(self) -> list[str]:
        """Return the names of all layers and projections with an adapter."""
        return [*self.targets, *self.expert_targets]

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer's adapter."""
        return self.ranks.get(layer, self.r)

    @property
    def piece_length(self) -> int:
        """Return the tokens of the longest row that a rank computes."""
        return -(-self.max_length // self.sequence_parallel)

    @property
    def tokens(self) -> int:
        """Return the tokens of a rank's micro-batch."""
        return self.micro_batch_size * self.piece_length

    @property
    def in_init(self) -> Workload:
        """Return the workload with the init's micro-batches."""
        return replace(self, micro_batch_size=self.init_micro_batch_size or self.micro_batch_size)

    @property
    def svd_r(self) -> int:
        """Return how many singular vectors the init takes of a layer, at most."""
        return max(map(self.rank_of, self.targets), default=self.r) * self.directions

    @property
    def svd_update(self) -> str:
        """Return what the init decomposes: "weight", or an update of the gradient."""
        return "weight" if self.decomposes == "weight" else self.init_update

    @property
    def pairs(self) -> int:
        """Return how many pairs of factors like A and B a layer has."""
        return 1 + self.offset + self.max_kept

    @property
    def num_trainable(self) -> int:
        """Return the number of trained elements."""
        if self.trained_sizes is not None:
            return sum(self.trained_sizes)
        if self.trains_r:
            num_experts = sum(n for n, _, _ in self.expert_targets.values())
            in_factors = sum(self.rank_of(name) ** 2 for name in self.targets)
            return in_factors + num_experts * self.expert_r**2 + self.head_size
        return self.num_in_pairs + self.head_size

    @property
    def num_in_pairs(self) -> int:
        """Return the elements of one pair of factors like A and B, of all layers and experts."""
        layers = sum(self.rank_of(name) * sum(sides) for name, sides in self.targets.items())
        return layers + self.num_in_expert_pairs

    @property
    def num_in_expert_pairs(self) -> int:
        """Return the elements of one pair of factors like A and B, of all experts."""
        return sum(
            num_experts * self.expert_r * (out + in_)
            for num_experts, out, in_ in self.expert_targets.values()
        )

    def init_rounds(self, world_size: int) -> int:
        """Return the micro-batches that each rank computes in the init."""
        rows = self.in_init.micro_batch_size * world_size // self.sequence_parallel
        return -(-self.init_samples // rows)
