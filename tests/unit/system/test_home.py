"""Users without a home folder, or with one that cannot be written."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lorasb_ds.errors import ConfigError
from lorasb_ds.system import home
from lorasb_ds.system.home import CACHES, ensure_home
from tests.runs import ROOT

SOMEBODY = 54321  # of no passwd file


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files; the variables are put back afterwards."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("HOME", "USER", *CACHES, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return tmp_path / f"lorasb-ds-{os.getuid()}"


def nobody_knows(_: int) -> None:
    raise KeyError


def test_an_ordinary_home_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary.parent))
    before = dict(os.environ)
    ensure_home()
    assert os.environ == before
    assert not temporary.exists()


def test_without_a_home(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOGNAME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody_knows)
    ensure_home()
    assert os.environ["HOME"] == str(temporary)
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert os.environ["USER"] == str(os.getuid())
    assert Path.home() == temporary


def test_a_home_that_cannot_be_written(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write to what is writable
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("MPLCONFIGDIR", "/own")
    ensure_home()
    assert os.environ["HOME"] == "/proc", "what can be read there is read"
    assert os.environ["TORCH_EXTENSIONS_DIR"] == f"{temporary}/torch_extensions"
    assert os.environ["MPLCONFIGDIR"] == "/own"


@pytest.mark.parametrize("theirs", ["open", "link", "file"])
def test_a_folder_that_others_may_have_filled(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, theirs: str
) -> None:
    monkeypatch.setattr(pwd, "getpwuid", nobody_knows)
    if theirs == "open":
        temporary.mkdir()
        temporary.chmod(0o777)
    elif theirs == "link":
        temporary.symlink_to(temporary.parent)
    else:
        temporary.touch()
    with pytest.raises(ConfigError, match="Set HOME"):
        ensure_home()
    assert "HOME" not in os.environ


def test_no_temporary_files(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(pwd, "getpwuid", nobody_knows)
    monkeypatch.setattr(home.tempfile, "gettempdir", none)
    with pytest.raises(ConfigError, match="nor one for temporary files"):
        ensure_home()


def as_somebody(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user that no passwd file knows, without HOME."""
    somebody = ["setpriv", f"--reuid={SOMEBODY}", f"--regid={SOMEBODY}", "--clear-groups"]
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    command = [*somebody, sys.executable, *words]
    return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
@pytest.mark.skipif(not shutil.which("setpriv"), reason="there is no setpriv")
def test_the_command_of_a_user_that_nobody_knows() -> None:
    if as_somebody("-c", "import launcher.cli").returncode != 0:
        pytest.skip("others may not read the interpreter or this folder")
    with tempfile.TemporaryDirectory() as where:
        os.chown(where, SOMEBODY, SOMEBODY)
        command = ["-m", "launcher.cli", "train", "--data", "nowhere.jsonl"]
        done = as_somebody(*command, TMPDIR=where)
        assert [path.name for path in Path(where).iterdir()] == [f"lorasb-ds-{SOMEBODY}"]
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert "lorasb: error: " in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may mount")
def test_no_folder_for_temporary_files() -> None:
    """As in a container with a read-only root: torch cannot be imported there."""
    mount = 'for f in /tmp /var/tmp; do mount -t tmpfs -o ro tmpfs $f || exit 9; done; exec "$@"'
    lorasb = f"{Path(sys.executable).parent}/lorasb"
    for variables, said in (([], "Set TMPDIR"), (["TMPDIR=/dev/shm"], "hf:none")):
        command = ["env", *variables, lorasb, "plan", "--model", "hf:none"]
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", mount, "sh", *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done
        assert said in done.stderr
        assert "Traceback" not in done.stderr
