"""The loss: of the labels, and of nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lorasb_ds.batches import Batch
from lorasb_ds.examples import IGNORE_INDEX


def token_loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Σ cross-entropy over the label tokens of a batch, in fp32; 0 for a weightless batch.

    Only positions from which some row predicts a label reach the head: on prompts, logits would
    be computed to be thrown away, and the vocabulary makes them the largest tensor of a step.
    """
    next_labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = (next_labels != IGNORE_INDEX).any(0).nonzero().flatten()
    if len(positions) == 0:
        positions = positions.new_zeros(1)  # weightless: the head still takes part
    logits = model(**batch.inputs, logits_to_keep=positions, use_cache=False).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1),
        next_labels[:, positions].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
