"""The text part of multimodal checkpoints: what is trained on text, under the whole model's names.

The model is that of config.json without the encoders of images and sound, which no text reaches.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

MODALITIES = ("image", "audio")
# Why text is not all that a model of these families reads, or not read causally.
NOT_ON_TEXT = {
    "mllama": "its language model has layers for images only",
    "paligemma": "its attention to prompts is not causal",
}


def is_multimodal(hf_config: Any) -> bool:
    """Return whether config.json is of a language model with encoders, and names it as such."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(hf_config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return False
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(hf_config)]
    has_text_part = hf_config.get_text_config() is not hf_config
    return has_text_part and whole.__name__ in (hf_config.architectures or ())


def text_layers_prefix(model: Any) -> str:
    """Return how the names of a multimodal model's text layers begin; "" of other models."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{name}." for name, of in model.named_modules() if of is decoder and name), "")


def encoders(model: Any) -> dict[str, nn.Module]:
    """Return the modules of a multimodal model that read images and sound, by name."""
    found = {}
    for modality in MODALITIES:
        encoder = model.get_encoder(modality)  # the model itself if it has none
        for name, module in model.named_modules():
            if module is encoder and name and module is not model.base_model:
                found[name] = module
    return found


def keep_text_part(model: Any) -> None:
    """Remove a multimodal model's encoders, and let it train on text alone, in place."""
    for name in encoders(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    # Gemma 3 wants to know in training which tokens are of images.
    if "token_type_ids" in inspect.signature(model.base_model.forward).parameters:
        model.base_model.register_forward_pre_hook(_all_tokens_are_text, with_kwargs=True)


def _all_tokens_are_text(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if module.training and kwargs.get("token_type_ids") is None:
        kwargs = kwargs | {"token_type_ids": torch.zeros_like(kwargs["input_ids"])}
    return args, kwargs
