"""The wheel: what it installs, and that its commands work from any folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.runs import ROOT, metrics, word_rows, write_jsonl

pytestmark = pytest.mark.slow
SOURCES = ("launcher", "lorasb_ds", "ds_configs", "pyproject.toml", "README.md", "LICENSE")
Lorasb = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: the build leaves folders beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def lorasb(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Lorasb:
    """`lorasb` of an environment with the wheel, in a folder; dependencies are these tests' own.

    Their folder is one of many on its path, whose .pth files (this clone's) are not read. A module
    with a name of Python's own is not imported.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (packages / "hmac.py").write_text("raise ImportError('Python has its own')")
    pip("--python", environment / "bin/python", "install", "-q", "--no-deps", wheel)

    def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        command = [environment / "bin/lorasb", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    return run


def pip(*words: object) -> None:
    words = ("--disable-pip-version-check", *words)
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True, timeout=300)


def test_what_it_installs(wheel: Path) -> None:
    """Every module and every ds_config, and no more names than CONTRIBUTING says."""
    with ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in installed} == {"launcher", "lorasb_ds", "ds_configs"}
    wanted = ["launcher/**/*.py", "lorasb_ds/**/*.py", "lorasb_ds/py.typed", "ds_configs/*"]
    files = {path for pattern in wanted for path in ROOT.glob(pattern)}
    assert installed == {str(path.relative_to(ROOT)) for path in files}


def test_commands_without_torch(lorasb: Lorasb, tmp_path: Path) -> None:
    assert "fine-tune" in lorasb(tmp_path, "--help").stdout.lower()
    planned = lorasb(tmp_path, "plan", "--model", "llama-3.2-3b")
    assert "lorasb train --num-gpus 8" in planned.stdout, planned.stderr
    checked = lorasb(tmp_path, "doctor", "--num-procs", "1", "--timeout", "120")
    assert "site-packages/ds_configs/zero2.json" in checked.stdout, checked.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["zero3", "zero3.json", "ds_configs/zero3.json"])
def test_shipped_ds_configs(lorasb: Lorasb, tmp_path: Path, name: str) -> None:
    tried = ("--ds-config", name, "--num-procs", "1", "--dry-run")
    done = lorasb(tmp_path, "train", *tried)
    assert done.returncode == 0, done.stderr
    assert "site-packages/launcher/jobs/agent.py" in done.stdout
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("{")
    done = lorasb(tmp_path, "train", *tried)
    assert done.returncode == 2
    assert f"--ds-config {name} is not valid JSON" in done.stderr, "the user's own comes first"


def test_training(lorasb: Lorasb, tmp_path: Path, tiny_model: Path) -> None:
    """Agent, worker and ds_config are found in the environment."""
    rows = write_jsonl(tmp_path / "rows.jsonl", word_rows(16))
    options = (
        f"--model {tiny_model} --data {rows} --dtype fp32 --r 4 --max-steps 2 --init-samples 4"
    )
    words = ["train", "--num-procs", "2", *options.split(), "--output-dir", "out"]
    done = lorasb(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in metrics(tmp_path / "out") if "loss" in row] == [1, 2]
