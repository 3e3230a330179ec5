"""Every layer's average gradient as row shards, reduced layer by layer in the backward pass.

The weight gradient ``dL/dW = δᵀ x`` of a layer's input x and output gradient δ is computed in one
block of rows for each rank, and each block is reduced to its rank at once. With several ranks none
holds a whole gradient.

Experts of MoE blocks are the exception: each expert's gradient, of the rows that it got, is reduced
whole to one rank, which also decomposes it.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group, row_range
from lorasb_ds.models.experts import Routing
from lorasb_ds.planner.init_bytes import EXPERT_GRADIENT_BYTES
from lorasb_ds.planner.layer_groups import LayerGroup


def is_transposed(out_features: int, in_features: int) -> bool:
    """Return whether a layer's gradient is kept transposed: rows are along the longer side."""
    return in_features > out_features


def gradient_shape(adapter: AdapterLinear) -> tuple[int, ...]:
    """Return (long side, short side) of a layer's gradient; of experts with their number first."""
    sides = (adapter.out_features, adapter.in_features)
    experts = (adapter.num_matrices,) if isinstance(adapter, LoraSBExperts) else ()
    return (*experts, max(sides), min(sides))


class GradientShards:
    """This rank's part of every layer's gradient, summed over calls, batches and ranks.

    A layer that is called several times in a forward pass adds every call's part. Layers that
    share a weight each have their own part of its gradient, as each has its own adapter.

    Attributes:
        shards: layer -> (rows here, short side), fp32: rows of G (out, in) if out >= in, else of
            Gᵀ, in the range of ``row_range``; of experts (experts here, long side, short side), in
            the ``row_range`` of the wanted ones. Sums over label tokens; means after ``finish``.
        experts: projection of experts -> the experts whose gradients are wanted.
        tokens: projection of experts -> (wanted experts,), how many tokens gave each a gradient
            that is not 0; over all ranks after ``finish``.
        batches_reached: layer -> number of micro-batches with a label that called it, over all
            ranks after ``finish``.
        loss: of the whole sample, per label token, at the base; set by ``finish``.
        communication: time in reductions.
        from_segment: whether only a segment of the model was run for these gradients.
    """

    from_segment = False

    def __init__(
        self,
        adapters: Mapping[str, AdapterLinear],
        group: Group = None,
        offload: bool = False,
        layers: LayerGroup | None = None,
    ) -> None:
        """
        Args:
            adapters: the layers whose gradients are wanted, by name.
            offload: keep the shards in host memory, pinned unless the device is the CPU.
            layers: those of ``adapters``, and the experts that are wanted; by default all.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.communication = accelerator.Stopwatch()
        self.shards: dict[str, torch.Tensor] = {}
        self.batches_reached: Counter[str] = Counter()
        self._calls: list[str] = []  # of the running forward pass, in order
        self._uneven: dict[str, torch.Tensor] = {}  # whole gradients of the running batch
        self.experts: dict[str, range] = {}
        self.tokens: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, adapter in adapters.items():
            length, *rest = gradient_shape(adapter)
            if isinstance(adapter, LoraSBExperts):
                wanted = (layers or {}).get(name)
                self.experts[name] = range(length) if wanted is None else wanted
                length = len(self.experts[name])
                self.tokens[name] = torch.zeros(
                    length, dtype=torch.int64, device=accelerator.device()
                )
            self._shapes[name] = (length, *rest)
            shape = (len(row_range(length, self.rank, self.world_size)), *rest)
            self.shards[name] = (
                accelerator.pinned_zeros(*shape)
                if offload
                else torch.zeros(shape, device=accelerator.device())
            )

    def take(self, name: str) -> torch.Tensor:
        """Remove a layer's shard and return it, on the device."""
        return self.shards.pop(name).to(accelerator.device())

    def after_forward(self, has_labels: bool) -> None:
        """Find the layers that this batch called. Collective.

        Usually all ranks call a layer equally often and in the same order. Where they do not (the
        data decide, as in an MoE), this batch's gradient of the layer is summed whole on each rank,
        since ranks could not reduce it together during the backward pass.

        Communication: one all-reduce of 2 integers for each layer, and 2 more.
        """
        counts = Counter(self._calls)
        self.batches_reached.update({name: 1 for name in counts if has_labels})
        if self.world_size == 1:
            return
        order = zlib.crc32(" ".join(self._calls).encode())
        mine = [counts[name] for name in self.shards] + [order]
        bounds = accelerator.from_host([mine, [-n for n in mine]])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        *differ, other_order = (bounds[0] + bounds[1] != 0).tolist()
        for name, differs in zip(self.shards, differ, strict=True):
            if differs or (other_order and counts[name]):
                self._uneven[name] = torch.zeros(self._shapes[name], device=accelerator.device())

    def add(self, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Add one call's ``δᵀ x``. Collective: ranks add the same layers in the same order.

        Args:
            x: (…, in), any floating dtype.
            grad_y: (…, out), δ.
        Communication: one reduce of (rows of that rank, short side) fp32 to each rank.
        """
        x, grad_y = x.flatten(0, -2), grad_y.flatten(0, -2)
        long, short = (x, grad_y) if is_transposed(grad_y.shape[1], x.shape[1]) else (grad_y, x)
        with _exact_products(long, short):
            long, short = long.float(), short.float()
            if name in self._uneven:
                self._uneven[name] += long.T @ short
            else:
                for owner, rows in self._blocks(long.shape[1]):
                    self._reduce(name, long[:, rows.start : rows.stop].T @ short, owner)

    def add_experts(
        self, name: str, x: torch.Tensor, grad_y: torch.Tensor, routing: Routing
    ) -> None:
        """Add one call's ``δᵀ x`` of the rows of every wanted expert. Collective, as ``add``.

        Args:
            x, grad_y: (rows, in) and (rows, out), sorted by expert.
        Communication: for each ``EXPERT_GRADIENT_BYTES`` of gradients one reduce to the rank that
            owns them.
        """
        wanted, shape = self.experts[name], self._shapes[name][1:]
        ends = [0, *routing.ends]
        upto = F.pad(grad_y.any(1).cumsum(0), (1, 0))  # rows with a gradient
        tokens = upto.index_select(0, F.pad(routing.offsets, (1, 0))).diff()
        self.tokens[name] += tokens[wanted.start : wanted.stop]
        long, short = (x, grad_y) if is_transposed(grad_y.shape[1], x.shape[1]) else (grad_y, x)
        at_once = max(1, EXPERT_GRADIENT_BYTES // (4 * shape[0] * shape[1]))
        with _exact_products(long, short):
            for owner, owned in self._blocks(len(wanted)):
                for first in range(owned.start, owned.stop, at_once):
                    last = min(first + at_once, owned.stop)
                    experts = wanted[first:last]
                    if self.world_size == 1 and ends[experts.start] == ends[experts.stop]:
                        continue  # none of them has rows
                    block = torch.zeros(len(experts), *shape, device=x.device)
                    for G, expert in zip(block, experts, strict=True):
                        rows = slice(ends[expert], ends[expert + 1])
                        if rows.stop > rows.start:
                            torch.mm(long[rows].float().T, short[rows].float(), out=G)
                    if name in self._uneven:
                        self._uneven[name][first:last] += block
                    else:
                        self._reduce(name, block, owner, first - owned.start)

    def after_backward(self) -> None:
        """Reduce the gradients that ``after_forward`` decided to sum whole. Collective.

        Communication: that of ``add`` for each of those layers.
        """
        for name, whole in self._uneven.items():
            for owner, rows in self._blocks(len(whole)):
                self._reduce(name, whole[rows.start : rows.stop], owner)
        self._uneven.clear()
        self._calls.clear()

    def finish(self, loss_sum: float, num_label_tokens: int) -> None:
        """Divide the sums by the number of label tokens, and sum ``batches_reached`` over ranks.

        Collective. Gradients are divided here, in fp32, and not before: if the loss were divided by
        a large sample's tokens, many entries would be 0 in fp16.

        Args:
            loss_sum: of the whole sample.
            num_label_tokens: of the whole sample.
        """
        self.loss = loss_sum / num_label_tokens
        for shard in self.shards.values():
            shard /= num_label_tokens
        for tokens in self.tokens.values():
            dist.all_reduce(tokens, group=self.group)
        counts = accelerator.from_host([self.batches_reached[name] for name in self.shards])
        dist.all_reduce(counts, group=self.group)
        self.batches_reached = Counter(dict(zip(self.shards, counts.tolist(), strict=True)))

    def _blocks(self, num_rows: int) -> Iterator[tuple[int, range]]:
        for owner in range(self.world_size):
            if rows := row_range(num_rows, owner, self.world_size):
                yield owner, rows

    def _reduce(self, name: str, block: torch.Tensor, owner: int, first: int = 0) -> None:
        """Sum a block over ranks into its owner's shard, from the shard's row ``first`` on."""
        if self.world_size > 1:
            with self.communication:
                dist.reduce(block, group=self.group, group_dst=owner)
        if owner == self.rank:
            part = self.shards[name][first : first + len(block)]
            part += block.to(part.device)


@contextmanager
def _exact_products(*factors: torch.Tensor) -> Iterator[None]:
    """Let fp32 matrix products use bf16 or TF32 hardware if all factors came from bf16.

    Rounding such values to either format changes nothing, and sums stay in fp32: the result is
    that of fp32, at twice its speed on CPUs with AVX512-BF16.
    """
    if any(factor.dtype != torch.bfloat16 for factor in factors):
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
