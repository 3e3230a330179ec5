"""Rows on disk and their totals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.errors import ConfigError
from lorasb_ds.runs.history import (
    evaluation_of,
    perplexity,
    read_rows,
    saved_evaluation,
    summarize,
    to_line,
)


def training_row(step: int, loss: float, **more: Any) -> dict[str, Any]:
    row = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "r_norm": 2.0}
    return row | {"tokens": 30, "tokens_per_s": 15.0, "step_time_s": 2.0} | more


ROWS = st.lists(
    st.builds(
        lambda step, values: {**values, "step": step},
        st.integers(0, 10**9),
        st.dictionaries(st.text(max_size=4), st.floats() | st.booleans() | st.integers()),
    ),
    max_size=5,
)


@given(rows=ROWS, cut=st.integers(1, 30))
def test_what_is_written_is_read(
    rows: list[dict[str, Any]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also when a crash has cut the last line anywhere."""
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    lines = [to_line(row).encode() for row in rows]
    for line in lines:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    path.write_bytes(b"".join(lines))
    found = read_rows(path)
    assert len(found) == len(rows)
    for row, expected in zip(found, rows, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            finite = math.isfinite(value)
            assert row[key] == value if finite else math.isnan(row[key])
    if lines:
        whole = b"".join(lines[:-1])
        path.write_bytes(whole + lines[-1][: min(cut, len(lines[-1]) - 1)])
        assert len(read_rows(path)) == len(rows) - 1


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("line", ["\0\0\0", "[1]", '{"loss": 1.0}', '{"step": "1"}', "{"])
def test_damage_before_the_end_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2, is not"):
        read_rows(path)


def test_summary() -> None:
    rows = [
        {"step": 0, "stage": "base", "eval_loss": 3.0},
        {"step": 0, "stage": "init", "eval_loss": 2.0},
        *[training_row(i, 21.0 - i, padding_share=0.25, memory_bytes=i) for i in range(1, 11)],
        {"step": 10, "stage": "step", "eval_loss": 0.5},
        *[training_row(i, 21.0 - i, padding_share=0.4, memory_bytes=30 - i) for i in range(11, 20)],
        training_row(20, math.nan, tokens=0, padding_share=0.4, skipped=True),
        {"step": 20, "stage": "trained", "eval_loss": 0.75},
    ]
    found = summarize(rows)
    assert (found.steps, found.seconds, found.tokens, found.skipped) == (20, 40.0, 570, 1)
    assert found.tokens_per_s == pytest.approx(570 / 40)
    # 10 times 30 of 40 positions, 9 times 30 of 50.
    assert found.padding_share == pytest.approx(1 - 570 / 850)
    assert found.first_loss == 20.0
    assert found.final_loss == pytest.approx((2 + 3) / 2), "of the 19 that are finite, the last 2"
    assert (found.base_loss, found.init_loss, found.last_loss) == (3.0, 2.0, 0.75)
    assert (found.best_loss, found.best_step) == (0.5, 10)
    assert found.memory_bytes == 19


def test_summary_of_nothing_and_of_one() -> None:
    nothing = summarize([])
    assert (nothing.steps, nothing.tokens, nothing.skipped, nothing.best_step) == (0, 0, 0, 0)
    assert all(math.isnan(v) for v in (nothing.final_loss, nothing.best_loss, nothing.tokens_per_s))
    padding = training_row(1, math.nan, tokens=0, padding_share=1.0)
    assert math.isnan(summarize([padding]).padding_share), "only fillers"
    one = summarize([training_row(1, 4.0)])
    assert one.first_loss == one.final_loss == 4.0
    assert math.isnan(one.padding_share)
    before = [{"step": 0, "stage": s, "eval_loss": 1.0} for s in ("base", "init", "rebase")]
    assert math.isnan(summarize(before).best_loss), "none of an adapter that may be saved"


def test_which_evaluation_is_of_the_saved_adapter() -> None:
    losses = {(0, "base"): 0.1, (0, "init"): 0.2, (4, "rebase"): 0.3, (4, "step"): 0.5}
    losses |= {(6, "step"): math.nan, (8, "step"): 0.9, (8, "trained"): 0.8}
    rows = [{"step": n, "stage": s, "eval_loss": loss} for (n, s), loss in losses.items()]
    assert evaluation_of(rows, 4) == rows[3]
    assert evaluation_of(rows, 8) == rows[6], "once more, as on other rows after a resume"
    assert evaluation_of(rows, 0) == {"step": 0}
    assert evaluation_of(rows, 7) == {"step": 7}
    said = {"config": {"load_best_model_at_end": True}, "saved": {"step": 8, "eval_loss": None}}
    assert math.isnan(saved_evaluation(said, rows)["eval_loss"])
    for option in ({"load_best_model_at_end": True}, {"early_stopping_patience": 2}):
        assert saved_evaluation({"config": option}, rows) == rows[3], "of earlier versions"
        assert saved_evaluation({"config": option}, rows[:2]) == {}
    assert saved_evaluation({"config": {}}, rows) == rows[6]
    assert saved_evaluation({}, rows[:2]) == {}


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(2.0) == pytest.approx(7.389056)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
