"""Gradients of state-space and hybrid models against autograd, in training mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasb_ds.adapters.inject import inject
from lorasb_ds.init.gradients import average_gradients
from lorasb_ds.models.hybrids import call_projections
from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.loss import token_loss_sum
from tests.text_families import tiny_config
from tests.unit.init.test_gradients import batch_of

pytestmark = pytest.mark.usefixtures("one_process")

BATCHES = [batch_of(2, 5), batch_of(3, 9)]
TOKENS = sum(batch.num_label_tokens for batch in BATCHES)
# family -> names of linear layers that its code reads instead of calling
FAMILIES: dict[str, set[str]] = {
    "falcon_h1": set(),
    "nemotron_h": set(),
    "granitemoehybrid": set(),
    "qwen3_next": set(),
    "lfm2": set(),
    "bamba": set(),
    "mamba2": set(),
    "mamba": {"dt_proj"},
    "falcon_mamba": {"dt_proj"},
    "jamba": {"dt_proj"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(family)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    loss = sum(token_loss_sum(model, batch) for batch in BATCHES) / TOKENS
    loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    call_projections(model)
    layers = linear_layers(model)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    left = {n.rpartition(".")[2] for n in linear - layers.keys()} - {"lm_head", "router", "gate"}
    assert left == FAMILIES[family]
    adapters = inject(model, layers, 4, torch.float32)
    found = average_gradients(model, adapters, BATCHES, TOKENS)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    assert found.shards.keys() == layers.keys()
    for name, G in found.shards.items():
        expected = wanted[f"{name}.weight"]
        expected = expected.T if G.shape != expected.shape else expected
        assert expected.any(), name
        torch.testing.assert_close(G, expected, rtol=1e-4, atol=1e-7, msg=name)
