"""`lorasb report`: runs side by side, in any state of their folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from launcher.cli import main
from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.compare import COLUMNS, differing_options, read_runs, table
from tests.runs import ROOT, made_up_run

GIB = 1 << 30


def report(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == 2
    return result.output


def cells(folder: Path) -> dict[str, str]:
    (row,) = table(read_runs([str(folder)]))
    return dict(zip(COLUMNS, row, strict=True))


def test_a_finished_run(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "one", {"lr": 0.004, "r": 96}, num_steps=20)
    assert cells(run) == {
        "run": "one",
        "model": "Mistral-7B-v0.1",
        "data": "train.jsonl",
        "r": "96",
        "trainable": "12,345",
        "lr": "0.004",
        "steps": "20",
        "tokens": "2,000",
        "time": "0:00:40",
        "tokens/s": "50",
        "loss": "0.0513",  # (1/19 + 1/20) / 2
        "held-out loss": "3.0000 > 2.0000 > 0.5000 > 0.7500",
        "GiB": "6.00",
        "": "",
    }


def test_a_classifier_s_scores_are_beside_the_loss(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "one")
    with (run / "metrics.jsonl").open("a") as file:
        row = {"step": 10, "stage": "trained", "eval_loss": 0.5, "eval_accuracy": 0.75}
        file.write(json.dumps(row | {"eval_matthews": None}) + "\n")
    held_out = "3.0000 > 2.0000 > 0.5000 > 0.5000 (accuracy 0.7500, matthews nan)"
    assert cells(run)["held-out loss"] == held_out
    (found,) = json.loads(report(run, "--json"))["runs"]
    assert found["scores"] == {"accuracy": 0.75, "matthews": None}


def test_unfinished_and_broken_ones_have_a_row(tmp_path: Path) -> None:
    finished = made_up_run(tmp_path / "finished")
    started = made_up_run(tmp_path / "started", finished=False)
    torn = made_up_run(tmp_path / "torn", finished=False)
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"step"')
    empty = made_up_run(tmp_path / "empty", num_steps=0, finished=False)
    (empty / "metrics.jsonl").unlink()
    rows = made_up_run(tmp_path / "rows")
    (rows / "metrics.jsonl").write_text('oops\n{"step": 1, "loss": 2}\n')
    keys = made_up_run(tmp_path / "keys")
    (keys / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n')
    described = made_up_run(tmp_path / "described")
    (described / "run.json").write_text('{"config"')
    listed = made_up_run(tmp_path / "listed")
    (listed / "run.json").write_text("[]")
    folders = [finished, started, torn, empty, rows, keys, described, listed]
    states = {row[0]: row[-1] for row in table(read_runs(list(map(str, folders))))}
    assert states["finished"] == ""
    assert states["started"] == states["torn"] == "unfinished"
    assert states["empty"] == "no rows in metrics.jsonl"
    for name in ("rows", "keys"):
        assert states[name].startswith("broken: metrics.jsonl: ")
    for name in ("described", "listed"):
        assert states[name].startswith("broken: run.json: ")
    output = report(*folders, "--output", tmp_path / "all.png")
    assert len([line for line in output.splitlines() if "broken: " in line]) == 4
    as_json = json.loads(report(*folders, "--json", "--output", tmp_path / "all.png"))
    assert [run["options"] == {} for run in as_json["runs"]] == [False] * 6 + [True] * 2


def test_only_what_differs_is_listed(tmp_path: Path) -> None:
    one = made_up_run(tmp_path / "one", {"lr": 0.004, "max_steps": None}, finished=False)
    two = made_up_run(tmp_path / "two", {"lr": 0.002, "max_steps": 7})
    differing = differing_options(read_runs([str(one), str(two)]))
    assert differing == {"lr": [0.004, 0.002], "max_steps": [None, 7]}
    output = report(one, two, "--output", tmp_path / "report.png")
    (line,) = (line for line in output.splitlines() if line.startswith("--lr"))
    assert line.split() == ["--lr", "0.004", "0.002"]
    assert "--seed" not in output
    assert "--output-dir" not in output


def test_options_that_an_older_version_did_not_know(tmp_path: Path) -> None:
    new = made_up_run(tmp_path / "new", {"load_in_8bit": True})
    old = made_up_run(tmp_path / "old")
    content = json.loads((old / "run.json").read_text())
    del content["config"]["load_in_8bit"], content["config"]["seed"]
    content["config"]["since_removed"] = 1
    (old / "run.json").write_text(json.dumps(content))
    differing = differing_options(read_runs([str(new), str(old)]))
    assert differing == {"load_in_8bit": [True, False], "since_removed": [None, 1]}
    output = report(new, old, "--output", tmp_path / "report.png")
    assert "\nsince_removed " in output, "no option of today"


def test_json_has_the_numbers(tmp_path: Path) -> None:
    one = made_up_run(tmp_path / "one")
    two = made_up_run(tmp_path / "two", {"seed": 1}, num_steps=0, finished=False)
    picture = tmp_path / "report.png"
    found = json.loads(report(one, two, "--json", "--output", picture))
    assert found["differing"] == ["seed"]
    first, second = found["runs"]
    assert (first["best_loss"], first["best_step"], first["problem"]) == (0.5, 5, None)
    assert first["peak_memory_bytes"] == 6 * GIB
    assert (second["final_loss"], second["problem"]) == (None, "unfinished")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_markdown(tmp_path: Path) -> None:
    one = made_up_run(tmp_path / "one", {"data": "a|b.jsonl"})
    lines = report(one, "--markdown", "--output", tmp_path / "report.png").splitlines()
    assert lines[0].count("|") == lines[1].count("|") == len(COLUMNS) + 1
    assert "a\\|b.jsonl" in lines[2]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [str(made_up_run(tmp_path / parent / "run")) for parent in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == folders
    assert [run.name for run in read_runs([folders[0], folders[0]])] == ["run"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = made_up_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError) as caught:
        read_runs([str(run), "other", "nowhere"])
    assert [problem.split()[0] for problem in caught.value.problems] == ["other", "nowhere"]
    assert "other has no run.json" in refusal(run, "other")
    assert "--output nowhere/x.png" in refusal(run, "--output", "nowhere/x.png")
    assert "--output x.txt" in refusal(run, "--output", "x.txt")
    assert "DIR" in refusal()
    assert not list(tmp_path.glob("*.png"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert f"losses: {tmp_path}/report.png" in report("../run/", run).replace("/elsewhere/..", "")
    assert (tmp_path / "report.png").is_file(), "beside the run"
    assert list(tmp_path.glob("elsewhere/*")) == []


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    code = (
        "import sys; from launcher.cli import main; "
        f"main(['report', {str(run)!r}, '--output', {str(tmp_path / 'x.png')!r}], "
        "standalone_mode=False); assert 'matplotlib' in sys.modules; "
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    result: Any = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert result.returncode == 0, result.stderr
