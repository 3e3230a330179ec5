"""A base's config.json, read by transformers: the kind of its model, and how it is quantized."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import first_line
from lorasb_ds.models.multimodal import is_multimodal, why_not_on_text
from lorasb_ds.models.quantization import Kind
from lorasb_ds.models.stored_formats import STORED_FORMATS

MOST_LAYERS = 10_000  # transformers would make them one by one, without an end


def load_config(model: str, folder: Path, trust_remote_code: bool, classifies: bool = False) -> Any:
    """Read the configuration of a model that can be trained here.

    Args:
        model: as --model gives it, for messages.
        folder: the folder with the files.
        classifies: whether a classifier is made of the model, and not a causal language model.
    Raises:
        ConfigError: if it cannot be read, or is of another kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        # Without an answer transformers would ask on the console.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # somebody's file, which fails in as many ways
        remedy = "It must be a model that transformers knows."
        if "trust_remote_code" in str(error):
            remedy = (
                "If you trust that code, give --trust-remote-code; --config and --resume do not "
                "take it over from an earlier run."
            )
        raise ConfigError(
            f"--model {model} cannot be read: {first_line(error)} {remedy}"
        ) from error
    stored_quantization(config, model)
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise ConfigError(f"--model {model}: architectures in config.json is no list of names.")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(count, int) and count > MOST_LAYERS:
        raise ConfigError(
            f"--model {model}: num_hidden_layers in config.json is {count}, more than any model's "
            f"({MOST_LAYERS})."
        )
    if classifies:
        _check_classifies(config, model)
        return config
    causal = all(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (own_code and trust_remote_code)
    if is_multimodal(config):
        if why := why_not_on_text(config):
            raise ConfigError(
                f"--model {model} is a {', '.join(architectures)}, which cannot be trained on text "
                f"alone: {why}."
            )
    elif not (known and causal):
        raise ConfigError(
            f"--model {model} is a {', '.join(architectures) or type(config).__name__}, not a "
            "causal language model (…ForCausalLM), nor a multimodal one of images and text "
            "(…ForConditionalGeneration). Only those can be trained, and encoders as classifiers "
            "(--task-type sequence-classification)."
        )
    elif is_encoder(config):
        raise ConfigError(
            f"--model {model} is an encoder ({config.model_type}): its tokens see those after "
            "them, which it would be trained to predict. It is a causal language model only if "
            "its config.json says is_decoder: true."
        )
    return config


def _check_classifies(config: Any, model: str) -> None:
    """Refuse a configuration of which transformers makes no classifier of text by one model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    option = f"--task-type sequence-classification: --model {model} is a {config.model_type}"
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or is_multimodal(config):
        raise ConfigError(
            f"{option}, of which transformers makes no text classifier "
            "(AutoModelForSequenceClassification). Give an encoder, such as BERT or RoBERTa, or a "
            "decoder, such as Llama or Qwen."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{option}, an encoder with a decoder. Only one of them can be trained.")


def is_encoder(config: Any) -> bool:
    """Return whether attention is in both directions: BERT's and others', as transformers warns."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config, "is_decoder", True) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return False
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return "if not config.is_decoder" in inspect.getsource(model.__init__)


def stored_quantization(hf_config: Any, model: str) -> Kind | None:
    """Return how the files are quantized; None if they are not.

    Raises:
        ConfigError: if they are quantized in a way that cannot be read.
    """
    found = getattr(hf_config, "quantization_config", None)
    if not found:
        return None
    if not isinstance(found, dict):
        found = found.to_dict() if hasattr(found, "to_dict") else {"quant_method": found}
    if is_encoded(found):
        return None
    if found.get("load_in_4bit"):
        return "4bit"
    if found.get("load_in_8bit"):
        return "8bit"
    raise ConfigError(
        f"--model {model} is quantized by {found.get('quant_method')}; of quantized bases only "
        f"those of bitsandbytes and those in {' and '.join(STORED_FORMATS.values())} can be "
        "trained. Give the base it was made from; --load-in-4bit quantizes it."
    )


def is_encoded(quantization: Mapping[str, Any]) -> bool:
    """Return whether files with this quantization_config are decoded as they are read."""
    return str(quantization.get("quant_method")) in STORED_FORMATS
