"""Files of ours have the mode that the umask says, whoever writes them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasb_ds.adapters.peft_writer import save_peft_adapter
from lorasb_ds.runs.checkpoint import write_checkpoint
from lorasb_ds.system.files import write_json, written_aside
from lorasb_ds.system.safetensors_writer import save_tensors


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_modes(umask: int, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0)}
    save_tensors(tmp_path / "basis.safetensors", tensors, {"format": "pt"})
    write_json(tmp_path / "run.json", {})
    write_checkpoint(tmp_path, tensors, {"progress": {}}, 3)
    names = ["q_proj"]
    save_peft_adapter(tmp_path / "adapter", tensors, r=1, target_modules=names, base_model=None)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 7
    assert modes(tmp_path) == {0o666 & ~umask}
    assert load_file(tmp_path / "basis.safetensors")["a"].tolist() == [0, 1, 2]


def test_what_was_there_has_no_say(umask: int, tmp_path: Path) -> None:
    """Neither the old file's mode nor that of one that was left half written."""
    for name in ("file", "file.tmp"):
        (tmp_path / name).touch(mode=0o600)
    with written_aside(tmp_path / "file") as aside:
        aside.chmod(0o640)  # as a writer would
    assert modes(tmp_path) == {0o666 & ~umask}

    def fail_half_way() -> None:
        with written_aside(tmp_path / "file") as aside:
            aside.write_text("a part")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert (tmp_path / "file").read_text() == ""


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """As on a full disk, whose error names none; nothing is left of it."""
    path = tmp_path / "whole.json"
    path.write_text("old")

    def write() -> None:
        with written_aside(path) as aside:
            aside.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device: '.*whole\.json'"):
        write()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["whole.json"]
