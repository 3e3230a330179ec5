"""What the init phase will hold in memory, and in how many passes it is done. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FP32_BYTES = 4


@dataclass(frozen=True)
class InitPlan:
    """Groups of layers, each taken in one pass over the sample."""

    groups: tuple[tuple[str, ...], ...]
    shard_bytes: int  # of the largest group, on the rank with most
    workspace_bytes: int  # of the layer with most
    budget_bytes: int | None

    @property
    def predicted_bytes(self) -> int:
        """The most that a rank holds at a time beside base, activations and the finished basis."""
        return self.shard_bytes + self.workspace_bytes

    @property
    def exceeds_budget(self) -> bool:
        return self.budget_bytes is not None and self.predicted_bytes > self.budget_bytes


def plan_init(
    targets: Mapping[str, tuple[int, int]],
    *,
    r: int,
    world_size: int,
    tokens_per_micro_batch: int,
    budget_bytes: int | None,
) -> InitPlan:
    """Put as many layers into every pass as the budget allows; one layer always is taken.

    Groups are filled from the model's first layer on: a pass ends its backward at the lowest layer
    of its group, and so the last one, which is left over, is the shallowest.

    Args:
        targets: layer -> (out, in), in the model's order.
        tokens_per_micro_batch: at most; the layer's inputs and output gradients are worked on
            in fp32.
    """
    workspace = max(
        _workspace_bytes(*shape, r, world_size, tokens_per_micro_batch)
        for shape in targets.values()
    )
    sizes = {name: _shard_bytes(*shape, world_size) for name, shape in targets.items()}
    available = None if budget_bytes is None else budget_bytes - workspace
    groups: list[list[str]] = [[]]
    for name, size in sizes.items():
        used = sum(sizes[other] for other in groups[-1])
        if groups[-1] and available is not None and used + size > available:
            groups.append([])
        groups[-1].append(name)
    return InitPlan(
        groups=tuple(map(tuple, groups)),
        shard_bytes=max(sum(sizes[name] for name in group) for group in groups),
        workspace_bytes=workspace,
        budget_bytes=budget_bytes,
    )


def _shard_bytes(out_features: int, in_features: int, world_size: int) -> int:
    long_side, short_side = max(out_features, in_features), min(out_features, in_features)
    return -(-long_side // world_size) * short_side * FP32_BYTES


def _workspace_bytes(
    out_features: int, in_features: int, r: int, world_size: int, tokens: int
) -> int:
    """Of one layer: in the backward pass its fp32 x and δ and a block of ``δᵀx``; in the SVD the
    signs as int8, their fp32 copy, and vectors of both sides (see ``linalg``)."""
    shard = _shard_bytes(out_features, in_features, world_size)
    backward = tokens * (out_features + in_features) * FP32_BYTES + shard
    decomposition = shard + shard // FP32_BYTES + 4 * r * (out_features + in_features) * FP32_BYTES
    return max(backward, decomposition)
