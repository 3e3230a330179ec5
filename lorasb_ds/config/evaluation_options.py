"""Options of evaluations during training, and what follows from them."""

from __future__ import annotations

from pydantic import Field

from lorasb_ds.config.option_group import OptionGroup, default_is


class EvaluationOptions(OptionGroup):
    eval_every: int | None = Field(
        None,
        ge=1,
        description="Measure the held-out loss every so many steps, and keep the best checkpoint.",
        json_schema_extra=default_is("only before training and at the end"),
    )
    generate_samples: int = Field(
        0, ge=0, description="Held-out rows that are answered at every such evaluation."
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="End after so many evaluations in a row without a new best held-out loss; the "
        "adapter is the best one's. Needs --eval-every.",
    )
    early_stopping_threshold: float = Field(
        0.0,
        ge=0,
        description="A new best held-out loss counts for --early-stopping-patience if it is lower "
        "than the last one by more than this.",
    )
    load_best_model_at_end: bool = Field(
        False, description="Save the adapter of the best evaluation, not of the last step."
    )
    track_alignment: int | None = Field(
        None,
        ge=1,
        description="Every so many steps, measure how much of the full gradient the adapter's "
        "subspace holds, and how the last step agrees with that of full fine-tuning: "
        "alignment.jsonl and alignment.png.",
    )
