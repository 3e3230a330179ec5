"""The error that every part of the project raises for a request that cannot be carried out."""

from __future__ import annotations


class ConfigError(Exception):
    """A request that cannot be carried out; the command ends with exit status 2.

    Args:
        problems: one paragraph for each.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n\n".join(problems))
        self.problems = problems


def option_name(field: str) -> str:
    """Return a field's name on the command line: ``init_lr`` -> ``--init-lr``."""
    return "--" + field.replace("_", "-")
