"""Gradients of multimodal models' text parts, against autograd in the whole model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lorasb_ds.adapters.inject import inject
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.init.segments import gradients_by_segment
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.loss import add_loss_head, check_loss_head, token_loss_sum
from lorasb_ds.models.multimodal import keep_text_part
from lorasb_ds.planner.layer_groups import blocks_prefix
from tests.multimodal_families import FAMILY_MARKS, tiny_multimodal_config
from tests.unit.init.test_gradients import batch_of

pytestmark = pytest.mark.usefixtures("one_process")

BATCHES = [batch_of(2, 5), batch_of(3, 9)]
TOKENS = sum(batch.num_label_tokens for batch in BATCHES)
# Its language model is a causal one by itself, which the loss head does not look into.
WITHOUT_LOSS_HEAD = {"llama4"}


def model_of(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_multimodal_config(family, 128)
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILY_MARKS)
def test_gradients(family: str) -> None:
    plain = model_of(family).train()
    if family == "gemma3":
        keep_text_part(plain)  # which says that all tokens are text
    loss = sum(token_loss_sum(plain, batch) for batch in BATCHES) / TOKENS
    loss.backward()
    model = model_of(family)
    keep_text_part(model)
    add_loss_head(model)
    has_head = check_loss_head(model, BATCHES[0].input_ids[:1])
    assert has_head == (family not in WITHOUT_LOSS_HEAD)
    adapters = inject(model, linear_layers(model), 4, torch.float32)
    whole = average_gradients(model, adapters, BATCHES, TOKENS)
    assert whole.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, G in whole.shards.items():
        expected = plain.get_parameter(f"{name}.weight").grad
        expected = expected.T if G.shape != expected.shape else expected
        assert expected.any(), name
        torch.testing.assert_close(G, expected, rtol=1e-4, atol=1e-7, msg=name)

    if not has_head:
        return
    in_blocks = [name for name in adapters if ".layers." in name]
    prefix = blocks_prefix(in_blocks)
    assert prefix is not None
    half = sum(name.startswith(f"{prefix}0.") for name in in_blocks)
    groups = [dict.fromkeys(in_blocks[a:b]) for a, b in pairwise((0, half, len(in_blocks)))]
    inside = {name: adapters[name] for name in in_blocks}
    found: dict[str, torch.Tensor] = {}
    for shards in gradients_by_segment(model, inside, groups, prefix, BATCHES, TOKENS):
        found |= shards.shards
    assert found.keys() == set(in_blocks)
    for name, G in found.items():
        assert torch.equal(G, whole.shards[name]), name
