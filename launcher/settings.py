"""--config: options from a YAML or JSON file, as if they were given; and such a file, printed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click
import yaml
from click.core import ParameterSource

from launcher.aliases import our_name
from launcher.sections import OTHERS, SectionedOption, sections_of
from lorasb_ds.config.paths import JSON_BYTES, expand_home
from lorasb_ds.errors import printable

MOST_BYTES = 1 << 20  # of a file of settings
RUN = "run_json"  # the parameter that holds a run.json, which a command replays
# A file may be somebody else's: only the command line decides on these.
NOT_BY_FILE = {"trust_remote_code", "env", "launcher_args"}

Command = TypeVar("Command", bound=Callable[..., Any])


def settings_option(*, replays: bool) -> Callable[[Command], Command]:
    """Add --config to a command, whose other options it fills; those that are given win.

    Args:
        replays: the command also takes a run.json, whose path it then gets as ``run_json``.
    """

    def read(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
        if path is None:
            return None
        try:
            text = _read(path)
            if _is_run_json(text):
                if replays:
                    return path
                raise ValueError("it is the run.json of a run, which this command does not replay")
            values = parse_settings(text, _names(ctx.command))
        except OSError as error:
            raise click.BadParameter(f"{printable(path)}: {error.strerror}.", ctx, param) from None
        except ValueError as error:
            said = printable(f"{path}: {error}")
            raise click.BadParameter(f"{said.removesuffix('.')}.", ctx, param) from None
        ctx.default_map = {**(ctx.default_map or {}), **values}
        return None

    run_json = "a run.json, which repeats that run; " if replays else ""
    return click.option(
        "--config",
        RUN,
        metavar="FILE",
        is_eager=True,
        expose_value=replays,
        callback=read,
        help=f"Options by their names in YAML or JSON; {run_json}those that are given win.",
    )


def _read(path: str) -> str:
    file = Path(expand_home(path))
    if not file.is_file():
        raise ValueError("there is no such file")
    if file.stat().st_size > JSON_BYTES:
        raise ValueError(f"it has more than {JSON_BYTES >> 20} MiB")
    return file.read_text(encoding="utf-8")


def _is_run_json(text: str) -> bool:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and isinstance(content.get("config"), dict)


def _names(command: click.Command) -> dict[str, click.Option]:
    """Return the options that a file may name: --micro-batch-size as micro_batch_size."""
    return {
        word.removeprefix("--").replace("-", "_"): option
        for option in command.params
        if isinstance(option, click.Option) and option.name not in (RUN, "print_config")
        for word in option.opts
        if word.startswith("--")
    }


def parse_settings(text: str, options: Mapping[str, click.Option]) -> dict[str, Any]:
    """Read options from YAML, of which JSON is a part, as the command line would have them.

    Scalars stay as they are written: click reads them as it reads words of the command line, so
    that 1e-3 is a number, which YAML's own rules take for a text.

    Args:
        options: by all of their names.
    Returns:
        Parameter -> a text, or a list of them.
    Raises:
        ValueError: with the line that is wrong.
    """
    if len(text) > MOST_BYTES:
        raise ValueError("it has more than 1 MiB of settings")
    try:
        top = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("it is not valid YAML: it is nested too deeply") from None
    if top is None:
        return {}
    if not isinstance(top, yaml.MappingNode):
        raise ValueError("it must hold options, one in a line: lr: 1e-3")
    values: dict[str, Any] = {}
    for key, node in top.value:
        where = f"line {key.start_mark.line + 1}"
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
        name = our_name(name).replace("-", "_")
        if name not in options:
            close = get_close_matches(name, options, 1)
            hint = f"; {close[0]} is" if close else ""
            raise ValueError(f"{where}: {name!r} is not an option of this command{hint}")
        option = options[name]
        parameter = str(option.name)
        if parameter in NOT_BY_FILE:
            raise ValueError(f"{where}: {name} holds only where it is given: {option.opts[0]}")
        if parameter in values:
            raise ValueError(f"{where}: {name} is there twice")
        values[parameter] = _value(node, where, name, option.multiple)
    return {name: value for name, value in values.items() if value is not None}


def _value(node: yaml.Node, where: str, name: str, multiple: bool) -> Any:
    if isinstance(node, yaml.SequenceNode):
        words = [_word(one, where, name) for one in node.value]
        given = [word for word in words if word is not None]
        return given if multiple else ",".join(given)
    word = _word(node, where, name)
    return [word] if multiple and word is not None else word


def _word(node: yaml.Node, where: str, name: str) -> str | None:
    """Return a scalar as it is written; None for null, which means not given."""
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where}: {name} must be one value, or a list of them")
    return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)


def given_by(ctx: click.Context, *sources: ParameterSource) -> set[str]:
    """Return the parameters that come from these sources."""
    names = {str(param.name) for param in ctx.command.params}
    return {name for name in names if ctx.get_parameter_source(name) in sources}


def print_settings(ctx: click.Context, values: Mapping[str, Any]) -> str:
    """Return a file for --config: all options with their sentences, those not given as comments.

    Args:
        values: of all parameters; None: it has given way to another one.
    """
    given = given_by(ctx, ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP)
    lines = [f"# {ctx.command_path} --config FILE"]
    for section, params in sections_of(ctx.command, ctx).items():
        lines += ["", f"# == {section}", ""] if section != OTHERS else []
        for option in params:
            name = str(option.name)
            if not isinstance(option, SectionedOption) or name in (*NOT_BY_FILE, "dry_run"):
                continue
            is_given = name in given and values.get(name) is not None
            value = json.dumps(values[name], ensure_ascii=False) if is_given else ""
            lines += textwrap.wrap(
                option.help or "", 98, initial_indent="# ", subsequent_indent="# "
            )
            lines.append(f"{name}: {value}" if value else f"#{name}:")
    return "\n".join(lines)
