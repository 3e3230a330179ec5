"""Checkpoints as files: complete, or skipped."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import CHECKPOINT_FILES, check_output_dir
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.checkpoint import (
    Checkpoint,
    TrainerState,
    changed_options,
    check_same_run,
    checkpoint_path,
    find_resume,
    list_checkpoints,
    read_checkpoint,
    set_newer_aside,
    tidy,
    write_checkpoint,
)
from lorasb_ds.system.files import SUMS_FILE
from tests.runs import small_disk

MADE_FROM = {"--r": 8, "training rows": "a" * 64}


def write(folder: Path, step: int) -> Path:
    tensors = {"layer.lora_R": torch.full((3, 3), float(step))}
    content = {
        "progress": vars(TrainerState(step=step, updates=step - 1, best_loss=1.5, best_step=2)),
        "made_from": MADE_FROM,
        "options": {"--lr": 1e-3},
        "world_size": 2,
        "optimizer_scalars": {"step": float(step)},
        "loss_scale": {},
    }
    assert write_checkpoint(folder, tensors, content, step) > 0
    return checkpoint_path(folder, step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run with checkpoints of steps 2, 4 and 6."""
    (tmp_path / "run.json").write_text(json.dumps({"config": RunConfig().model_dump()}))
    for step in (2, 4, 6):
        write(tmp_path, step)
    return tmp_path


def resumed(run: Path, resume: str = "auto") -> Any:
    return find_resume(RunConfig(resume=resume, output_dir=str(run)))


def test_what_is_written_is_read(run: Path) -> None:
    found = read_checkpoint(checkpoint_path(run, 4))
    assert isinstance(found, Checkpoint)
    assert found.state == TrainerState(step=4, updates=3, best_loss=1.5, best_step=2)
    assert found.made_from == MADE_FROM
    assert found.tensors()["layer.lora_R"].unique().tolist() == [4.0]
    assert resumed(run).step == 6
    assert resumed(run).warnings == []
    assert not list(run.rglob("*.tmp"))


def test_sha256sum_reads_the_sums(run: Path) -> None:
    check = ["sha256sum", "--check", "--strict", SUMS_FILE]
    subprocess.run(check, cwd=checkpoint_path(run, 6), check=True, capture_output=True)


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, SUMS_FILE])
def test_any_flipped_byte_or_cut_is_found(run: Path, name: str) -> None:
    """Change every byte of the small files and many of the tensors'; cut or remove any file."""
    path = checkpoint_path(run, 6) / name
    whole = path.read_bytes()
    generator = random.Random(0)  # noqa: S311
    positions = range(len(whole)) if len(whole) < 700 else generator.sample(range(len(whole)), 400)
    for position in positions:
        spoilt = bytearray(whole)
        spoilt[position] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        assert isinstance(read_checkpoint(path.parent), str), position
    found = resumed(run)
    assert found.step == 4
    (warning,) = found.warnings
    assert warning.startswith("checkpoint step-00000006 is skipped: ")
    for length in {0, 1, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert isinstance(read_checkpoint(path.parent), str), length
    path.unlink()
    assert resumed(run).step == 4
    path.write_bytes(whole + b"x")
    assert resumed(run).step == 4
    path.write_bytes(whole)
    assert resumed(run).step == 6


def fail(*_: Path) -> None:
    raise OSError(5, "Input/output error")


def test_a_failed_replacement_leaves_the_old_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_checkpoint(checkpoint_path(run, 6))
    monkeypatch.setattr("lorasb_ds.runs.checkpoint.publish", fail)
    with pytest.raises(OSError, match="Input/output"):
        write(run, 6)
    assert read_checkpoint(checkpoint_path(run, 6)) == before
    assert {path.name[5:] for path in (run / "checkpoints").iterdir()} == {
        *("00000002", "00000004", "00000006"),
    }


@pytest.mark.parametrize("reader", ["resume", "tidy"])
def test_a_kill_before_the_new_one_is_there(run: Path, reader: str) -> None:
    """Between the two renames: the old one is under another name, the new one never came."""
    path = checkpoint_path(run, 6)
    shutil.copytree(path, path.with_suffix(".tmp"))
    path.replace(path.with_suffix(".old"))
    assert list_checkpoints(run)[-1] == checkpoint_path(run, 4), "the state of the folder"
    if reader == "resume":
        assert resumed(run).step == 6
        assert resumed(run) == resumed(run, str(path)), "on the next rank, too"
    tidy(run, keep_last=2, best_step=None)
    assert isinstance(read_checkpoint(path), Checkpoint)
    assert not [*run.rglob("*.old"), *run.rglob("*.tmp")]


def test_a_kill_before_the_old_one_is_removed(run: Path) -> None:
    """Of the two the new one counts, and the step can be written again."""
    path = checkpoint_path(run, 6)
    shutil.copytree(path, path.with_suffix(".old"))
    (path.with_suffix(".old") / SUMS_FILE).write_text("the old one")
    assert resumed(run).step == 6
    write(run, 6)
    assert resumed(run).warnings == []
    assert not list(run.rglob("*.old"))
    shutil.copytree(path, path.with_suffix(".old"))
    set_newer_aside(run, 4)
    assert resumed(run).step == 4, "neither of those that were set aside"


@pytest.mark.parametrize("num_floats", [1000, 5000, 9000, 50_000])
def test_a_full_disk_leaves_no_part(tmp_path: Path, num_floats: int) -> None:
    """Writing the tensors or a later small file fails: always an OSError."""
    write(tmp_path, 2)
    folder = tmp_path / "checkpoints"
    with small_disk(folder, "16k"):
        tensors = {"R": torch.zeros(num_floats), "S": torch.zeros(7)}
        for step in range(4, 20):
            try:
                write_checkpoint(tmp_path, tensors, {}, step)
            except OSError:
                break
        else:
            pytest.fail("the disk should have been full")
        assert not list(folder.glob("*.tmp"))
        assert checkpoint_path(tmp_path, step) not in list_checkpoints(tmp_path)


def test_the_newest_whole_one_is_taken(run: Path) -> None:
    (checkpoint_path(run, 6) / CHECKPOINT_FILES[0]).write_bytes(b"")
    shutil.rmtree(checkpoint_path(run, 4))
    checkpoint_path(run, 4).mkdir()
    checkpoint_path(run, 8).with_suffix(".tmp").mkdir()
    found = resumed(run)
    assert found.step == 2
    assert [warning.split()[1] for warning in found.warnings] == [
        "step-00000006",
        "step-00000004",
    ]


def test_without_a_checkpoint(tmp_path: Path) -> None:
    assert resumed(tmp_path) is None, "auto starts anew where there is nothing"
    (tmp_path / "basis.safetensors").write_bytes(b"")
    assert resumed(tmp_path) is None, "its sums come last"
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ConfigError, match="--overwrite"):
        resumed(tmp_path)  # it would be removed
    (tmp_path / SUMS_FILE).write_text("")
    found = resumed(tmp_path)
    assert (found.step, found.checkpoint) == (0, None), "the init is not done twice"
    assert find_resume(RunConfig()) is None


