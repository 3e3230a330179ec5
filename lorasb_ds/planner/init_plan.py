"""The init's groups of layers, one pass each, and the memory that they take. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeAlias

# The layers of one pass -> None, or of a projection of experts, those whose gradients are wanted.
LayerGroup: TypeAlias = Mapping[str, range | None]

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


@dataclass(frozen=True)
class InitPlan:
    """Groups of layers whose gradients are held at the same time.

    Attributes:
        prefix: of the decoder blocks' names; None where groups cannot be cut between blocks.
        shard_bytes: gradients of the largest group, on the rank with most.
        backward_bytes: work on one layer in the backward pass, for the layer with most.
        svd_bytes: work on one layer in its decomposition, for the layer with most.
        boundary_bytes: hidden states stored between groups, on the rank with most.
        budget_bytes: --init-memory-gib; None without a limit.
    """

    groups: tuple[LayerGroup, ...]
    prefix: str | None
    shard_bytes: int
    backward_bytes: int
    svd_bytes: int
    boundary_bytes: int
    budget_bytes: int | None

    @property
    def workspace_bytes(self) -> int:
        """Return the most bytes that work on one layer takes."""
        return max(self.backward_bytes, self.svd_bytes)

    @property
    def predicted_bytes(self) -> int:
        """Return the peak of a rank beside base, activations and the finished basis."""
        return self.shard_bytes + self.workspace_bytes + self.boundary_bytes

    @property
    def exceeds_budget(self) -> bool:
        return self.budget_bytes is not None and self.predicted_bytes > self.budget_bytes

    def blocks_of_groups(self, num_blocks: int) -> list[int]:
        """Return how many blocks are run for each group, as ``segments.cut_segments`` has it."""
        if self.prefix is None or len(self.groups) == 1:
            return [num_blocks] * len(self.groups)
        firsts = [min(block_of(name, self.prefix) for name in group) for group in self.groups]
        starts = [*sorted(set(firsts)), num_blocks]
        lengths = {start: end - start for start, end in pairwise(starts)}
        return [lengths[first] for first in firsts]


def plan_init(
    targets: Mapping[str, tuple[int, int]],
    *,
    r: int,
    world_size: int,
    update: str,
    tokens_per_micro_batch: int,
    boundary_bytes: int,
    budget_bytes: int | None,
    experts: Mapping[str, tuple[int, int, int]] | None = None,
    expert_r: int = 0,
) -> InitPlan:
    """Plan as few groups as the budget allows; where none fits, those that take least.

    A layer is never divided; a projection's experts are, where the block does not fit.

    Args:
        targets: layer -> (out, in), in the model's order.
        r: the rank of the SVD.
        update: of the gradient, as --init-update.
        tokens_per_micro_batch: at most. A layer's inputs and output gradients are fp32.
        boundary_bytes: hidden states of the whole sample, on the rank with most.
        budget_bytes: for ``predicted_bytes``; None: no limit, one group.
        experts: projections of experts with an adapter -> (experts, out, in).
        expert_r: as r, of an expert.
    """
    experts = experts or {}
    tokens = tokens_per_micro_batch
    works = [_backward_bytes(*shape, world_size, tokens) for shape in set(targets.values())]
    works += [
        _experts_backward_bytes(*shape, world_size, tokens) for shape in set(experts.values())
    ]
    backward = max(works, default=0)
    svd = largest_svd_bytes(targets, experts, r, expert_r, world_size, update)
    workspace = max(backward, svd)
    prefix = blocks_prefix([*targets, *experts])
    # Of experts one for each rank.
    sizes: dict[_Part, int] = {
        (name, None): _shard_bytes(*shape, world_size) for name, shape in targets.items()
    }
    for name, (num_experts, out, in_) in experts.items():
        for first in range(0, num_experts, world_size):
            owned = range(first, min(first + world_size, num_experts))
            sizes[name, owned] = out * in_ * FP32_BYTES
    parts = list(sizes)
    units = [[part] for part in parts]
    if prefix is not None:
        # Experts behind their block's layers.
        parts.sort(key=lambda part: block_of(part[0], prefix))
        units = [list(unit) for _, unit in groupby(parts, lambda part: block_of(part[0], prefix))]

    def stored_bytes(num_groups: int) -> int:
        """Count the inputs of all segments but the first, and gradients at both ends of one."""
        if prefix is None or num_groups == 1:
            return 0
        return (min(num_groups, len(units)) + 1) * boundary_bytes

    def plan_of(groups: Sequence[Sequence[_Part]]) -> InitPlan:
        return InitPlan(
            groups=tuple(map(_joined, groups)),
            prefix=prefix,
            shard_bytes=max(sum(sizes[part] for part in group) for group in groups),
            backward_bytes=backward,
            svd_bytes=svd,
            boundary_bytes=stored_bytes(len(groups)),
            budget_bytes=budget_bytes,
        )

    plan = plan_of([parts])
    if budget_bytes is None or not plan.exceeds_budget:
        return plan
    # What is stored between groups takes part of the budget, and more groups store more: where
    # the groups that fit into the rest are more than assumed, try their number next.
    number, largest = 2, max(sizes.values())
    while (room := budget_bytes - workspace - stored_bytes(number)) >= largest:
        fitting = plan_of(_fill(units, sizes, room))
        if not fitting.exceeds_budget:
            return fitting
        number = max(number + 1, len(fitting.groups))
    # Nothing fits. Beyond some number of groups more of them take more: try several sizes.
    rooms = {largest, *(plan.shard_bytes // n for n in range(2, 33))}
    plans = [plan, *(plan_of(_fill(units, sizes, room)) for room in sorted(rooms))]
    return min(plans, key=lambda plan: (plan.predicted_bytes, len(plan.groups)))


def takes_gram_way(short_side: int, r: int) -> bool:
    """Tell whether several ranks decompose a layer by its Gram matrix."""
    return short_side <= max(GRAM_SIDE_SHARED, GRAM_SHARE * r)


def blocks_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix shared by all names, such as ``model.layers.``; None if there is none."""
    prefixes = {match[1] if (match := re.match(r"(.*?\.)\d+\.", name)) else None for name in names}
    return prefixes.pop() if len(prefixes) == 1 else None


