"""The average gradient of every target weight, a layer at a time, straight into row shards.

The base never requires grad. Each tapped layer computes its weight gradient ``dL/dW = δᵀ x`` in
the backward pass from its input x and output gradient δ, in blocks, one for each rank that owns a
part of it; a block is reduced to its owner at once. Of several ranks none holds a whole gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.adapter import LoraSBLinear, enable
from lorasb_ds.data import Batch
from lorasb_ds.linalg import Group, row_range
from lorasb_ds.loss import token_loss_sum


def is_transposed(out_features: int, in_features: int) -> bool:
    """Whether a layer's gradient is kept as its transpose: shards lie along the longer side."""
    return in_features > out_features


class GradientShards:
    """This rank's rows of every layer's gradient, summed over batches and ranks.

    Attributes:
        shards: layer -> (rows here, short side), fp32: rows of G (out, in) where out >= in, else
            rows of Gᵀ. Row ranges are those of ``linalg.row_range``.
    """

    def __init__(self, adapters: Mapping[str, LoraSBLinear], group: Group = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.shards: dict[str, torch.Tensor] = {}
        for name, adapter in adapters.items():
            long_side = max(adapter.out_features, adapter.in_features)
            rows = row_range(long_side, self.rank, self.world_size)
            short_side = min(adapter.out_features, adapter.in_features)
            self.shards[name] = torch.zeros(len(rows), short_side, device=adapter.lora_R.device)

    def add(self, name: str, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        """Add one layer's ``δᵀ x`` of one batch. Collective: same layers in the same order.

        Args:
            x: (…, in), any floating dtype.
            grad_y: (…, out), δ.
        Communication: one reduce of (rows of that rank, short side) fp32 to every rank.
        """
        x, grad_y = x.flatten(0, -2).float(), grad_y.flatten(0, -2).float()
        long, short = (x, grad_y) if is_transposed(grad_y.shape[1], x.shape[1]) else (grad_y, x)
        for owner in range(self.world_size):
            rows = row_range(long.shape[1], owner, self.world_size)
            if not rows:
                continue
            block = long[:, rows.start : rows.stop].T @ short
            if self.world_size > 1:
                dist.reduce(block, group=self.group, group_dst=owner)
            if owner == self.rank:
                self.shards[name] += block


def average_gradients(
    model: nn.Module,
    adapters: Mapping[str, LoraSBLinear],
    batches: Iterable[Batch],
    num_label_tokens: int,
    group: Group = None,
) -> tuple[GradientShards, float]:
    """Gradient of the sample's mean loss over label tokens, at the base's weights, sharded.

    ``G = Σ_batches Σ_tokens ∂CE/∂W0 / num_label_tokens``: the training loss's own weighting, with
    no scaling of an engine's in it. Adapter branches are off and dropout is 0 meanwhile.

    Collective: every rank gives the same number of batches (weightless ones where it is short).

    Args:
        model: the module itself, not the engine. Train mode is kept on meanwhile: transformers
            checkpoints activations only then.
        batches: this rank's micro-batches.
        num_label_tokens: of the whole sample, all ranks together.
    Returns:
        The shards, and the sample's loss (the same on every rank).
    """
    shards = GradientShards(adapters, group)
    loss_sum = torch.zeros((), dtype=torch.float64)
    with _taps(adapters, shards.add), branches_off(adapters), no_dropout(model):
        for batch in batches:
            loss = token_loss_sum(model, batch)
            (loss / num_label_tokens).backward()
            loss_sum += loss.detach().double().cpu()
    total = loss_sum.to(next(iter(shards.shards.values())).device)
    dist.all_reduce(total, group=group)
    return shards, total.item() / num_label_tokens


@contextmanager
def _taps(
    adapters: Mapping[str, LoraSBLinear],
    add: Callable[[str, torch.Tensor, torch.Tensor], None],
) -> Iterator[None]:
    for name, adapter in adapters.items():
        adapter.tap = lambda x, grad_y, name=name: add(name, x, grad_y)
    try:
        yield
    finally:
        for adapter in adapters.values():
            adapter.tap = None


@contextmanager
def branches_off(adapters: Mapping[str, LoraSBLinear]) -> Iterator[None]:
    """The model is exactly its base meanwhile."""
    enable(adapters, False)
    try:
        yield
    finally:
        enable(adapters, True)


@contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Train mode with every dropout at 0."""
    was_training = model.training
    # nn.Dropout's p, and rates that modules keep as attention_dropout, hidden_dropout, layerdrop, …
    rates = [
        (module, name, rate)
        for module in model.modules()
        for name, rate in vars(module).items()
        if isinstance(rate, float) and ("drop" in name or isinstance(module, nn.Dropout))
    ]
    model.train()
    for module, attribute, _ in rates:
        setattr(module, attribute, 0.0)
    try:
        yield
    finally:
        for module, attribute, rate in rates:
            setattr(module, attribute, rate)
        model.train(was_training)
