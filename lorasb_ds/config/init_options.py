"""Options of the init: its sample, its step, its memory, or an earlier run's basis in its place."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lorasb_ds.config.option_group import OptionGroup, default_is
from lorasb_ds.config.paths import expand_home


class InitOptions(OptionGroup):
    init_samples: int | None = Field(
        None,
        ge=1,
        description="Training rows in the init's sample, of which one in eight is held back to "
        "measure losses on.",
        json_schema_extra=default_is("0.1 % of them, at least 64"),
    )
    init_seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="Seed of the init, and of the rows in its sample.",
        json_schema_extra=default_is("--seed"),
    )
    init_lr: Annotated[float, Field(gt=0)] | Literal["auto", "schedule"] | None = Field(
        None,
        description="Eta, the learning rate of the step that the init takes: a number, 'schedule' "
        "(that of --lr and its warmup in the next step), or 'auto' (the best of a handful, "
        "measured on the held-back rows).",
        json_schema_extra=default_is("auto; with --init-from, that init's"),
    )
    init_micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Rows per process and micro-batch in the init. More rows save time: weights "
        "are gathered, and gradients exchanged and summed, once for each micro-batch.",
        json_schema_extra=default_is("--micro-batch-size"),
    )
    init_update: Literal["sign", "adam", "raw", "adafactor", "muon"] | None = Field(
        None,
        description="The step that lora-sb's init imitates: sign of the gradient (the paper), "
        "g/(|g|+epsilon) (AdamW's first step), the gradient itself (SGD's), Adafactor's or Muon's "
        "first step.",
        json_schema_extra=default_is("the first step of --optimizer"),
    )
    init_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of a process for the init's gradients and SVD, beside base and "
        "activations (host memory counts, too). Layers, and the experts of a block, are then taken "
        "in groups, which costs about one more forward pass; a pass for each group of a block that "
        "does not fit whole, and in models that cannot be cut into segments.",
        json_schema_extra=default_is("no limit"),
    )
    init_offload: bool = Field(False, description="Keep the init's gradient shards in host memory.")
    rebase_every: int | None = Field(
        None,
        ge=1,
        description="Optimizer steps after which the update so far is kept as it is and another "
        "init, from the gradient at the present weights, makes the next basis; again and again. "
        "The adapter's rank grows by r each time.",
        json_schema_extra=default_is("one basis for the whole run"),
    )
    init_from: str | None = Field(
        None,
        description="Folder of an earlier `lorasb init` or train run whose basis is taken instead "
        "of computing one; r may be smaller than its r.",
    )

    @field_validator("init_from")
    @classmethod
    def _at_home(cls, value: str | None) -> str | None:
        return None if value is None else expand_home(value)
