"""Options of what a run writes: its folder, checkpoints, profile and tracker."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from lorasb_ds.config.option_group import OptionGroup, default_is
from lorasb_ds.config.paths import expand_home


class OutputOptions(OptionGroup):
    output_dir: str | None = Field(
        None,
        description="Folder of the run.",
        json_schema_extra=default_is("runs/MODEL-DATE-TIME"),
    )
    overwrite: bool = Field(False, description="Write into an output folder that is not empty.")
    resume: str | None = Field(
        None,
        min_length=1,
        description="Go on from a checkpoint: 'auto' (the newest of --output-dir that is whole, or "
        "from the start if there is none), a run's folder, or one of its checkpoints; with a "
        "folder, that run's options hold.",
    )
    save_every: int = Field(
        100, ge=1, description="Steps between two checkpoints; there is one at the end, too."
    )
    keep_last: int = Field(
        2, ge=1, description="Checkpoints that are kept, beside that of the best evaluation."
    )
    on_save_error: Literal["stop", "continue"] = Field(
        "stop",
        description="What to do when a checkpoint or a row of numbers cannot be written (a full "
        "disk); the checkpoint before it is kept in any case.",
    )
    profile: int | None = Field(
        None,
        ge=1,
        description="Profile so many steps after the first, with what is done between them: a "
        "trace in profile.json.gz for ui.perfetto.dev or chrome://tracing, and the ten most "
        "expensive operations. Rank 0 only.",
    )
    report_to: Literal["none", "wandb", "trackio"] = Field(
        "none",
        description="Experiment tracker that gets the numbers, too, by the account that it finds "
        "on rank 0's host. Its package must be installed.",
    )

    @field_validator("output_dir", "resume")
    @classmethod
    def _at_home(cls, value: str | None) -> str | None:
        return None if value is None else expand_home(value)
