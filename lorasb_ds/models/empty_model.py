"""A model without weights, as transformers makes it and as it is trained here."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import first_line
from lorasb_ds.models.hybrids import call_projections
from lorasb_ds.models.multimodal import is_multimodal, keep_text_part
from lorasb_ds.models.streaming import put


def empty_model(
    hf_config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    *,
    buffers: bool = True,
    text_part: bool = True,
    classifies: bool = False,
) -> Any:
    """Make a model without weights: parameters on the meta device, buffers real.

    Args:
        dtype: of all floating-point parameters except those that the model keeps in fp32.
        buffers: False: they are on the meta device, too. Nothing is then allocated; otherwise every
            parameter is for a moment, and the system may refuse that for a block's experts.
        text_part: of a multimodal model, make what is trained on text only (``keep_text_part``).
        classifies: make a classifier, with the outputs of the configuration's ``num_labels``.
    Raises:
        ConfigError: if transformers cannot make it.
    """
    from accelerate import init_empty_weights
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    multimodal = is_multimodal(hf_config)
    factory: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    if classifies:
        factory = AutoModelForSequenceClassification
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model: Any = factory.from_config(
                hf_config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # somebody's config.json, which fails in as many ways
        raise ConfigError(
            f"transformers cannot make the model of {hf_config.name_or_path}: "
            f"{type(error).__name__}: {first_line(error)} Look at its config.json."
        ) from error
    call_projections(model)
    if multimodal and text_part:
        keep_text_part(model)
    model.tie_weights()  # the context above has given tied parameters one object each
    if fp32 := list(model._get_dtype_plan(dtype)):
        pattern, *_ = build_glob_alternation(fp32)
        for name, value in model.state_dict().items():
            if pattern.search(name):
                put(model, name, value.float())
    return model
