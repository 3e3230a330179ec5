"""The rows of another process's metrics.jsonl, each of them once."""

from __future__ import annotations

from pathlib import Path

from lorasb_ds.runs.followed_log import FollowedLog
from lorasb_ds.runs.run_log import RunLog
from lorasb_ds.system.files import append_text, write_json

OPTIONS = {"report_to": "none", "r": 4}


def steps(rows: list[dict[str, int]]) -> list[int]:
    return [row["step"] for row in rows]


def begin(folder: Path, resumed_at: int | None) -> RunLog:
    """As the trainer does: run.json, then the log."""
    write_json(folder / "run.json", {"resumed_at": resumed_at})
    return RunLog(folder, resumed_at or 0, OPTIONS)


def test_rows_as_they_come(tmp_path: Path) -> None:
    followed = FollowedLog(tmp_path)
    assert followed.new_rows() == []
    log = begin(tmp_path, None)
    log.write({"step": 0, "stage": "base", "eval_loss": 2.0})
    assert followed.new_rows() == [{"step": 0, "stage": "base", "eval_loss": 2.0}]
    assert followed.new_rows() == []
    append_text(tmp_path / "metrics.jsonl", '{"step": 1, ')
    assert followed.new_rows() == []
    append_text(tmp_path / "metrics.jsonl", '"loss": 1.5}\n')
    assert followed.new_rows() == [{"step": 1, "loss": 1.5}]
    log.close()
    followed.close()


def test_rows_after_a_checkpoint_are_new_and_those_before_it_are_not(tmp_path: Path) -> None:
    log = begin(tmp_path, None)
    for step in range(5):
        log.write({"step": step})
    log.close()
    followed = FollowedLog(tmp_path)
    assert followed.new_rows() == [], "they were there before"
    log = begin(tmp_path, 2)
    log.write({"step": 3})
    assert steps(followed.new_rows()) == [3]
    log.write({"step": 4})  # and then the host is lost
    log.close()
    log = begin(tmp_path, 3)
    log.write({"step": 4})
    log.write({"step": 5})
    assert steps(followed.new_rows()) == [4, 4, 5]
    log.close()
    followed.close()


def test_a_run_that_is_overwritten(tmp_path: Path) -> None:
    log = begin(tmp_path, None)
    log.write({"step": 1})
    log.close()
    followed = FollowedLog(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert followed.new_rows() == []
    log = begin(tmp_path, None)
    log.write({"step": 1})
    assert steps(followed.new_rows()) == [1]
    log.close()
    followed.close()
