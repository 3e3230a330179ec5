"""Options of the training: its length, optimizer, learning rate and batches."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lorasb_ds.config.methods import (
    DEFAULT_METHOD,
    LR_OF_AB,
    LR_TIMES_R,
    XS_LR_TIMES_R,
    default_lr,
)
from lorasb_ds.config.option_group import OptionGroup, default_is

# What an optimizer does to the gradient in its first step, in the words of --init-update.
FIRST_STEPS = {
    "adamw": "sign",
    "lion": "sign",
    "sgd": "raw",
    "adafactor": "adafactor",
    "muon": "muon",
}
MATRIX_OPTIMIZERS = ("adafactor", "muon")  # they need whole matrices; all others go by elements


class TrainingOptions(OptionGroup):
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps; wins over --epochs.",
        json_schema_extra=default_is("by --epochs"),
    )
    optimizer: Literal["adamw", "sgd", "lion", "adafactor", "muon"] = Field(
        "adamw",
        description="What trains R (or A and B): torch's AdamW, SGD with momentum 0.9, Adafactor "
        "or Muon, or bitsandbytes' Lion. Each needs another --lr.",
    )
    lr: float = Field(
        default_factory=lambda fields: default_lr(
            fields.get("method", DEFAULT_METHOD), fields.get("r", 1)
        ),  # a wrong --r is not there, and is a problem of its own
        gt=0,
        description="Peak learning rate.",
        json_schema_extra=default_is(
            f"{LR_TIMES_R:g} / r where R is trained (lora-xs: {XS_LR_TIMES_R:g} / r), {LR_OF_AB:g} "
            "where A and B are, or what PEFT makes"
        ),
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the learning rate after the warmup."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Part of the steps that warm up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of R.")
    micro_batch_size: int = Field(4, ge=1, description="Rows per process and micro-batch.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Micro-batches per process and optimizer step."
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="Processes that compute a row together, a piece each, for long rows "
        "(DeepSpeed's Ulysses). The number of processes and of attention heads must be divisible "
        "by it.",
    )
    train_batch_size: int | None = Field(
        None,
        ge=1,
        description="Rows per optimizer step, of all processes. It need not be divisible by "
        "anything, and decides --gradient-accumulation-steps unless that is given.",
        json_schema_extra=default_is(
            "micro-batch size x accumulation x processes / --sequence-parallel"
        ),
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this norm; 0 switches clipping off."
    )
    max_skipped_steps: int = Field(
        3,
        ge=0,
        description="Steps in a row that may be skipped because their loss or gradient is not "
        "finite; one more ends the run and names the rows of that step.",
    )
