"""The text part of multimodal models computes what the whole one does, without its encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.multimodal import (
    encoders,
    is_multimodal,
    keep_text_part,
    text_layers_prefix,
)
from lorasb_ds.models.shape import shape_of
from tests.moe_families import VOCABULARY
from tests.multimodal_families import FAMILY_MARKS, tiny_multimodal_config

IDS = torch.arange(10, 34).view(2, 12)
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0


def logits(model: Any, rows: slice = slice(None), length: int = 12) -> torch.Tensor:
    given = {"input_ids": IDS[rows, :length], "attention_mask": MASK[rows, :length]}
    with torch.no_grad():
        return model(**given, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILY_MARKS)
def test_text_part(family: str) -> None:
    config = tiny_multimodal_config(family, VOCABULARY)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    config.architectures = [type(model).__name__]
    assert is_multimodal(config)
    wanted, found = logits(model), encoders(model)
    assert len(found) == 1, "an encoder of images"
    prefix = text_layers_prefix(model)
    of_encoder = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    of_encoder = [name for name in of_encoder if name.startswith(tuple(found))]
    assert of_encoder

    keep_text_part(model)
    assert encoders(model) == {}
    assert not any(name.startswith(tuple(found)) for name in model.state_dict())
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits(model.train()), wanted, rtol=0, atol=0)
    alone = logits(model.eval(), slice(1, 2), 7)
    torch.testing.assert_close(alone, wanted[1:, :7], rtol=1e-5, atol=1e-5)

    layers = linear_layers(model)
    assert layers
    assert all(name.startswith(prefix) for name in layers)
    shape = shape_of(family, model)
    assert shape.num_blocks == 2
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())


def test_others_are_not_multimodal() -> None:
    config = tiny_multimodal_config("gemma3", VOCABULARY)
    config.architectures = ["Gemma3ForCausalLM"]
    assert not is_multimodal(config)
    assert not is_multimodal(config.get_text_config())
