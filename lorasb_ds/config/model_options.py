"""Options of the base model: which one, and how it is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorasb_ds.config.option_group import OptionGroup, default_is
from lorasb_ds.config.paths import DEMO_MODEL


class ModelOptions(OptionGroup):
    model: str = Field(
        DEMO_MODEL,
        min_length=1,
        description="Base model: a local folder, a hub name, or 'demo' (SmolLM2-135M-Instruct, "
        "fetched by scripts/setup.sh).",
    )
    trust_remote_code: bool = Field(
        False, description="Run model code that comes with the base. Only if you have read it."
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Compute dtype of base and adapter. R is always trained in fp32."
    )
    load_in_4bit: bool = Field(
        False, description="Quantize the base to 4 bits (NF4, double quantization, bf16 compute)."
    )
    load_in_8bit: bool = Field(
        False, description="Quantize the base to 8 bits (int8 rows, bf16 compute)."
    )
    attn_implementation: str | None = Field(
        None,
        min_length=1,
        description="transformers' attention: eager, sdpa, flash_attention_2, …",
        json_schema_extra=default_is("the model's, usually sdpa"),
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass to save memory."
    )
    activation_offload: bool = Field(
        False,
        description="Keep the inputs of blocks, which --gradient-checkpointing recomputes from, in "
        "host memory: for long rows. On CPUs it changes nothing.",
    )
