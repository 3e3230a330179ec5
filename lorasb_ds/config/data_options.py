"""Options of the data: rows, how they become tokens, and how tokens become batches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from lorasb_ds.config.chat_templates import TEMPLATES
from lorasb_ds.config.option_group import OptionGroup, default_is

REASONING_GYM = "reasoning-gym:"  # begins the address of generated rows
DEMO_DATA = f"{REASONING_GYM}word_sequence_reversal?max_words=6&size=1000&seed=1"
DEMO_EVAL_DATA = f"{REASONING_GYM}word_sequence_reversal?max_words=6&size=64&seed=2"


def _default_eval_data(fields: Mapping[str, Any]) -> str | None:
    """Return held-out rows for the demo's data, and for no other."""
    is_demo = fields.get("data") == (DEMO_DATA,) and fields.get("val_set_size") is None
    return DEMO_EVAL_DATA if is_demo else None


def _today() -> str:
    return date.today().isoformat()


class DataOptions(OptionGroup):
    task_type: Literal["causal-lm", "sequence-classification"] = Field(
        "causal-lm",
        description="What is learned: the tokens of responses, or the label of each row, by an "
        "encoder or a decoder with a classification head that is trained, too "
        "(docs/classification.md).",
    )
    data: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (DEMO_DATA,),
        min_length=1,
        description="Training rows: a .json/.jsonl/.csv/.parquet file, a folder saved by "
        "`datasets`, a hub name (NAME[:CONFIG][@SPLIT], a split also as train[:1000]), or "
        "'reasoning-gym:NAME?size=N&seed=S'. May be given several times.",
    )
    data_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="How often an epoch sees the rows of each --data, in their order, separated "
        "by commas: 2,0.5.",
        json_schema_extra=default_is("once"),
    )
    val_set_size: float | None = Field(
        None,
        gt=0,
        description="Hold out training rows in place of --eval-data, chosen by --seed: a fraction "
        "of them if below 1, else their number.",
        json_schema_extra=default_is("none"),
    )
    eval_data: str | None = Field(
        default_factory=_default_eval_data,
        description="Held-out rows, in any form --data takes; their loss is measured before the "
        "init, after it and at the end.",
        json_schema_extra=default_is("none; with the demo's data, 64 other rows"),
    )
    init_data: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None,
        min_length=1,
        description="Rows for the init in place of --data's, in any form that --data takes: init "
        "on one task, train on another. May be given several times.",
    )
    prompt_column: str | None = Field(
        None,
        description="Column with the prompt.",
        json_schema_extra=default_is(
            "row by row, the first found of question, query, prompt, instruction(+input), "
            "messages, conversations, text"
        ),
    )
    response_column: str | None = Field(
        None,
        description="Column with the response.",
        json_schema_extra=default_is(
            "the prompt column's partner: answer, response, completion, output; messages and "
            "conversations bring theirs"
        ),
    )
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the model's: a file with one, as "
        f"chat_template.jinja, or {', '.join(TEMPLATES)}.",
        json_schema_extra=default_is("the model's; a plain one if it has none"),
    )
    template_date: str = Field(
        default_factory=_today,
        description="Date that chat templates get which write today's date (Llama 3's), as "
        "YYYY-MM-DD.",
        json_schema_extra=default_is(
            "that of the run that is resumed, replayed, evaluated or "
            "named by --init-from, else today"
        ),
    )
    loss_on: Literal["responses", "last", "all"] = Field(
        "responses",
        description="What is learned of a conversation: every turn of the assistant, its last "
        "one, or every token.",
    )
    max_length: int = Field(
        1024, ge=8, description="Longest row in tokens; --truncation decides about longer ones."
    )
    truncation: Literal["right", "left", "skip"] = Field(
        "right",
        description="Which end of a row that is longer than --max-length is cut off; or skip it.",
    )
    max_skipped_rows: str | None = Field(
        None,
        description="How many rows of a source may be skipped for one reason, a number or a "
        "percentage of them (100, 10%); more of them end the run before it starts. Those that "
        "--truncation skip skips do not count.",
        json_schema_extra=default_is("5%, or 20 rows where that is more"),
    )
    dataset_num_proc: int | None = Field(
        None,
        ge=1,
        description="Processes that tokenize new data, on one host.",
        json_schema_extra=default_is("by the amount of work, up to the number of cores"),
    )
    packing: bool = Field(
        False,
        description="Put several short rows into one of --max-length tokens (best-fit decreasing); "
        "none sees another. --micro-batch-size then counts packs.",
    )
    group_by_length: bool = Field(
        True,
        description="Batch rows of similar lengths (sorted among those of 50 steps), to pad less; "
        "the order of steps stays random.",
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**32,
        description="Seed of the rows' order, samples, what is held out, the init and dropout.",
    )

    @property
    def classifies(self) -> bool:
        """Whether rows have a label, and the model a classification head."""
        return self.task_type == "sequence-classification"

    @field_validator("data", "init_data", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("data_weights", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("max_skipped_rows")
    @classmethod
    def _number_or_percentage(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9]+|[0-9]+(\.[0-9]+)?%", value):
            raise ValueError("Give a number of rows, or a percentage such as 5%")
        return value

    def skippable_rows(self, num_rows: int) -> int:
        """Return how many of a source's rows may be skipped for one reason."""
        if self.max_skipped_rows is None:
            return max(20, num_rows // 20)
        if self.max_skipped_rows.endswith("%"):
            return int(num_rows * Fraction(self.max_skipped_rows[:-1]) / 100)
        return int(self.max_skipped_rows)

    @field_validator("template_date")
    @classmethod
    def _a_date(cls, value: str) -> str:
        try:
            return date.fromisoformat(value).isoformat()
        except ValueError:
            raise ValueError("Give a date as YYYY-MM-DD") from None

    @field_validator("val_set_size")
    @classmethod
    def _fraction_or_number(cls, value: float | None) -> float | None:
        if value is not None and value >= 1 and not value.is_integer():
            raise ValueError("Give a fraction below 1, or a whole number of rows")
        return value
