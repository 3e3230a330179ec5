"""The sections of --help, and of a file of settings."""

from __future__ import annotations

from typing import Any

import click

HOSTS = "Hosts and processes"  # the section of `launch_options`
OTHERS = "Options"
# The section that comes first, and what is in it rather than in its own.
FIRST_DAY, FIRST_DAY_OF = "The first day", ("train", "init")
FIRST_DAY_OPTIONS = (
    *("run_json", "model", "data", "val_set_size", "output_dir", "num_gpus", "load_in_4bit"),
    *("method", "r", "lr", "epochs", "micro_batch_size", "max_length"),
)


class SectionedOption(click.Option):
    """An option in a section of --help."""

    def __init__(self, *args: Any, section: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose --help has a section for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, params in sections_of(self, ctx).items():
            records = [param.get_help_record(ctx) for param in params]
            with formatter.section(section):
                formatter.write_dl([record for record in records if record is not None])


def sections_of(command: click.Command, ctx: click.Context) -> dict[str, list[click.Parameter]]:
    """Return the options of a command that --help shows, by section, in its order."""
    params = {str(param.name): param for param in command.get_params(ctx)}
    first = FIRST_DAY_OPTIONS if command.name in FIRST_DAY_OF else ()
    sections: dict[str, list[click.Parameter]] = {FIRST_DAY: []}
    for name, param in ({name: params[name] for name in first} | params).items():
        section = param.section if isinstance(param, SectionedOption) else OTHERS
        if param.get_help_record(ctx) is not None:
            sections.setdefault(FIRST_DAY if name in first else section, []).append(param)
    for section in (HOSTS, OTHERS):  # to the end
        sections[section] = sections.pop(section, [])
    return {section: of for section, of in sections.items() if of}
