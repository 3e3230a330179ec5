"""Options of DeepSpeed: its configuration, and what to do when memory will not suffice."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lorasb_ds.config.option_group import OptionGroup, default_is
from lorasb_ds.config.paths import SHIPPED_DS_CONFIGS

DEFAULT_DS_CONFIG = str(SHIPPED_DS_CONFIGS / "zero3.json")
SINGLE_PROCESS_DS_CONFIG = str(SHIPPED_DS_CONFIGS / "zero2.json")


class DeepSpeedOptions(OptionGroup):
    ds_config: str = Field(
        DEFAULT_DS_CONFIG,
        description="DeepSpeed configuration (JSON). 'auto' values are filled from these options; "
        "its numbers win over options that are not given.",
        json_schema_extra=default_is(
            f"the shipped {Path(DEFAULT_DS_CONFIG).name}; on one process "
            f"{Path(SINGLE_PROCESS_DS_CONFIG).name}"
        ),
    )
    force: bool = Field(
        False, description="Start although the predicted memory is more than what is free."
    )
