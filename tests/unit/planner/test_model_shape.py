"""Compare shapes from a config.json with what transformers builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.base import empty_model
from lorasb_ds.models.shape import shape_of
from lorasb_ds.planner.config_shape import shape_from_config
from lorasb_ds.planner.known_models import BUILT_IN

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
VARIANTS = {
    "biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "untied gemma": {"model_type": "gemma2", "head_dim": 16, "tie_word_embeddings": False},
    "phi3": {"model_type": "phi3"},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
}
CONFIGS = BUILT_IN | {name: SMALL | more for name, more in VARIANTS.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_as_transformers_builds_it(name: str, tmp_path: Path) -> None:
    given = dict(CONFIGS[name])
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    built = shape_of(name, empty_model(config, torch.bfloat16))
    for source in (CONFIGS[name], written):
        shape = shape_from_config(name, source)
        assert list(shape.layers.items()) == list(built.layers.items())
        assert shape == built


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738),
        ("llama-3.2-3b", 3.213),
        ("llama-3-70b", 70.554),
        ("llama-3-405b", 405.853),
        ("mixtral-8x7b", 46.703),
    ],
)
def test_published_numbers_of_parameters(name: str, billions: float) -> None:
    shape = shape_from_config(name, BUILT_IN[name])
    assert round(shape.num_parameters / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"type 'gpt2'.*without torch only llama"),
        ({"hidden_size": None}, r"hidden_size in its config.json is None"),
        ({"vocab_size": "many"}, r"vocab_size in its config.json is 'many'"),
    ],
)
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_from_config("x", BUILT_IN["llama-7b"] | change)
