"""The Dockerfile: a linter's verdict, what it builds from, and its pip lines in an environment."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.specifiers import SpecifierSet

from launcher.hosts.environment import is_secret
from tests.integration.test_wheel import SOURCES
from tests.runs import ROOT, run_command

PYTHON_OF_UBUNTU = {"22.04": "3.10", "24.04": "3.12"}


class Instruction(NamedTuple):
    name: str
    arguments: str


def instructions() -> list[Instruction]:
    """Those of the Dockerfile, without comments, each on one line."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.startswith("#"))
    return [
        Instruction(*line.split(maxsplit=1)) for line in re.sub(r"\\\n", " ", text).splitlines()
    ]


def all_of(name: str) -> list[str]:
    return [one.arguments for one in instructions() if one.name == name]


def test_it_is_valid() -> None:
    """By hadolint, whose parser is not docker's own: no docker has built it here."""
    found = json.loads(run_command("hadolint", "--format", "json", "Dockerfile"))
    assert found == []


def test_what_it_builds_from() -> None:
    (base,) = all_of("FROM")
    pinned = re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu(\d\d\.\d\d)", base)
    assert pinned, f"{base}: a release of CUDA with nvcc, and one of Ubuntu"
    (wanted,) = re.findall(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert PYTHON_OF_UBUNTU[pinned[1]] in SpecifierSet(wanted)
    installs = [c for run in all_of("RUN") for c in run.split("&&") if "pip install" in c]
    assert len(installs) == 3
    for command in installs:
        words = shlex.split(command)
        assert {"constraints.txt", "--no-deps"} & {*words}, f"{command}: its versions are not fixed"
        assert not any("==" in word for word in words), "versions are in constraints.txt"


def test_who_it_runs_as_and_what() -> None:
    (user,) = all_of("USER")
    assert int(user) > 0
    assert f"--uid {user}" in " ".join(all_of("RUN"))
    assert json.loads(all_of("ENTRYPOINT")[0]) == ["lorasb"]
    names = re.findall(r"(\w+)=", " ".join([*all_of("ENV"), *all_of("ARG")]))
    assert {"PATH", "HF_HOME", "TORCH_EXTENSIONS_DIR"} <= {*names}
    assert not [name for name in names if is_secret(name)]


def test_what_is_copied_into_it() -> None:
    """All that the wheel is made of, and nothing that the context leaves out."""
    copied = {word for line in all_of("COPY") for word in line.split()[:-1]}
    assert copied == {*SOURCES, "constraints.txt"}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


@pytest.mark.slow
def test_its_pip_lines(tmp_path: Path) -> None:
    """In an environment whose dependencies are these tests' own: torch's wheel for GPUs is large.

    The sources come as the image gets them: dependencies are installed without the code.
    """
    environment, source = tmp_path / "environment", tmp_path / "source"
    venv.create(environment, with_pip=True, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    variables |= {"PATH": path, "EXTRAS": "eval", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*command: str, cwd: Path = source) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    source.mkdir()
    ran = 0
    for name, arguments in instructions():
        if name == "COPY":
            *sources, target = arguments.split()
            for one in sources:
                to = source / target / ("" if target != "./" else one)
                if (ROOT / one).is_dir():
                    shutil.copytree(ROOT / one, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / one, to)
        elif name == "RUN" and "pip install" in arguments:
            run("sh", "-c", arguments)
            ran += 1
    assert ran == 2
    assert run("lorasb", "--version", cwd=tmp_path).startswith("lorasb, version")
    where = run("python", "-c", "import lorasb_ds; print(lorasb_ds.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(packages)
    assert (packages / "ds_configs/zero3.json").is_file()
    assert sys.prefix not in where
