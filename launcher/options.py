"""The options of a run, for `lorasb train` and the worker: made from RunConfig's fields."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from launcher.aliases import our_name
from launcher.sections import SectionedOption
from launcher.settings import given_by, settings_option
from lorasb_ds.config.adapter_options import AdapterOptions
from lorasb_ds.config.data_options import DataOptions
from lorasb_ds.config.deepspeed_options import DeepSpeedOptions
from lorasb_ds.config.evaluation_options import EvaluationOptions
from lorasb_ds.config.init_options import InitOptions
from lorasb_ds.config.model_options import ModelOptions
from lorasb_ds.config.option_group import OptionGroup, default_text
from lorasb_ds.config.output_options import OutputOptions
from lorasb_ds.config.resolve import replaced_by
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.training_options import TrainingOptions
from lorasb_ds.errors import ConfigError, option_name

# The sections of --help.
SECTIONS: dict[str, type[OptionGroup]] = {
    "Model": ModelOptions,
    "Data": DataOptions,
    "Adapter": AdapterOptions,
    "Init": InitOptions,
    "Training": TrainingOptions,
    "DeepSpeed": DeepSpeedOptions,
    "Evaluation during training": EvaluationOptions,
    "Output and checkpoints": OutputOptions,
}
# Fields that `lorasb eval` has, too.
EVAL_FIELDS = (
    "task_type",
    "prompt_column",
    "response_column",
    "chat_template",
    "template_date",
    "max_length",
    "max_skipped_rows",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "ds_config",
    "attn_implementation",
    "trust_remote_code",
    "overwrite",
)

# Options of `launch_options` of which there is one.
COUNTS = {"num_procs", "num_gpus"}

Command = TypeVar("Command", bound=Callable[..., Any])

# Options may be written with underscores, as DeepSpeed's are: --ds_config is --ds-config.
CONTEXT = {
    "token_normalize_func": our_name,
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}


def reports_problems(command: Callable[..., Any]) -> Callable[..., Any]:
    """End a command with its problems: exit status 2 for ConfigError, 1 for OSError.

    A reader that has gone (`lorasb plan … | head -1`) is none: click ends in silence.
    """

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ConfigError as error:
            click.echo(f"lorasb: error: {error}", err=True)
            sys.exit(2)
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, a name that is too long, no permission
            click.echo(f"lorasb: error: {error}", err=True)
            sys.exit(1)

    return wrapper


def check_picture(path: Path) -> None:
    """Raise ConfigError unless a picture can be written to a path."""
    if path.suffix != ".png" or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {path} must be a .png file in a folder that can be written.")


def run_options(command: Command) -> Command:
    """Add every field of RunConfig as an option, and --config; the value None means not given."""
    return with_settings(replays=True)(field_options(*RunConfig.model_fields)(command))


def with_settings(*, replays: bool) -> Callable[[Command], Command]:
    """Add --config; what is given replaces what the file has, other options of it included.

    Args:
        replays: of ``settings_option``.
    """

    def add(command: Command) -> Command:
        @wraps(command)
        def wrapper(**options: Any) -> Any:
            ctx = click.get_current_context()
            by_file = given_by(ctx, ParameterSource.DEFAULT_MAP)
            asked = {n: ctx.params.get(n) for n in given_by(ctx, ParameterSource.COMMANDLINE)}
            gives_way = replaced_by(asked, ctx.default_map or {})
            if COUNTS & asked.keys():
                gives_way |= COUNTS
            replaced = sorted(by_file & options.keys() & gives_way)
            if replaced:
                names = ", ".join(map(option_name, replaced))
                click.echo(f"lorasb: of the file, {names} gives way to what is given", err=True)
            return command(**options | dict.fromkeys(replaced))

        return settings_option(replays=replays)(wrapper)  # type: ignore[return-value]

    return add


def field_options(*names: str) -> Callable[[Command], Command]:
    """Add some fields of RunConfig as options; the value None means not given."""
    return add_options(*(_option(name, RunConfig.model_fields[name]) for name in names))


def add_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options in the order in which --help shows them."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    shown = default_text(field)
    attributes: dict[str, Any] = {
        "cls": SectionedOption,
        "section": next(s for s, group in SECTIONS.items() if name in group.model_fields),
        "help": f"{field.description} [default: {shown}]" if shown else field.description,
    }
    flag = option_name(name)
    kind = _plain_type(field.annotation)
    if get_origin(kind) is tuple:
        if _plain_type(get_args(kind)[0]) is str:
            attributes |= {"multiple": True, "callback": lambda _1, _2, value: value or None}
            return click.option(flag, name, **attributes)
        kind = str  # numbers, separated by commas
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, **attributes)
    if get_origin(kind) is Literal:
        kind = click.Choice(get_args(kind))
    return click.option(flag, name, type=kind, **attributes)


def _plain_type(annotation: Any) -> Any:
    """Return ``int`` for ``int | None``; ``str`` for several types, which pydantic tells apart."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if get_origin(annotation) in (types.UnionType, Union):
        kinds = [a for a in get_args(annotation) if a is not type(None)]
        return kinds[0] if len(kinds) == 1 else str
    return annotation
