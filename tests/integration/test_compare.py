"""`lorasb compare` for real, on the tiny model: stopped, killed, gone on with, and added to."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

from tests.integration.test_resume import started, wait_for_rows
from tests.runs import metrics, output_of, run_command, word_rows, write_jsonl

pytestmark = pytest.mark.slow
STEPS = 200  # a run that is to be stopped must not come to its end before it hears of it
FIRST, SECOND = "lora-sb-r4-lr1e-3-s42", "lora-sb-r4-lr4e-3-s42"
LORASB = str(Path(sys.executable).parent / "lorasb")


@pytest.fixture(scope="module")
def options(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", word_rows(13))
    return (
        f"--model {tiny_model} --data {data} --eval-data {data} --dtype fp32 --r 4 --num-procs 1 "
        f"--train-batch-size 5 --micro-batch-size 5 --max-steps {STEPS} --max-skipped-steps 0 "
        f"--target-modules q_proj,v_proj --method lora-sb --for lora-sb:init-lr=1e-3"
    ).split()


def compare(
    folder: Path, options: list[str], *given: str, status: int = 0, lr: str = "1e-3,4e-3"
) -> str:
    command = [LORASB, "compare", "--output-dir", str(folder), *options, "--lr", lr, *given]
    return run_command(*command, status=status)


def wait_until_all_have_ended(folder: Path) -> None:
    """The jobs of a command that was killed."""
    deadline = time.monotonic() + 60
    while any(str(folder) in " ".join(p.info["cmdline"] or ()) for p in processes()):
        assert time.monotonic() < deadline, "after 60 s a job goes on without its command"
        time.sleep(0.1)


def processes() -> list[psutil.Process]:
    return list(psutil.process_iter(["cmdline"]))


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


def when_written(folder: Path) -> dict[str, float]:
    """The last of a run's files; of an evaluation's."""
    files = [*folder.glob("runs/*/report.md"), *folder.glob("runs/*/eval/eval.json")]
    return {str(file): file.stat().st_mtime for file in files}


@pytest.fixture(scope="module")
def folder(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Asked to stop in its first run, killed in its second, and gone on with to its end."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    command = [LORASB, "compare", "--output-dir", str(folder), *options, "--lr", "1e-3,4e-3"]
    with started(*command) as child:
        wait_for_rows(child, folder / "runs" / FIRST, 3)
        child.send_signal(signal.SIGTERM)
        output = output_of(child, 60)
        assert child.returncode == 75, output
    assert f"{FIRST}: stopped" in output
    assert "stopped: the same command goes on" in output
    assert not (folder / "runs" / SECOND).exists()
    with started(*command) as child:
        wait_for_rows(child, folder / "runs" / SECOND, 3)
        child.kill()
        child.communicate()
    wait_until_all_have_ended(folder)
    assert content_of(folder)["results"][0]["best_lr"] == 1e-3, "written after the first run"
    before = when_written(folder)
    assert list(before) == [str(folder / "runs" / FIRST / "report.md")]
    output = compare(folder, options)
    assert "1 of 2 runs are there already" in output
    assert FIRST not in output.partition("\n\n")[0], "it was not run again"
    assert before.items() <= when_written(folder).items()
    return folder


@pytest.mark.parametrize("name", [FIRST, SECOND])
def test_every_run_is_whole(folder: Path, name: str) -> None:
    steps = [row["step"] for row in metrics(folder / "runs" / name) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    resumed_at = json.loads((folder / "runs" / name / "run.json").read_text())["resumed_at"]
    assert 3 <= resumed_at < STEPS, "it went on from where it was"


def test_the_numbers_are_those_of_the_runs(folder: Path) -> None:
    content = content_of(folder)
    assert [run["name"] for run in content["runs"]] == [FIRST, SECOND]
    last = {}
    for run in content["runs"]:
        rows = metrics(folder / "runs" / run["name"])
        last[run["lr"]] = rows[-1]["eval_loss"]
        assert run["loss"] == rows[-1]["eval_loss"]
        assert run["base_loss"] == rows[0]["eval_loss"]
        assert run["seconds"] == pytest.approx(sum(row.get("step_time_s", 0) for row in rows))
        assert run["finished"]
        assert run["trainable_parameters"] == 4 * 4 * 4, "q and v of two layers"
        assert 0 < run["init_seconds"] < 60
        assert run["memory_bytes"] > 1 << 20
    assert len(set(last.values())) == 2
    (row,) = content["results"]
    best = min(last, key=lambda lr: last[lr])
    assert (row["best_lr"], row["loss"], row["loss_std"]) == (best, last[best], None)
    assert row["at_edge"] == ("lower" if best == 1e-3 else "upper")
    assert [(entry["lr"], entry["loss"]) for entry in row["sweep"]] == list(last.items())
    assert content["options"]["max_steps"] == STEPS
    table = (folder / "compare.md").read_text()
    assert f"| {last[best]:.4f} |" in table
    assert f"1e-3: {last[1e-3]:.4f}, 4e-3: {last[4e-3]:.4f}" in table


def test_pictures(folder: Path) -> None:
    table = (folder / "compare.md").read_text()
    for name in ("loss-over-steps", "loss-over-lr", "loss-over-parameters"):
        content = (folder / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(content[16:20], "big") > 600, "pixels"
        assert f"({name}.png)" in table


def test_other_options_are_refused(folder: Path, options: list[str]) -> None:
    before = content_of(folder), when_written(folder)
    given = ["--max-steps", "5", "--for", "lora-sb:init-samples=8"]
    said = compare(folder, options, *given, status=2)
    assert f"--max-steps is 5 now, and was {STEPS}\n" in said
    assert "--init-samples of lora-sb is 8 now, and was None\n" in said
    with FileLock(folder / "compare.lock"):
        said = compare(folder, options, status=2)
    assert "another `lorasb compare` is at work there" in said
    assert before == (content_of(folder), when_written(folder))


@pytest.mark.slow
def test_anew_with_other_seeds_a_failure_and_answers(
    options: list[str], folder: Path, tmp_path: Path
) -> None:
    """Several at a time. With one learning rate the loss is not finite; the best one is asked."""
    (tmp_path / "runs" / FIRST).mkdir(parents=True)
    # What marks a folder as a run of ours, which --overwrite may replace.
    shutil.copy(folder / "runs" / FIRST / "run.json", tmp_path / "runs" / FIRST)
    content = {"options": content_of(folder)["options"] | {"max_steps": 7}}
    (tmp_path / "compare.json").write_text(json.dumps(content))
    options = [*options, "--max-steps", "6", "--eval-samples", "5", "--max-new-tokens", "3"]
    given = ["--seed", "42,7", "--best", "1", "--parallel", "2"]
    output = compare(tmp_path, options, *given, "--overwrite", lr="4e-3,1e30", status=1)
    assert not (tmp_path / "runs" / FIRST).exists()
    failing, other_seed = "lora-sb-r4-lr1e30-s42", "lora-sb-r4-lr4e-3-s7"
    answers = [f"answers of {name}" for name in (SECOND, other_seed)]
    began = [line[9:].partition(" begins (") for line in output.splitlines()]
    assert [name for name, found, _ in began if found] == [SECOND, failing, other_seed, *answers]
    assert f"{failing} has failed after" in output
    assert f"lorasb: error: 1 of the runs failed: {failing}" in output
    assert f"Not in the table: {failing} (failed)." in output
    content = content_of(tmp_path)
    assert [run["name"] for run in content["runs"]] == [SECOND, failing, other_seed]
    first, failed, second = content["runs"]
    assert (first["problem"], second["problem"]) == (None, None)
    assert failed["problem"].startswith("failed: ")
    (row,) = content["results"]
    assert [entry["loss"] for entry in row["sweep"]] == [first["loss"], None]
    assert row["runs"] == [SECOND, other_seed]
    assert row["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
    assert row["loss_std"] == pytest.approx(abs(first["loss"] - second["loss"]) / math.sqrt(2))
    right = 0
    for name in row["runs"]:
        evaluation = tmp_path / "runs" / name / "eval" / "eval.json"
        (answered,) = json.loads(evaluation.read_text())["results"]
        assert answered["scores"]["exact_match"]["rows"] == answered["rows"] == 5
        assert answered["max_new_tokens"] == 3
        right += answered["scores"]["exact_match"]["right"]
    assert (row["accuracy"]["right"], row["accuracy"]["rows"]) == (right, 10)
    assert len(list(tmp_path.glob("runs/*/eval"))) == 2, "only the best one is asked"

    before = when_written(tmp_path)
    assert len(before) == 4
    output = compare(tmp_path, options, lr="4e-3")
    assert "begins" not in output, "all that is asked for is there"
    assert f"Not asked for now, and not in the table: {failing}, {other_seed}." in output
    assert when_written(tmp_path) == before
