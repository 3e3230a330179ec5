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
    "kosmos-2": "its attention to images is a part of its text model",
    "kosmos-2.5": "its attention to images is a part of its text model",
    "mllama": "its language model has layers for images only",
    "molmo2": "in training it asks for the kind of every token",
    "paligemma": "its attention to prompts is not causal",
}


def is_multimodal(hf_config: Any) -> bool:
    """Return whether config.json is of a causal language model with encoders, and says so."""
    whole, text = _whole_class(hf_config), hf_config.get_text_config()
    if whole is None or text is hf_config:
        return False
    is_named = whole.__name__ in (hf_config.architectures or ())
    encodes_text = any(getattr(c, "is_encoder_decoder", False) for c in (hf_config, text))
    return is_named and whole.__name__.endswith("ForConditionalGeneration") and not encodes_text


def why_not_on_text(hf_config: Any) -> str | None:
    """Return why a multimodal model cannot be trained on text alone; None if it can."""
    parameters = inspect.signature(_whole_class(hf_config).forward).parameters
    required = [name for name in ("pixel_values", "image_embeds") if name in parameters]
    if any(parameters[name].default is inspect.Parameter.empty for name in required):
        return "it computes nothing without an image"
    return NOT_ON_TEXT.get(hf_config.model_type)


def _whole_class(hf_config: Any) -> Any:
    """Return transformers' class of the whole model; None if it has no such."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    if type(hf_config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(hf_config)]


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
