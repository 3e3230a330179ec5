"""scripts/setup.sh, with a Python in .venv that only notes what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT

NOTE = """#!/bin/sh
printf '%s|%s\\n' "${DS_IGNORE_CUDA_DETECTION-}" "$*" >>asked
"""


def test_deepspeed_is_installed_without_a_cuda_toolkit(tmp_path: Path) -> None:
    for name in ("constraints.txt", "pyproject.toml", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("python", "ninja"):
        program = tmp_path / ".venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(NOTE)
        program.chmod(0o755)
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("DS_")}
    environment |= {"PYTHON": sys.executable}
    subprocess.run([tmp_path / "scripts/setup.sh"], env=environment, check=True, timeout=60)
    asked = [line.split("|", 1) for line in (tmp_path / "asked").read_text().splitlines()]
    (ignores,) = (ignores for ignores, words in asked if "pip" in words and "[demo,dev]" in words)
    assert ignores == "1"
