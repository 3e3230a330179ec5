"""The init's groups of layers, one pass each, and the memory that they take. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from lorasb_ds.planner.init_bytes import (
    FP32_BYTES,
    backward_bytes,
    experts_backward_bytes,
    experts_svd_bytes,
    largest_svd_bytes,
    shard_bytes,
)
from lorasb_ds.planner.layer_groups import LayerGroup, block_of, blocks_prefix, cut_segments

# Where no plan fits, a projection's experts are divided into so many groups at most.
MOST_PASSES = 16


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
        """Return the peak of a rank beside base and activations."""
        return self.shard_bytes + self.workspace_bytes + self.boundary_bytes

    @property
    def exceeds_budget(self) -> bool:
        return self.budget_bytes is not None and self.predicted_bytes > self.budget_bytes

    @property
    def passes(self) -> float:
        """Return how often a block is run forward and backward over the sample, on average."""
        if self.prefix is None:
            return float(len(self.groups))
        blocks = [{block_of(name, self.prefix) for name in group} for group in self.groups]
        return sum(map(len, blocks)) / len(set().union(*blocks))

    def blocks_of_groups(self, num_blocks: int) -> list[int]:
        """Return how many blocks are run for each group."""
        if self.prefix is None or len(self.groups) == 1:
            return [num_blocks] * len(self.groups)
        segments = cut_segments(self.groups, self.prefix, num_blocks)
        return [segment.last + 1 - segment.first for segment in segments]


class _Layers(NamedTuple):
    """Layers of one group, the bytes of their gradients, and the most experts of a projection."""

    layers: LayerGroup
    size: int
    most_experts: int = 0


@dataclass(frozen=True)
class InitWork:
    """What an init decomposes, and on how many ranks.

    Attributes:
        targets: layer -> (out, in), in the model's order.
        r: the rank of the SVD.
        update: of the gradient, as --init-update.
        tokens_per_micro_batch: at most. A layer's inputs and output gradients are fp32.
        boundary_bytes: hidden states of the whole sample, on the rank with most.
        budget_bytes: that of ``plan_init``, of which one layer's SVD may take a share.
        dtype_bytes: of activations.
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
    budget_bytes: int | None = None
    dtype_bytes: int = 2
    offload: bool = False
    experts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    experts_per_token: int = 0
    expert_r: int = 0

    @cached_property
    def prefix(self) -> str | None:
        return blocks_prefix([*self.targets, *self.experts])

    @cached_property
    def blocks(self) -> list[_Layers]:
        """Each block's layers, experts last; each layer by itself where there are no blocks."""
        whole: dict[str, range | None] = dict.fromkeys(self.targets)
        whole |= {name: range(shape[0]) for name, shape in self.experts.items()}
        if (prefix := self.prefix) is None:
            blocks = [dict([item]) for item in whole.items()]
        else:
            items = sorted(whole.items(), key=lambda item: block_of(item[0], prefix))
            blocks = [dict(of) for _, of in groupby(items, lambda item: block_of(item[0], prefix))]
        return [self._layers(block) for block in blocks]

    def _layers(self, layers: LayerGroup) -> _Layers:
        experts = (self.local(len(part)) for part in layers.values() if part is not None)
        size = sum(self.size(*item) for item in layers.items())
        return _Layers(layers, size, max(experts, default=0))

    @cached_property
    def least_bytes(self) -> int:
        """The gradient of the largest layer, or one expert of a rank."""
        return max(self._unit_bytes.values())

    @cached_property
    def _unit_bytes(self) -> dict[str, int]:
        """Bytes of a layer's gradient on the rank with most rows, or of one expert's."""
        units = {name: shard_bytes(*s, self.world_size) for name, s in self.targets.items()}
        return units | {name: o * i * FP32_BYTES for name, (_, o, i) in self.experts.items()}

    @cached_property
    def most_experts(self) -> int:
        """The most experts of a projection that a rank has; 0 without."""
        return max(block.most_experts for block in self.blocks)

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
        works = [backward_bytes(*shape, ranks, tokens, self.dtype_bytes) for shape in shapes]
        backward = max(works, default=0)
        svd = largest_svd_bytes(self.targets, {}, self.r, 0, ranks, self.update, self.budget_bytes)
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
            tokens = self.tokens_per_micro_batch
            work = experts_backward_bytes(
                local,
                (num_experts, out, in_),
                self.world_size,
                tokens,
                tokens * self.experts_per_token,
                self.dtype_bytes,
            )
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

    def begin(self) -> None:
        self.groups.append({})
        self._last = 0

    def add(self, added: _Layers) -> None:
        """Add layers to the last group."""
        self.groups[-1].update(added.layers)
        self._last += added.size
        self.most_bytes = max(self.most_bytes, self._last)
        self.most_experts = max(self.most_experts, added.most_experts)

    def fill(self, available: int, at_once: int) -> _Groups:
        """Fill groups with whole blocks; one that is too large by itself is divided.

        Args:
            available: bytes for a group's gradients, at least ``work.least_bytes``.
            at_once: the most experts of a projection that a rank has in a group.
        """
        is_open = False  # for another block
        for block in self.work.blocks:
            fits = block.size <= available and block.most_experts <= at_once
            if not (fits and is_open and self._last + block.size <= available):
                self.begin()
            if fits:
                self.add(block)
            else:
                self._divide(block.layers, available, at_once)
            is_open = fits
        return self

    def _divide(self, block: LayerGroup, available: int, at_once: int) -> None:
        """Fill groups with the layers of a block, and with as many experts as there is room for."""
        ranks = self.work.world_size
        for name, rest in block.items():
            if rest is None:
                size = self.work.size(name, None)
                if self._last + size > available:
                    self.begin()
                self.add(_Layers({name: None}, size))
            while rest:
                one = self.work.size(name, rest[:1])
                if self._last + one > available or name in self.groups[-1]:
                    self.begin()
                number = min(at_once, (available - self._last) // one) * ranks
                local = self.work.local(len(rest[:number]))
                self.add(_Layers({name: rest[:number]}, local * one, local))
                rest = rest[number:]

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
        )


