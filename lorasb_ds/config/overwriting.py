"""What --overwrite may replace: what our own commands have left in a folder, and nothing else.

Folders of other tools have the same names in them (checkpoints/, adapter/, wandb/, report.md), so
that names alone decide nothing: each kind of folder is known by a file that only we write.
Standard library only at run time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorasb_ds.errors import ConfigError

NUM_NAMED = 4  # files in a message


def check_replaceable(
    option: str, folder: Path, overwrite: bool, foreign: Callable[[Path], Sequence[str]], kind: str
) -> None:
    """Refuse to write into a folder that is not empty, unless it may be overwritten and is ours.

    Args:
        option: that names the folder, for messages.
        overwrite: whether the folder's content may be replaced.
        foreign: returns the names in the folder that are not of ``kind``.
        kind: of folder that may be replaced, for messages.
    Raises:
        ConfigError: if the folder may not be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{option} {folder} is a file. Name a folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"{option} {folder} is not empty. Name another folder, or give --overwrite."
        )
    if names := foreign(folder):
        more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
        raise ConfigError(
            f"{option} {folder} is not empty, and is not {kind}: --overwrite does not touch what "
            f"is there ({', '.join(names[:NUM_NAMED])}{more}). Name another folder, or empty it."
        )


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
