"""The init's groups of layers, one pass each, and the memory that they take. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import TypeAlias

from lorasb_ds.planner.init_bytes import (
    FP32_BYTES,
    backward_bytes,
    experts_backward_bytes,
    experts_svd_bytes,
    largest_svd_bytes,
    shard_bytes,
)

# Layers whose gradients are held at the same time -> None; projections of experts -> those of their
# experts.
LayerGroup: TypeAlias = Mapping[str, range | None]

# Where no plan fits: about how often a block is run, and how far above the least memory a plan with
# fewer passes may be.
MOST_PASSES, NEAR = 16, 1.25


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
        passes: how often a block is run forward and backward over the sample, on average.
    """

    groups: tuple[LayerGroup, ...]
    prefix: str | None
    shard_bytes: int
    backward_bytes: int
    svd_bytes: int
    boundary_bytes: int
    budget_bytes: int | None
    passes: float = 1.0

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


@dataclass(frozen=True)
class InitWork:
    """What an init decomposes, and on how many ranks.

    Attributes:
        targets: layer -> (out, in), in the model's order.
        r: the rank of the SVD.
        update: of the gradient, as --init-update.
        tokens_per_micro_batch: at most. A layer's inputs and output gradients are fp32.
        boundary_bytes: hidden states of the whole sample, on the rank with most.
        offload: gradients are in host memory, and on the device only while they are decomposed.
        experts: projections of experts with an adapter -> (experts, out, in).
        expert_r: as r, of an expert.
    """

    targets: Mapping[str, tuple[int, int]]
    r: int
    world_size: int
    update: str
    tokens_per_micro_batch: int
    boundary_bytes: int
    offload: bool = False
    experts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    expert_r: int = 0

    @cached_property
    def prefix(self) -> str | None:
        return blocks_prefix([*self.targets, *self.experts])

    @cached_property
    def blocks(self) -> list[tuple[LayerGroup, int]]:
        """Each block's layers, and experts behind them, with the bytes of their gradients.

        Each layer by itself where there are no blocks.
        """
        whole: dict[str, range | None] = dict.fromkeys(self.targets)
        whole |= {name: range(shape[0]) for name, shape in self.experts.items()}
        if (prefix := self.prefix) is None:
            blocks = [dict([item]) for item in whole.items()]
        else:
            items = sorted(whole.items(), key=lambda item: block_of(item[0], prefix))
            blocks = [dict(of) for _, of in groupby(items, lambda item: block_of(item[0], prefix))]
        return [(block, sum(self.size(*item) for item in block.items())) for block in blocks]

    @cached_property
    def least_bytes(self) -> int:
        """The gradient of the largest layer, or one expert of a rank."""
        return max(self._unit_bytes.values())

    @cached_property
    def _unit_bytes(self) -> dict[str, int]:
        """Bytes of a layer's gradient on the rank with most rows, or of one expert's."""
        units = {name: shard_bytes(*s, self.world_size) for name, s in self.targets.items()}
        return units | {name: o * i * FP32_BYTES for name, (_, o, i) in self.experts.items()}

    def local(self, num_experts: int) -> int:
        """Return how many of some experts the rank with most has."""
        return -(-num_experts // self.world_size)

    def size(self, name: str, experts: range | None) -> int:
        """Return the bytes of gradients of a layer, or some experts, on the rank with most."""
        times = 1 if experts is None else self.local(len(experts))
        return times * self._unit_bytes[name]

    def stored_bytes(self, num_groups: int) -> int:
        """Count the inputs of all segments but the first, and gradients at both ends of one."""
        if self.prefix is None or num_groups == 1:
            return 0
        return (min(num_groups, len(self.blocks)) + 1) * self.boundary_bytes

    @cached_property
    def _layer_bytes(self) -> tuple[int, int]:
        shapes = set(self.targets.values())
        ranks, tokens = self.world_size, self.tokens_per_micro_batch
        backward = max((backward_bytes(*shape, ranks, tokens) for shape in shapes), default=0)
        svd = largest_svd_bytes(self.targets, {}, self.r, 0, ranks, self.update)
        if self.offload:  # one layer for each rank at a time
            svd += ranks * max((shard_bytes(*shape, ranks) for shape in shapes), default=0)
        return backward, svd

    def work_bytes(self, at_once: int) -> tuple[int, int]:
        """Return the most that work on one layer takes in the backward pass, and in its SVD.

        Args:
            at_once: the most experts of a projection that a rank has in a group.
        """
        backward, svd = self._layer_bytes
        for num_experts, out, in_ in set(self.experts.values()):
            local, one = min(at_once, self.local(num_experts)), out * in_ * FP32_BYTES
            work = experts_backward_bytes(local, out, in_, self.tokens_per_micro_batch)
            work_svd = experts_svd_bytes(local, num_experts, out, in_, self.expert_r, self.update)
            if local < self.local(num_experts):
                # Of a projection that other groups go on with: its gradients' sum, and its SVDs.
                work += one + FP32_BYTES * num_experts * self.expert_r * (out + in_)
                work_svd += one
            backward = max(backward, work)
            svd = max(svd, work_svd + self.offload * local * one)
        return backward, svd


class _Groups:
    """Groups of layers, with the bytes of the largest and the most experts in one."""

    def __init__(self, work: InitWork) -> None:
        self.work = work
        self.groups: list[dict[str, range | None]] = []
        self.most_bytes = self.most_experts = self._last = 0
        self.runs = 0  # of blocks, once for each of their groups

    def begin(self) -> None:
        self.groups.append({})
        self._last = 0

    def add(self, layers: LayerGroup, size: int) -> None:
        """Add layers to the last group."""
        self.groups[-1].update(layers)
        self._last += size
        self.most_bytes = max(self.most_bytes, self._last)
        experts = [self.work.local(len(part)) for part in layers.values() if part is not None]
        self.most_experts = max(self.most_experts, *experts, 0)

    def fill(self, available: int, at_once: int) -> _Groups:
        """Fill groups with whole blocks; one that is too large by itself is divided.

        Args:
            available: bytes for a group's gradients, at least ``work.least_bytes``.
            at_once: the most experts of a projection that a rank has in a group.
        """
        is_open = False  # for another block
        for block, size in self.work.blocks:
            parts = [self.work.local(len(part)) for part in block.values() if part is not None]
            if size > available or max(parts, default=0) > at_once:
                self._divide(block, available, at_once)
                is_open = False
                continue
            if not is_open or self._last + size > available:
                self.begin()
            self.add(block, size)
            self.runs += 1
            is_open = True
        return self

    def _divide(self, block: LayerGroup, available: int, at_once: int) -> None:
        """Fill groups with the layers of a block, and with as many experts as there is room for."""
        before = len(self.groups)
        self.begin()
        for name, rest in block.items():
            if rest is None:
                size = self.work.size(name, None)
                if self._last + size > available:
                    self.begin()
                self.add({name: None}, size)
            while rest:
                one = self.work.size(name, rest[:1])
                if self._last + one > available or name in self.groups[-1]:
                    self.begin()
                local = min(at_once, (available - self._last) // one)
                part, rest = (
                    rest[: local * self.work.world_size],
                    rest[local * self.work.world_size :],
                )
                self.add({name: part}, self.work.size(name, part))
        self.runs += len(self.groups) - before

    def plan(self, budget_bytes: int | None) -> InitPlan:
        backward, svd = self.work.work_bytes(self.most_experts)
        return InitPlan(
            groups=tuple(self.groups),
            prefix=self.work.prefix,
            shard_bytes=self.most_bytes,
            backward_bytes=backward,
            svd_bytes=svd,
            boundary_bytes=self.work.stored_bytes(len(self.groups)),
            budget_bytes=budget_bytes,
            passes=len(self.groups)
            if self.work.prefix is None
            else self.runs / len(self.work.blocks),
        )


def plan_init(work: InitWork, budget_bytes: int | None) -> InitPlan:
    """Plan as few groups as the budget allows; where none fits, those that take about the least.

    A layer is never divided; a projection's experts are where its block does not fit.

    Args:
        budget_bytes: for ``predicted_bytes``; None: no limit, one group.
    """
    whole, most_experts = sum(size for _, size in work.blocks), 1
    if work.experts:
        most_experts = max(work.local(shape[0]) for shape in work.experts.values())
    plan = _Groups(work).fill(whole, most_experts).plan(budget_bytes)
    if budget_bytes is None or not plan.exceeds_budget:
        return plan
    before, at_once = None, most_experts
    while at_once:
        workspace = max(work.work_bytes(at_once))
        # What is stored between groups takes part of the budget, and more groups store more: where
        # the groups that fit into the rest are more than assumed, try their number next.
        number = 2 if workspace != before else len(work.blocks) + 1  # else the same again
        while number <= len(work.blocks) + 1:
            room = budget_bytes - workspace - work.stored_bytes(number)
            if room < work.least_bytes:
                break
            fitting = _Groups(work).fill(room, at_once).plan(budget_bytes)
            if not fitting.exceeds_budget:
                return fitting
            number = max(number + 1, len(fitting.groups))
        before, at_once = workspace, at_once // 2
    # Nothing fits. Beyond some number of groups more of them take more: try several sizes.
    plans = [plan]
    for at_once in {most_experts, -(-most_experts // MOST_PASSES)}:
        room = max(work.least_bytes, max(size for _, size in work.blocks) // MOST_PASSES)
        while room < whole:
            plans.append(_Groups(work).fill(room, at_once).plan(budget_bytes))
            room *= 4
    least = min(plan.predicted_bytes for plan in plans)
    near = [plan for plan in plans if plan.predicted_bytes <= NEAR * least]
    return min(near, key=lambda plan: (plan.passes, len(plan.groups), plan.predicted_bytes))


def blocks_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix shared by all names, such as ``model.layers.``; None if there is none."""
    prefixes = {match[1] if (match := re.match(r"(.*?\.)\d+\.", name)) else None for name in names}
    return prefixes.pop() if len(prefixes) == 1 else None


def block_of(name: str, prefix: str) -> int:
    """Return the number of a layer's block."""
    return int(name.removeprefix(prefix).partition(".")[0])
