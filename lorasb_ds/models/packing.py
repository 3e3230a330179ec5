"""A test, before training, that a model keeps the rows of a pack apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lorasb_ds.data.batch import Batch, collate, collate_packed
from lorasb_ds.data.tokenization import Example
from lorasb_ds.models.loss import eval_mode

PROBE_TOKENS = 32
# A share of the effect of seeing another row. Kernels for other lengths differ far less, even in
# bf16.
TOLERANCE = 0.1


@torch.no_grad()
def keeps_packs_apart(
    model: Any, examples: Sequence[Example], device: torch.device, *, one_row: bool
) -> bool:
    """Compare a row alone, packed behind another row, and as the continuation of that row.

    Collective under ZeRO-3: three forward passes over a few tokens.

    Args:
        examples: at least one, longer than one token if possible; the same on every rank.
        one_row: as in ``collate_packed``.
    Returns:
        Whether the model computes the same for the row alone and in the pack.
    """
    first, second = (
        Example(example.input_ids[:PROBE_TOKENS], example.labels[:PROBE_TOKENS])
        for example in [*(e for e in examples if len(e.input_ids) > 1), *examples, *examples][:2]
    )
    joined = Example(first.input_ids + second.input_ids, first.labels + second.labels)

    def last_logits(batch: Batch) -> torch.Tensor:
        inputs = batch.to(device).inputs
        return model(**inputs, logits_to_keep=1, use_cache=False).logits.double()

    with eval_mode(model):
        alone = last_logits(collate([second], 0))
        packed = last_logits(collate_packed([[first, second]], 0, one_row=one_row))
        mixed = last_logits(collate([joined], 0))
    error, effect = torch.linalg.norm(packed - alone), torch.linalg.norm(mixed - alone)
    return bool(error <= TOLERANCE * effect)
