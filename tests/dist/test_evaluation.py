"""An evaluation on several ranks gives what one process gives, row for row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasb_ds.evaluation.evaluator import EvalResult, evaluate_model
from tests.references import write_random_lora
from tests.runs import REALLY_SHARDED, ROOT, run_ranks, word_rows, write_jsonl

CHOICES = [
    {"question": f"After {a}?", "choices": ["red", "very dark blue"], "answer": a % 2}
    for a in range(4)
]
CASES = {
    "ZeRO-3": (2, 3, word_rows(5), {}),
    "ZeRO-3, fewer rows than ranks": (3, 3, word_rows(2), {}),
    "ZeRO-3, 4 bits": (2, 3, word_rows(3), {"load_in_4bit": True, "dtype": "bf16"}),
    "ZeRO-3, choices": (2, 3, CHOICES, {}),
    "ZeRO-3, in host memory": (2, "3_offload", word_rows(2), {}),
    "whole": (2, 2, word_rows(3), {}),
}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    write_random_lora(tiny_model, folder, r=4, target_modules="all-linear")
    return folder


def alone(data: str, adapter: Path, options: dict[str, Any]) -> EvalResult:
    options = {"dtype": "fp32", **options}
    return evaluate_model(
        adapter=str(adapter), data=data, max_new_tokens=12, batch_size=2, **options
    )


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_one_process(
    tiny_model: Path, adapter: Path, tmp_path: Path, case: str
) -> None:
    ranks, stage, rows, options = CASES[case]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    expected = alone(data, adapter, options)
    given = {
        "model": str(tiny_model),
        "data": data,
        "micro_batch_size": 2,
        "dtype": "fp32",
        "ds_config": str(ROOT / f"ds_configs/zero{stage}.json"),
        **options,
    }
    run_ranks(
        "evaluation",
        ranks,
        given=given,
        adapter=str(adapter),
        out=str(tmp_path / "out"),
        zero_optimization={} if stage == 2 else REALLY_SHARDED,
    )
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    (found,) = written["results"]
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert (written["world_size"], written["zero_stage"]) == (ranks, 2 if stage == 2 else 3)
    assert len(answers) == len(rows)
    if written["dtype"] == "bf16":  # rows are padded to other lengths, and rounded otherwise
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-2)
        assert [a["expected"] for a in answers] == [a["expected"] for a in expected.answers]
        return
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-5)  # fp32, in other batches
    for answer, wanted in zip(answers, expected.answers, strict=True):
        for key in wanted:
            if key == "log_likelihoods":
                assert answer[key] == pytest.approx(wanted[key], rel=1e-5)
            else:
                assert answer[key] == wanted[key], key
    assert {name: score["right"] for name, score in found["scores"].items()} == {
        name: score.right for name, score in expected.scores.items()
    }
