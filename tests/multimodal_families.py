"""Tiny configurations of multimodal models: two text blocks, one block of an encoder of images."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from tests.text_families import SIZES, TOKENS

# Set where an encoder's configuration has them.
ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_heads": 2,
    "depth": 1,
    "image_size": 28,
    "patch_size": 14,
    "embed_dim": 16,
    "out_hidden_size": SIZES["hidden_size"],
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "vision_output_dim": SIZES["hidden_size"],
    "projector_input_dim": SIZES["hidden_size"],
    "projector_output_dim": SIZES["hidden_size"],
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
PARTIAL_MROPE = MROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
TWO_MIXERS = {"layer_types": ["linear_attention", "full_attention"]}
TWO_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
# model type -> what its text part has besides
TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {**TWO_WINDOWS, "sliding_window": 8},
    "gemma4": {
        **TWO_WINDOWS,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "qwen2_vl": {"rope_parameters": MROPE},
    "qwen2_5_vl": {"rope_parameters": MROPE},
    "qwen3_vl": {"rope_parameters": MROPE},
    "qwen3_vl_moe": {"rope_parameters": MROPE},
    "qwen3_5": {**TWO_MIXERS, "rope_parameters": PARTIAL_MROPE},
    "qwen3_5_moe": {**TWO_MIXERS, "rope_parameters": PARTIAL_MROPE},
}
# What people fine-tune on text most.
FAMILIES = (
    *("gemma3", "gemma4", "mistral3", "llama4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "idefics3", "smolvlm", "internvl", "llava"),
)
OFTEN = ("gemma3", "gemma4", "llama4", "qwen3_vl_moe")  # the rest only with --all
FAMILY_MARKS = [
    pytest.param(family, marks=() if family in OFTEN else pytest.mark.slow) for family in FAMILIES
]


def tiny_multimodal_config(family: str, vocab_size: int) -> Any:
    """Return a family's configuration with small sizes in both parts."""
    known = AutoConfig.for_model(family)
    text, tokens = known.get_text_config(), TOKENS | {"vocab_size": vocab_size}
    sizes = _known_to(text, SIZES | tokens | {"vocab_size_per_layer_input": vocab_size})
    parts = {"text_config": {**sizes, **TEXT.get(family, {}), "model_type": text.model_type}}
    encoder = getattr(known, "vision_config", None)
    if family == "gemma4":  # whose default has none
        encoder = AutoConfig.for_model("gemma4_vision")
    if encoder is not None:
        parts["vision_config"] = {**_known_to(encoder, ENCODER), "model_type": encoder.model_type}
    # Placeholders of images, beyond which defaults would be.
    ids = {name: vocab_size - 1 for name in known.to_dict() if name.endswith("_token_id")}
    ids |= {"image_token_index": vocab_size - 1} if hasattr(known, "image_token_index") else {}
    ids = {name: value for name, value in ids.items() if name not in tokens}
    return type(known)(**parts, **ids)


def _known_to(config: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    fields = {*config.to_dict(), *type(config).attribute_map}
    return {name: value for name, value in sizes.items() if name in fields}
