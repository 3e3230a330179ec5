"""The average gradient of every target weight, one layer at a time, straight into row shards.

The base never requires grad. A hook at each layer passes its input and output gradient on to
``GradientShards`` in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.adapters.inject import disable_adapters, freeze_factors
from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.data.batch import Batch
from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group
from lorasb_ds.init.gradient_shards import GradientShards
from lorasb_ds.models.experts import Routing
from lorasb_ds.models.loss import token_loss_sum
from lorasb_ds.planner.layer_groups import LayerGroup


class _ShardHook:
    """Passes a layer's inputs and output gradients on to the shards."""

    def __init__(self, shards: GradientShards, name: str) -> None:
        self.shards, self.name = shards, name

    def on_forward(self, x: torch.Tensor, routing: Routing | None = None) -> None:
        self.shards.calls.add(self.name, x, routing)

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
    layers: LayerGroup | None = None,
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
        layers: those whose gradients are wanted, by default all; the backward pass ends at the
            lowest.
        offload: keep the shards in host memory.
        with_adapters: compute the gradient at W0 plus the adapters' updates: adapters stay enabled,
            but their factors get no gradient.
    Returns:
        The shards, with the sample's loss.
    """
    wanted = {name: adapters[name] for name in (adapters if layers is None else layers)}
    shards = GradientShards(wanted, group, offload, layers)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device())
    state = nullcontext() if with_adapters else disable_adapters(adapters)
    # A classifier's head is trained beside the adapters, and is in the graph with or without them.
    with gradient_hooks(wanted, shards), state, freeze_factors(model), no_dropout(model):
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
