"""Options of DeepSpeed: its configuration, and what to do when memory will not suffice."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from lorasb_ds.config.option_group import OptionGroup, default_is
from lorasb_ds.config.paths import SHIPPED_DS_CONFIGS, expand_home

DEFAULT_DS_CONFIG = str(SHIPPED_DS_CONFIGS / "zero3.json")
SINGLE_PROCESS_DS_CONFIG = str(SHIPPED_DS_CONFIGS / "zero2.json")


class DeepSpeedOptions(OptionGroup):
    ds_config: str = Field(
        DEFAULT_DS_CONFIG,
        description="DeepSpeed configuration: a JSON file, or the name of a shipped one (zero2, "
        "zero3, zero3_offload …). 'auto' values are filled from these options; its numbers win "
        "over options that are not given.",
        json_schema_extra=default_is(
            f"the shipped {Path(DEFAULT_DS_CONFIG).name}; on one process "
            f"{Path(SINGLE_PROCESS_DS_CONFIG).name}"
        ),
    )
    force: bool = Field(
        False, description="Start although the predicted memory is more than what is free."
    )

    @field_validator("ds_config")
    @classmethod
    def _find_shipped(cls, value: str) -> str:
        """Take ``zero3``, ``zero3.json`` or ``ds_configs/zero3.json`` from anywhere."""
        path = Path(expand_home(value))
        shipped = SHIPPED_DS_CONFIGS / f"{path.name.removesuffix('.json')}.json"
        is_name = str(path.parent) in (".", SHIPPED_DS_CONFIGS.name)
        return str(shipped) if is_name and not path.is_file() and shipped.is_file() else value
