"""Names of models and data in the files that a run leaves.

A path that is stored is absolute: it means the same from every folder. What is stored and is not
absolute is a hub's name (or "demo", or an address of reasoning-gym). Files of earlier versions may
have relative paths: ``ABSOLUTE`` in a run.json says that it has none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lorasb_ds.config.chat_templates import TEMPLATES
from lorasb_ds.config.data_options import REASONING_GYM
from lorasb_ds.config.methods import PEFT_PREFIX
from lorasb_ds.config.paths import DEMO_MODEL, expand_home
from lorasb_ds.errors import ConfigError, option_name

ABSOLUTE = "absolute_paths"
# The fields of RunConfig that may name files or folders; those that may be hub names come first.
NAMES = ("model", "data", "eval_data", "init_data")
PATHS = ("ds_config", "init_from", "resume", "output_dir")


def absolute(name: str) -> str:
    """Return a path that exists as an absolute one, links as they are; any other name as it is."""
    path = expand_home(name)
    if name.startswith(REASONING_GYM) or not os.path.exists(path):  # noqa: PTH110
        return name
    return os.path.abspath(path)  # noqa: PTH100


def with_absolute_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of RunConfig, with absolute paths."""
    found = dict(options)
    for field in (*NAMES, *PATHS):
        value = found.get(field)
        if field == "model" and value == DEMO_MODEL:
            continue
        if isinstance(value, str):
            found[field] = absolute(value) if field in NAMES else _absolute_path(value)
        elif isinstance(value, list | tuple):
            found[field] = type(value)(absolute(str(one)) for one in value)
    if (template := found.get("chat_template")) not in (None, *TEMPLATES):
        found["chat_template"] = _absolute_path(str(template))
    if str(found.get("method")).startswith(PEFT_PREFIX):
        file = str(found["method"]).removeprefix(PEFT_PREFIX)
        found["method"] = f"{PEFT_PREFIX}{_absolute_path(file)}"
    return found


def _absolute_path(path: str) -> str:
    if path == "auto":  # of --resume
        return path
    return os.path.abspath(expand_home(path))  # noqa: PTH100


def check_no_folder_has_the_name(run_json: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Refuse hub names of a run.json where a folder or file here has the same name.

    Args:
        run_json: its content. One without ``ABSOLUTE`` may mean what is here.
        fields: the fields of RunConfig that are taken from it.
    Raises:
        ConfigError: naming the folder.
    """
    if not run_json.get(ABSOLUTE):
        return
    for field in NAMES:
        value = fields.get(field)
        for name in [value] if isinstance(value, str) else value or ():
            if not os.path.isabs(name) and absolute(name) != name:  # noqa: PTH117
                flag = option_name(field)
                raise ConfigError(
                    f"{flag}: the run's {name} is the hub's, and {absolute(name)} has the same "
                    f"name. Give {flag} ./{name} if that is meant, or work in another folder."
                )
