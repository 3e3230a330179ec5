"""The options of a run, once, for `lorasb train` and the worker: made from RunConfig's fields."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import ConfigError, option_name

FIELDS = (
    "prompt_column",
    "response_column",
    "max_length",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "ds_config",
    "attn_implementation",
    "trust_remote_code",
    "overwrite",
)


Command = TypeVar("Command", bound=Callable[..., Any])

# DeepSpeed's users write underscores: --ds_config is --ds-config, and so for every option.
CONTEXT = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


def reports_problems(command: Callable[..., Any]) -> Callable[..., Any]:
    """End with 2 and the problems when what was asked for cannot be done, with 1 by the system."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            click.echo(f"lorasb: error: {error}", err=True)
            sys.exit(2)
        except OSError as error:  # a full disk, a name that is too long, no permission
            click.echo(f"lorasb: error: {error}", err=True)
            sys.exit(1)

    return wrapper


def check_picture(path: Path) -> None:
    """ConfigError unless a picture can be written there."""
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ConfigError(f"--output {path} must be a .png file in a folder that is there.")


def run_options(command: Command) -> Command:
    """Add every field of RunConfig as an option, and --config. None means not given."""
    command = field_options(*RunConfig.model_fields)(command)
    return click.option(
        "--config",
        "run_json",
        metavar="RUN.JSON",
        help="Replay an earlier run from its run.json; options that are given win over it.",
    )(command)


def field_options(*names: str) -> Callable[[Command], Command]:
    """Add some fields of RunConfig as options. None means not given."""
    return add_options(*(_option(name, RunConfig.model_fields[name]) for name in names))


def add_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options, or groups of them, which --help shows in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    help_text = str(field.description)
    if "[default:" not in help_text and field.default is not None:
        default = str(field.default).lower() if field.annotation is bool else field.default
        default = " ".join(default) if isinstance(default, tuple) else default
        help_text += f" [default: {default}]"
    flag = option_name(name)
    kind = _plain_type(field.annotation)
    if get_origin(kind) is tuple:
        if _plain_type(get_args(kind)[0]) is str:
            return click.option(
                flag, name, multiple=True, callback=lambda _1, _2, v: v or None, help=help_text
            )
        kind = str  # numbers, separated by commas
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=help_text)
    if get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(kind)), help=help_text)
    return click.option(flag, name, type=kind, help=help_text)


def _plain_type(annotation: Any) -> Any:
    """``int | None`` -> ``int``; of several types, ``str``: pydantic tells them apart."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (types.UnionType, Union):
        kinds = [a for a in get_args(annotation) if a is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation


def to_arguments(given: Mapping[str, Any]) -> list[str]:
    """Options as the command line has them; what is None is left out."""
    arguments: list[str] = []
    for name, value in given.items():
        if value is None:
            continue
        flag = option_name(name)
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            arguments += [word for one in value for word in (flag, str(one))]
        else:
            arguments += [flag, str(value)]
    return arguments
