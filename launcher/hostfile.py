"""DeepSpeed's hostfile. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path

from lorasb_ds.config import ConfigError


def read_hostfile(path: str) -> dict[str, int]:
    """Host -> its slots, from lines of ``host slots=N``; ``#`` begins a comment.

    Raises:
        ConfigError: if there is no such file (DeepSpeed would run on this host alone), or a line is
            no such line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"--hostfile {path}: there is no such file. Name one of lines `host slots=N`."
        )
    hosts: dict[str, int] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if match is None or int(match[2]) < 1 or match[1] in hosts:
            raise ConfigError(
                f"--hostfile {path}, line {number}: {text!r} is not `host slots=N` with N above 0 "
                "and a host that no other line names. Mend the line."
            )
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host. Add lines of `host slots=N`.")
    return hosts
