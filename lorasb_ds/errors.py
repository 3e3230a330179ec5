"""The errors that a user can do something about."""

from __future__ import annotations

LONGEST_PROBLEM = 1500  # characters: less than a screen


class ConfigError(Exception):
    """A request that cannot be carried out; the command ends with exit status 2.

    What it says may quote files and names of others: control characters, which could move a
    terminal's cursor, become spaces, and what is longer than a screen loses its middle.

    Args:
        problems: one paragraph for each.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(_for_a_terminal, problems))
        super().__init__("\n\n".join(self.problems))


class JobError(Exception):
    """The processes of a run have ended before it did, or another rank has ended it.

    Attributes:
        status: of `lorasb train` (docs/resuming.md lists them).
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(_for_a_terminal(message))
        self.status = status


def printable(text: str, kept: str = "") -> str:
    """Return somebody else's text with spaces for what could move a terminal's cursor.

    Args:
        kept: control characters that stay.
    """
    return "".join(c if c.isprintable() or c in kept else " " for c in text)


def _for_a_terminal(text: str) -> str:
    text = printable(text, kept="\n")
    if len(text) <= LONGEST_PROBLEM:
        return text
    half = LONGEST_PROBLEM // 2
    return f"{text[:half]} … {text[-half:]}"


def option_name(field: str) -> str:
    """Return a field's name on the command line: ``init_lr`` -> ``--init-lr``."""
    return "--" + field.replace("_", "-")
