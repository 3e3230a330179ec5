"""What ``--activation-offload`` moves to the host (moved for real by tests/device)."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from lorasb_ds.adapters.inject import inject
from lorasb_ds.models import activation_offload
from lorasb_ds.models.linear_layers import linear_layers


def test_the_inputs_of_blocks_and_nothing_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=96, num_hidden_layers=3
    )
    model = hf.LlamaForCausalLM(config).requires_grad_(False)
    inject(model, linear_layers(model), 4, torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    activation_offload.offload_activations(model)
    shapes: list[tuple[int, ...]] = []
    to_host = activation_offload._to_host

    def seen(saved: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
        shapes.append(tuple(saved.shape))
        return to_host(saved)

    monkeypatch.setattr(activation_offload, "_to_host", seen)
    model.train()
    hidden = model.base_model(input_ids=torch.arange(20).view(2, 10), use_cache=False)[0]
    hidden.sum().backward()
    assert shapes.count((2, 10, 32)) >= config.num_hidden_layers
    assert not [shape for shape in shapes if 96 in shape], "recomputed, and never kept"