def plan_init(work: InitWork, budget_bytes: int | None) -> InitPlan:
    """Plan as few groups as the budget allows; where none fits, those that take least.

    A layer is never divided; a projection's experts are where its block does not fit.

    Args:
        budget_bytes: for ``predicted_bytes``; None: no limit, one group.
    """

    work = replace(work, budget_bytes=budget_bytes)

    def plan_of(available: int, at_once: int) -> InitPlan:
        return _Groups(work).fill(available, at_once).plan(budget_bytes)

    whole = sum(block.size for block in work.blocks)
    plan = plan_of(whole, work.most_experts)
    if budget_bytes is None or not plan.exceeds_budget:
        return plan
    for at_once, workspace in _workspaces(work):
        # What is stored between groups takes part of the budget, and more groups store more, up to
        # one for each block: where the groups that fit into the rest are more than assumed, try
        # their number next.
        number, most = 2, max(2, len(work.blocks))
        while number <= most:
            room = budget_bytes - workspace - work.stored_bytes(number)
            if room < work.least_bytes:
                break
            fitting = plan_of(room, at_once)
            if not fitting.exceeds_budget:
                return fitting
            number = max(number + 1, min(most, len(fitting.groups)))
    # Nothing fits. Beyond some number of groups more of them take more: try several sizes.
    plans, smallest = [plan], work.least_bytes
    if work.experts:
        smallest += max(block.size for block in work.blocks) // MOST_PASSES
    for at_once in {work.most_experts, -(-work.most_experts // MOST_PASSES)}:
        room = smallest
        while room < whole:
            plans.append(plan_of(room, at_once))
            room *= 2
    return min(plans, key=lambda plan: (plan.predicted_bytes, len(plan.groups)))


def _workspaces(work: InitWork) -> Iterator[tuple[int, int]]:
    """Yield how many experts to have at once, and the work's bytes: fewer each time."""
    at_once, before = work.most_experts, -1
    while at_once or before < 0:
        workspace = max(work.work_bytes(at_once))
        if workspace != before:
            yield at_once, workspace
        at_once, before = at_once // 2, workspace