def block_of(name: str, prefix: str) -> int:
    """Return the number of a layer's block."""
    return int(name.removeprefix(prefix).partition(".")[0])


# A layer, or some experts of a projection.
_Part: TypeAlias = tuple[str, range | None]


def _joined(parts: Iterable[_Part]) -> LayerGroup:
    """Return parts that follow one another as a group."""
    group: dict[str, range | None] = {}
    for name, experts in parts:
        if experts is not None and (before := group.get(name)) is not None:
            experts = range(before.start, experts.stop)
        group[name] = experts
    return group


def _fill(
    units: Iterable[Sequence[_Part]], sizes: Mapping[_Part, int], available: int
) -> list[list[_Part]]:
    """Fill groups with whole units; one that is too large by itself is divided into parts."""
    groups: list[list[_Part]] = []
    room = -1
    for unit in units:
        size = sum(sizes[part] for part in unit)
        if size <= room:
            groups[-1] += unit
            room -= size
        elif size <= available or len(unit) == 1:
            groups.append(list(unit))
            room = available - size
        else:
            groups += _fill([[part] for part in unit], sizes, available)
            room = -1
    return groups


def _shard_bytes(out_features: int, in_features: int, world_size: int) -> int:
    long_side, short_side = max(out_features, in_features), min(out_features, in_features)
    return -(-long_side // world_size) * short_side * FP32_BYTES


def _backward_bytes(out_features: int, in_features: int, world_size: int, tokens: int) -> int:
    """Count one layer's fp32 x and δ, and a block of ``δᵀx``."""
    shard = _shard_bytes(out_features, in_features, world_size)
    return tokens * (out_features + in_features) * FP32_BYTES + shard


def _experts_backward_bytes(
    num_experts: int, out_features: int, in_features: int, world_size: int, tokens: int
) -> int:
    """Count one expert's fp32 x and δ, of all tokens at most, and a block of experts' ``δᵀx``."""
    expert = out_features * in_features * FP32_BYTES
    at_once = min(-(-num_experts // world_size), max(1, EXPERT_GRADIENT_BYTES // expert))
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
        experts_svd_bytes(*shape, expert_r, world_size, update) for shape in set(experts.values())
    ]
    return max(works, default=0)


def experts_svd_bytes(
    num_experts: int, out_features: int, in_features: int, r: int, world_size: int, update: str
) -> int:
    """Return what decomposing a rank's experts takes (``batched_svd``), with their updates."""
    local, numel = -(-num_experts // world_size), out_features * in_features
    at_once = min(local, max(1, EXPERT_SVD_ENTRIES // numel))
    # Beside the gradients: their sum. Without: W of a rank's experts, as read and as decomposed.
    kept = 2 * local if update == "weight" else 1
    # U and Vh: a rank's, all of them on rank 0, and the factors made of them.
    factors = 3 * FP32_BYTES * num_experts * r * (out_features + in_features)
    return (at_once * SVD_BYTES[update] + kept * FP32_BYTES) * numel + factors


def svd_bytes(out_features: int, in_features: int, r: int, world_size: int, update: str) -> int:
    """Return what decomposing one layer takes (``sharded_svd``), with ``world_size`` updates."""
    shard = _shard_bytes(out_features, in_features, world_size)
    short_side, both_sides = min(out_features, in_features), out_features + in_features
    # int8 signs multiplied in bf16, or fp32 numbers in fp64.
    signs = update == "sign"
    updates = world_size * (shard // 4 if signs else shard)
    products = shard // 2 if signs else 2 * shard
    gram = 0
    if takes_gram_way(short_side, r):
        gram = (20 if signs else 40) * short_side**2
    return updates + max(products, gram) + 32 * r * both_sides
