"""Keep in host memory what autograd saves between blocks: ``--activation-offload``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


def offload_activations(model: Any) -> None:
    """Move the inputs of blocks to the host in the forward pass, and back in the backward pass.

    For a model whose blocks are recomputed (non-reentrant checkpointing): all that autograd then
    saves of the base model are their arguments, and a little before and after them. Both copies
    are queued on the stream that computes, from and to page-locked memory: the host does not wait.
    On CPUs nothing is moved.
    """
    base = model.base_model
    forward = base.forward

    @functools.wraps(forward)
    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(_to_host, _to_device):
            return forward(*args, **kwargs)

    base.forward = offloaded


def _to_host(saved: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    # A linear layer saves a view of its weight.
    is_weight = any(isinstance(of, nn.Parameter) for of in (saved, saved._base))
    if saved.device.type == "cpu" or is_weight:
        return saved.device, saved
    host = torch.empty(saved.shape, dtype=saved.dtype, pin_memory=True)
    return saved.device, host.copy_(saved, non_blocking=True)


def _to_device(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, saved = packed
    return saved.to(device, non_blocking=True)