def test_a_named_checkpoint(run: Path) -> None:
    assert resumed(run, str(checkpoint_path(run, 4))).step == 4
    assert resumed(run, str(run)).step == 6
    (checkpoint_path(run, 4) / CHECKPOINT_FILES[1]).write_text("{}")
    with pytest.raises(ConfigError, match=r"trainer\.json is not what was written"):
        resumed(run, str(checkpoint_path(run, 4)))
    with pytest.raises(ConfigError, match=r"neither a run's folder"):
        load_run_config({"resume": "/no/such/run"})
    with pytest.raises(ConfigError, match=r"continues in .*--init-from"):
        find_resume(RunConfig(resume=str(run), output_dir="elsewhere"))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"no complete checkpoint and no finished init"):
        resumed(run, str(run))


def test_a_named_run_brings_its_options(run: Path) -> None:
    options = RunConfig(r=3, max_steps=7, output_dir="elsewhere").model_dump()
    (run / "run.json").write_text(json.dumps({"config": options}))
    for path in (run, checkpoint_path(run, 4)):
        config = load_run_config({"resume": str(path), "max_steps": 9})
        assert (config.r, config.max_steps, config.output_dir) == (3, 9, str(run))
        check_output_dir(config)
    assert load_run_config({}, str(run / "run.json")).resume is None, "a replay starts anew"


def test_output_folders(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match="--resume auto goes on in --output-dir"):
        check_output_dir(RunConfig(resume="auto"))
    with pytest.raises(ConfigError, match="exclude each other"):
        check_output_dir(RunConfig(resume="auto", overwrite=True, output_dir=str(run)))
    other = tmp_path_factory.mktemp("other")
    check_output_dir(RunConfig(resume="auto", output_dir=str(other)))
    (other / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        check_output_dir(RunConfig(resume="auto", output_dir=str(other)))


def test_another_run_is_refused_with_what_differs(run: Path) -> None:
    checkpoint = resumed(run).checkpoint
    check_same_run("--resume auto", checkpoint, MADE_FROM)
    with pytest.raises(ConfigError) as error:
        check_same_run("--resume auto", checkpoint, {"--r": 4, "training rows": "b" * 64, "x": 1})
    for part in ("--r (the checkpoint has 8, this run 4)", "; training rows; ", "x (the"):
        assert part in str(error.value)
    assert changed_options(checkpoint, {"--lr": 2e-3}) == ["--lr 0.001 -> 0.002"]
    assert changed_options(checkpoint, {"--lr": 1e-3}) == []


def test_only_the_last_and_the_best_are_kept(run: Path) -> None:
    def steps() -> list[int]:
        return [int(path.name[5:]) for path in list_checkpoints(run)]

    for step in (8, 10, 100_000_000):
        write(run, step)
    assert steps() == [2, 4, 6, 8, 10, 100_000_000]
    (run / "checkpoints" / "step-00000012.tmp").mkdir()
    tidy(run, keep_last=2, best_step=4)
    assert steps() == [4, 10, 100_000_000]
    index = json.loads((run / "checkpoints" / "index.json").read_text())
    assert [entry["step"] for entry in index["checkpoints"]] == steps()
    assert index["best_step"] == 4
    assert not list(run.rglob("*.tmp"))
    assert set_newer_aside(run, 10) == ["checkpoints/step-100000000.superseded"]
    assert steps() == [4, 10]


def test_which_losses_patience_waits_for() -> None:
    state = TrainerState()
    taken = []
    for step, loss in enumerate((1.0, 0.95, 0.92, math.nan, 0.85, 0.9)):
        state.step = step
        taken.append((state.take_loss(loss, threshold=0.06), state.evals_since_best))
    assert taken == [(True, 0), (True, 1), (True, 2), (False, 3), (True, 0), (False, 1)]
    assert (state.best_step, state.best_loss) == (4, 0.85)
    plain = [TrainerState(best_loss=1.0).take_loss(loss) for loss in (0.999, 1.0, math.inf)]
    assert plain == [True, False, False]
