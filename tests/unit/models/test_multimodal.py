"""The text part of multimodal models computes what the whole one does, without its encoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lorasb_ds.models.linear_layers import linear_layers
from lorasb_ds.models.multimodal import (
    encoders,
    is_multimodal,
    keep_text_part,
    text_layers_prefix,
    why_not_on_text,
)
from lorasb_ds.models.shape import shape_of
from tests.multimodal_families import FAMILY_MARKS, tiny_multimodal_config
from tests.text_families import VOCABULARY

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
    assert why_not_on_text(config) is None
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


def named(model_type: str) -> Any:
    config = AutoConfig.for_model(model_type)
    config.architectures = [MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].__name__]
    return config


@pytest.mark.parametrize("model_type", ["florence2", "diffusion_gemma", "pix2struct", "fuyu"])
def test_not_causal_or_not_of_two_parts(model_type: str) -> None:
    assert not is_multimodal(named(model_type))


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("blip-2", "nothing without an image"),
        ("instructblip", "nothing without an image"),
        ("kosmos-2", "attention to images"),
        ("mllama", "layers for images only"),
        ("molmo2", "kind of every token"),
        ("paligemma", "not causal"),
    ],
)
def test_text_is_not_all(model_type: str, why: str) -> None:
    found = why_not_on_text(named(model_type))
    assert found is not None
    assert why in found
