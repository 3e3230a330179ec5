"""What every part of the project raises when a user's request cannot be carried out."""

from __future__ import annotations


class ConfigError(Exception):
    """What a user asked for cannot be done. One paragraph per problem; the command ends with 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n\n".join(problems))
        self.problems = problems


def option_name(field: str) -> str:
    """The command line's name of a field: ``init_lr`` -> ``--init-lr``."""
    return "--" + field.replace("_", "-")
