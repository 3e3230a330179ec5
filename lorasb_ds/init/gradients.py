"""The average gradient of every target weight, one layer at a time, straight into row shards.

The base never requires grad. A hook at each layer computes the weight gradient ``dL/dW = δᵀ x`` in
the backward pass from the layer's input x and output gradient δ, in one block of rows for each
rank, and reduces each block to its rank at once. With several ranks none holds a whole gradient.

Experts of MoE blocks are the exception: each expert's gradient, of the rows that it got, is reduced
whole to one rank, which also decomposes it.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.adapters.inject import disable_adapters, freeze_factors
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Batch
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group, row_range
from lorasb_ds.models.experts import Routing
from lorasb_ds.models.loss import token_loss_sum
from lorasb_ds.planner.init_plan import EXPERT_GRADIENT_BYTES


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
            the ``row_range`` of experts. Sums over label tokens; means after ``finish``.
        tokens: layer of experts -> (experts,), how many tokens gave each expert a gradient that is
            not 0; over all ranks after ``finish``.
        batches_reached: layer -> number of micro-batches with a label that called it, over all
            ranks after ``finish``.
        loss: of the whole sample, per label token, at the base; set by ``finish``.
        communication: time in reductions.
        from_segment: whether only a segment of the model was run for these gradients.
    """

    from_segment = False

    def __init__(
        self, adapters: Mapping[str, AdapterLinear], group: Group = None, offload: bool = False
    ) -> None:
        """
        Args:
            adapters: the layers whose gradients are wanted, by name.
            offload: keep the shards in host memory, pinned unless the device is the CPU.
        """
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.communication = accelerator.Stopwatch()
        self.shards: dict[str, torch.Tensor] = {}
        self.batches_reached: Counter[str] = Counter()
        self._calls: list[str] = []  # of the running forward pass, in order
        self._uneven: dict[str, torch.Tensor] = {}  # whole gradients of the running batch
        self.tokens: dict[str, torch.Tensor] = {}
        self._shapes = {name: gradient_shape(adapter) for name, adapter in adapters.items()}
        for name, (length, *rest) in self._shapes.items():
            if len(rest) == 2:
                tokens = torch.zeros(length, dtype=torch.int64)
                self.tokens[name] = tokens.to(accelerator.device())
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
        bounds = torch.tensor([mine, [-n for n in mine]], device=accelerator.device())
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
        """Add one call's ``δᵀ x`` of every expert's rows. Collective, as ``add``.

        Args:
            x, grad_y: (rows, in) and (rows, out), sorted by expert.
        Communication: for each ``EXPERT_GRADIENT_BYTES`` of gradients one reduce to the rank that
            owns them.
        """
        num_experts, *shape = self._shapes[name]
        ends = [0, *routing.ends]
        with_gradient = grad_y.any(1).cumsum(0).cpu()
        upto = torch.cat([torch.zeros(1, dtype=torch.int64), with_gradient])[ends]
        self.tokens[name] += upto.diff().to(self.tokens[name].device)
        long, short = (x, grad_y) if is_transposed(grad_y.shape[1], x.shape[1]) else (grad_y, x)
        at_once = max(1, EXPERT_GRADIENT_BYTES // (4 * shape[0] * shape[1]))
        with _exact_products(long, short):
            long, short = long.float(), short.float()
            for owner, owned in self._blocks(num_experts):
                for first in range(owned.start, owned.stop, at_once):
                    experts = range(first, min(first + at_once, owned.stop))
                    if self.world_size == 1 and ends[first] == ends[experts.stop]:
                        continue  # none of them has rows
                    block = long.new_zeros(len(experts), *shape)
                    for G, expert in zip(block, experts, strict=True):
                        rows = slice(ends[expert], ends[expert + 1])
                        if rows.stop > rows.start:
                            torch.mm(long[rows].T, short[rows], out=G)
                    if name in self._uneven:
                        self._uneven[name][experts.start : experts.stop] += block
                    else:
                        self._reduce(name, block, owner, experts.start - owned.start)

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
        counts = torch.tensor(
            [self.batches_reached[name] for name in self.shards], device=accelerator.device()
        )
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


class _ShardHook:
    """Passes a layer's inputs and output gradients on to the shards."""

    def __init__(self, shards: GradientShards, name: str) -> None:
        self.shards, self.name = shards, name

    def on_forward(self) -> None:
        self.shards._calls.append(self.name)

    def on_backward(
        self, x: torch.Tensor, grad_y: torch.Tensor, routing: Routing | None = None
    ) -> None:
        if routing is None:
            self.shards.add(self.name, x, grad_y)
        else:
            self.shards.add_experts(self.name, x, grad_y, routing)


def average_gradients(
    model: nn.Module,
    adapters: Mapping[str, AdapterLinear],
    batches: Iterable[Batch],
    num_label_tokens: int,
    group: Group = None,
    *,
    names: Iterable[str] | None = None,
    offload: bool = False,
    with_adapters: bool = False,
) -> GradientShards:
    """Compute the gradient of the sample's mean loss over label tokens, at W0, sharded.

    ``G = Σ_batches Σ_tokens ∂CE/∂W0 / num_label_tokens``: weighted as the training loss, without
    the engine's loss scaling. Adapters are disabled and every dropout is 0 while it runs.

    Collective: every rank passes the same number of batches (some without labels if it has fewer).

    Args:
        model: the module itself, not the engine. It runs in train mode: transformers checkpoints
            activations only then.
        adapters: all adapters of the model.
        batches: this rank's micro-batches.
        num_label_tokens: of the whole sample, over all ranks.
        names: the layers that are wanted, by default all; the backward pass ends at the lowest.
        offload: keep the shards in host memory.
        with_adapters: compute the gradient at W0 plus the adapters' updates: adapters stay enabled,
            but their factors get no gradient.
    Returns:
        The shards, with the sample's loss.
    """
    wanted = {name: adapters[name] for name in (adapters if names is None else names)}
    shards = GradientShards(wanted, group, offload)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device())
    state = freeze_factors(model) if with_adapters else disable_adapters(adapters)
    with gradient_hooks(wanted, shards), state, no_dropout(model):
        for batch in batches:
            loss = token_loss_sum(model, batch)
            shards.after_forward(batch.num_label_tokens > 0)
            if loss.requires_grad:  # else this batch called none of the layers
                loss.backward()  # of the sum: see GradientShards.finish
            shards.after_backward()
            loss_sum += loss.detach().double()
    dist.all_reduce(loss_sum, group=group)
    shards.finish(loss_sum.item(), num_label_tokens)
    return shards


@contextmanager
def gradient_hooks(adapters: Mapping[str, AdapterLinear], shards: GradientShards) -> Iterator[None]:
    """Hook these layers up to the shards inside the ``with`` block."""
    for name, adapter in adapters.items():
        adapter.gradient_hook = _ShardHook(shards, name)
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.gradient_hook = None


@contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Put the model in train mode with every dropout and noise at 0, inside the ``with`` block."""
    was_training = model.training
    # nn.Dropout's p, and rates in modules or their configurations: attention_dropout,
    # hidden_dropout, attn_pdrop, layerdrop, router_jitter_noise, …
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    rates = [
        (owner, name, rate)
        for owner in [*model.modules(), *configs.values()]
        for name, rate in vars(owner).items()
        if isinstance(rate, float)
        and ("drop" in name or "jitter" in name or isinstance(owner, nn.Dropout))
    ]
    model.train()
    for owner, attribute, _ in rates:
        setattr(owner, attribute, 0.0)
    try:
        yield
    finally:
        for owner, attribute, rate in rates:
            setattr(owner, attribute, rate)
        model.train(was_training)
