"""--overwrite removes what our own commands have left, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.config.run_layout import check_output_dir
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.output_dir import OUTPUTS, remove_outputs
from tests.runs import made_up_run

# As other trainers and trackers leave them, with names that ours have, too.
THEIRS = ("checkpoints/step-1/model.bin", "wandb/run/log", "report.md", "adapter/weights.bin")
NOT_A_RUN = {
    "no run.json": None,
    "another tool's": {"id": 7, "config": {"lr": 1}},
    "a list": [1],
    "without a configuration": {"config": None, "model": "x", "data": "y", "r": 4},
    "no JSON": "{",
}


@pytest.mark.parametrize("kind", NOT_A_RUN)
@pytest.mark.parametrize("resume", [None, "auto"])
def test_folders_of_others(tmp_path: Path, kind: str, resume: str | None) -> None:
    for name in THEIRS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("theirs")
    content = NOT_A_RUN[kind]
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "run.json").write_text(text)
    options = RunConfig(output_dir=str(tmp_path), overwrite=resume is None, resume=resume)
    for evaluation in (False, True):
        with pytest.raises(ConfigError, match="is not empty"):
            check_output_dir(options, evaluation=evaluation)
    remove_outputs(tmp_path, resumed=False)
    assert all((tmp_path / name).read_text() == "theirs" for name in THEIRS)


def test_a_run_is_overwritten(tmp_path: Path) -> None:
    """All that it has written goes, but for the mark of the folder; what else is there stays."""
    folder = made_up_run(tmp_path / "run")
    check_output_dir(RunConfig(output_dir=str(folder), overwrite=True))
    check_output_dir(RunConfig(output_dir=str(folder), resume="auto"))
    with pytest.raises(ConfigError, match="give --overwrite"):
        check_output_dir(RunConfig(output_dir=str(folder)))
    for name in OUTPUTS:
        if not (folder / name).exists():
            (folder / name).mkdir() if "." not in name else (folder / name).touch()
    (folder / "notes.txt").touch()
    (folder / "run.json.tmp").touch()
    remove_outputs(folder, resumed=True)
    assert not (folder / "report.md").exists()
    assert (folder / "metrics.jsonl").exists()
    remove_outputs(folder, resumed=False)
    assert {path.name for path in folder.iterdir()} == {"run.json", "notes.txt"}
    check_output_dir(RunConfig(output_dir=str(folder), overwrite=True))  # had it been killed here


def test_an_evaluation_is_overwritten_by_another_only(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()  # may be anybody's
    (tmp_path / "eval.json").write_text(json.dumps({"model": "m", "adapter": None}))
    options = RunConfig(output_dir=str(tmp_path), overwrite=True)
    with pytest.raises(ConfigError, match="is not a run's or an evaluation's folder"):
        check_output_dir(options, evaluation=True)
    found = {"model": "m", "adapter": None, "world_size": 1, "results": []}
    (tmp_path / "eval.json").write_text(json.dumps(found))
    check_output_dir(options, evaluation=True)
    with pytest.raises(ConfigError, match=r"is not a run's folder: .*\(checkpoints, eval\.json\)"):
        check_output_dir(options)
