"""What the init phase will hold in memory, and in how many passes it is done. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

FP32_BYTES = 4


@dataclass(frozen=True)
class InitPlan:
    """Groups of layers, of which the gradients are held at the same time."""

    groups: tuple[tuple[str, ...], ...]
    prefix: str | None  # of the names of decoder blocks, where groups can be cut between them
    shard_bytes: int  # of the largest group, on the rank with most
    workspace_bytes: int  # of the layer with most
    boundary_bytes: int  # of what is stored between groups, on the rank with most
    budget_bytes: int | None

    @property
    def predicted_bytes(self) -> int:
        """The most that a rank holds at a time beside base, activations and the finished basis."""
        return self.shard_bytes + self.workspace_bytes + self.boundary_bytes

    @property
    def exceeds_budget(self) -> bool:
        return self.budget_bytes is not None and self.predicted_bytes > self.budget_bytes


def plan_init(
    targets: Mapping[str, tuple[int, int]],
    *,
    r: int,
    world_size: int,
    tokens_per_micro_batch: int,
    boundary_bytes: int,
    budget_bytes: int | None,
) -> InitPlan:
    """As few groups as the budget allows; a layer is never divided.

    Args:
        targets: layer -> (out, in), in the model's order.
        tokens_per_micro_batch: at most; the layer's inputs and output gradients are worked on
            in fp32.
        boundary_bytes: hidden states of the whole sample, on the rank with most.
    """
    workspace = max(
        _workspace_bytes(*shape, r, world_size, tokens_per_micro_batch)
        for shape in targets.values()
    )
    sizes = {name: _shard_bytes(*shape, world_size) for name, shape in targets.items()}
    prefix = blocks_prefix(targets)
    units = [[name] for name in targets]
    if prefix is not None:
        units = [list(unit) for _, unit in groupby(targets, lambda name: block_of(name, prefix))]

    groups, stored = [list(targets)], 0
    if budget_bytes is not None and sum(sizes.values()) + workspace > budget_bytes:
        # What is stored between groups takes from the budget, too: the more groups, the more.
        for expected in range(2, len(targets) + 1):
            # The inputs of all segments but the first; gradients at both ends of one.
            segments = min(expected, len(units)) if prefix is not None else -1
            stored = (segments + 1) * boundary_bytes
            groups = _fill(units, sizes, budget_bytes - workspace - stored)
            if len(groups) <= expected:
                break
    return InitPlan(
        groups=tuple(map(tuple, groups)),
        prefix=prefix,
        shard_bytes=max(sum(sizes[name] for name in group) for group in groups),
        workspace_bytes=workspace,
        boundary_bytes=stored if len(groups) > 1 else 0,
        budget_bytes=budget_bytes,
    )


def blocks_prefix(names: Iterable[str]) -> str | None:
    """``model.layers.`` of ``model.layers.3.mlp.up_proj``; None unless all names share it."""
    prefixes = {match[1] if (match := re.match(r"(.*?\.)\d+\.", name)) else None for name in names}
    return prefixes.pop() if len(prefixes) == 1 else None


def block_of(name: str, prefix: str) -> int:
    """The number of the block that a layer lies in."""
    return int(name.removeprefix(prefix).partition(".")[0])


def _fill(
    units: Iterable[Sequence[str]], sizes: Mapping[str, int], available: int
) -> list[list[str]]:
    """Whole units while they fit; one that is too large by itself is taken layer by layer."""
    groups: list[list[str]] = []
    room = -1
    for unit in units:
        size = sum(sizes[name] for name in unit)
        if size <= room:
            groups[-1] += unit
            room -= size
        elif size <= available or len(unit) == 1:
            groups.append(list(unit))
            room = available - size
        else:
            groups += _fill([[name] for name in unit], sizes, available)
            room = -1
    return groups


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
