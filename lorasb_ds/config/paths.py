"""Paths of the demo model, caches and shipped ds_configs; and JSON files that users name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lorasb_ds.errors import ConfigError

DEMO_MODEL = "demo"
JSON_BYTES = 1 << 26  # of a file that is read whole
SHIPPED_DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def read_json(path: str, option: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        option: the option that named the file, for messages.
    Raises:
        ConfigError: if there is no such file, or it holds no JSON object.
    """
    file = Path(expand_home(path))
    if not file.is_file():
        shipped = ", ".join(sorted(f"ds_configs/{f.name}" for f in SHIPPED_DS_CONFIGS.glob("*")))
        hint = f" Shipped configurations: {shipped}." if option == "--ds-config" else ""
        raise ConfigError(f"{option} {path}: there is no such file.{hint}")
    if file.stat().st_size > JSON_BYTES:
        raise ConfigError(
            f"{option} {path} has more than {JSON_BYTES >> 20} MiB. Name another file."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {path} is not valid JSON: {error}. Fix the file.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{option} {path} must hold a JSON object, not {type(content).__name__}.")
    return content


def expand_home(path: str) -> str:
    """Return a path without its ~, which a shell leaves in --output-dir=~/runs.

    A name like ~rows.csv, of no known user, stays as it is; ``Path.expanduser`` raises.
    """
    return os.path.expanduser(path)  # noqa: PTH111


def cache_dir() -> Path:
    """Return the folder of the demo model and of tokenized rows.

    It is ``$LORASB_CACHE``, or lorasb-ds in the user's cache folder.
    """
    if path := os.environ.get("LORASB_CACHE"):
        return Path(path).absolute()  # it is written into adapters
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "lorasb-ds"


def demo_model_dir() -> Path:
    """Return the folder that ``--model demo`` stands for; scripts/fetch_demo.py fills it."""
    return cache_dir() / "SmolLM2-135M-Instruct"
