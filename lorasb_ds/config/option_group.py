"""What the groups of options in this package have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from lorasb_ds.errors import option_name

DEFAULT_TEXT = "default_text"


class OptionGroup(BaseModel):
    """Options that belong together: each field is an option of `lorasb train`.

    A field's description is its help. ``model_fields_set`` has the fields that were asked for.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def default_is(text: str) -> dict[str, Any]:
    """Return the ``json_schema_extra`` of a field whose default is a rule, put into words."""
    return {DEFAULT_TEXT: text}


def default_text(field: FieldInfo) -> str | None:
    """Return a field's default as `--help` shows it; None if there is nothing to show."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and DEFAULT_TEXT in extra:
        return str(extra[DEFAULT_TEXT])
    if field.default is None:
        return None
    if isinstance(field.default, tuple):
        return " ".join(map(str, field.default))
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def to_arguments(given: Mapping[str, Any]) -> list[str]:
    """Return options as words of a command line, without those that are None."""
    arguments: list[str] = []
    for name, value in given.items():
        if value is None:
            continue
        flag = option_name(name)
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple | list) and all(isinstance(one, str) for one in value):
            arguments += [word for one in value for word in (flag, one)]
        elif isinstance(value, tuple | list):  # numbers
            arguments += [flag, ",".join(map(str, value))]
        else:
            arguments += [flag, str(value)]
    return arguments
