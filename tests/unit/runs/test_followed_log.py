"""The rows of another process's metrics.jsonl, each of them once."""

from __future__ import annotations

from pathlib import Path

from lorasb_ds.runs.followed_log import FollowedLog
from lorasb_ds.runs.history import read_rows, to_line
from lorasb_ds.system.files import append_text, write_json, write_text


def steps(rows: list[dict[str, int]]) -> list[int]:
    return [row["step"] for row in rows]


class Log:
    """Writes as the trainer and its RunLog do, without TensorBoard."""

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        self._path = folder / "metrics.jsonl"
        write_json(folder / "run.json", {"resumed_at": resumed_at})
        kept = [row for row in read_rows(self._path) if row["step"] <= (resumed_at or 0)]
        write_text(self._path, "".join(map(to_line, kept)))

    def write(self, row: dict[str, object]) -> None:
        append_text(self._path, to_line(row))


def test_rows_as_they_come(tmp_path: Path) -> None:
    followed = FollowedLog(tmp_path)
    assert followed.new_rows() == []
    log = Log(tmp_path, None)
    log.write({"step": 0, "stage": "base", "eval_loss": 2.0})
    assert followed.new_rows() == [{"step": 0, "stage": "base", "eval_loss": 2.0}]
    assert followed.new_rows() == []
    append_text(tmp_path / "metrics.jsonl", '{"step": 1, ')
    assert followed.new_rows() == []
    append_text(tmp_path / "metrics.jsonl", '"loss": 1.5}\n')
    assert followed.new_rows() == [{"step": 1, "loss": 1.5}]
    followed.close()


def test_rows_after_a_checkpoint_are_new_and_those_before_it_are_not(tmp_path: Path) -> None:
    log = Log(tmp_path, None)
    for step in range(5):
        log.write({"step": step})
    followed = FollowedLog(tmp_path)
    assert followed.new_rows() == [], "they were there before"
    log = Log(tmp_path, 2)
    log.write({"step": 3})
    assert steps(followed.new_rows()) == [3]
    log.write({"step": 4})  # and then the host is lost
    log = Log(tmp_path, 3)
    log.write({"step": 4})
    log.write({"step": 5})
    assert steps(followed.new_rows()) == [4, 4, 5]
    followed.close()


def test_a_run_that_is_overwritten(tmp_path: Path) -> None:
    log = Log(tmp_path, None)
    log.write({"step": 1})
    followed = FollowedLog(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert followed.new_rows() == []
    log = Log(tmp_path, None)
    log.write({"step": 1})
    assert steps(followed.new_rows()) == [1]
    followed.close()
