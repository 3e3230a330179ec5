"""scripts/setup.sh, with a Python in .venv that only notes what it is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT

NOTE = """#!/bin/sh
printf '%s|%s\\n' "${DS_IGNORE_CUDA_DETECTION-}" "$*" >>asked
"""


def asked(folder: Path, *options: str) -> list[str]:
    """What `scripts/setup.sh OPTIONS` has pip install beside torch: the project with its extras."""
    (folder / "asked").unlink(missing_ok=True)
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("DS_")}
    environment |= {"PYTHON": sys.executable}
    command = [folder / "scripts/setup.sh", *options]
    subprocess.run(command, env=environment, check=True, timeout=60)
    lines = [line.split("|", 1) for line in (folder / "asked").read_text().splitlines()]
    installed = [(ignores, words.split()[-1]) for ignores, words in lines if " -e " in words]
    # Without a CUDA toolkit its build would fail on a machine with a GPU.
    assert all(ignores == "1" for ignores, _ in installed)
    return [project for _, project in installed]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("constraints.txt", "pyproject.toml", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("python", "ninja"):
        program = tmp_path / ".venv/bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(NOTE)
        program.chmod(0o755)
    return tmp_path


def test_it_installs_what_is_missing_and_no_more(clone: Path) -> None:
    assert asked(clone) == [".[demo,eval]"]
    assert asked(clone) == []
    assert asked(clone, "--dev") == [".[demo,dev]"]
    assert asked(clone, "--dev") == []
    assert asked(clone) == [], "users' part is there"
    (clone / "constraints.txt").write_text("torch==2.99\n")
    assert asked(clone) == [".[demo,eval]"]
    assert asked(clone, "--dev") == [".[demo,dev]"]


def test_an_unknown_option_is_refused(clone: Path) -> None:
    command = [clone / "scripts/setup.sh", "--develop"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "[--dev] [--nodes]" in done.stderr
    assert not (clone / "asked").exists()
