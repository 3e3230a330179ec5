"""Rows that are skipped: counted by reason, and how many may be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lorasb_ds.config.option_group import to_arguments
from lorasb_ds.config.resolve import load_run_config
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.cache import tokenize_sources
from lorasb_ds.data.dataset import tokenize_rows
from lorasb_ds.data.run_rows import load_data
from lorasb_ds.errors import ConfigError
from tests.runs import word_rows, write_jsonl

NO_RESPONSE: dict[str, Any] = {"question": "a", "answer": None}


@pytest.mark.parametrize(
    ("asked", "num_rows", "allowed"),
    [
        (None, 10, 20),
        (None, 400, 20),
        (None, 419, 20),
        (None, 1000, 50),
        ("5%", 10, 0),
        ("12.5%", 100, 12),
        ("29%", 100, 29),  # which as floats would be 28
        ("100%", 7, 7),
        ("3", 1000, 3),
        ("0", 1000, 0),
    ],
)
def test_how_many_may_be_skipped(asked: str | None, num_rows: int, allowed: int) -> None:
    config = load_run_config({"max_skipped_rows": asked})
    assert config.skippable_rows(num_rows) == allowed
    assert (
        asked is None or to_arguments(config.model_dump(include={"max_skipped_rows"}))[1] == asked
    )


@pytest.mark.parametrize("asked", ["-1", "5 %", "half", "0.5", "%", ""])
def test_what_is_no_number_of_rows(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"--max-skipped-rows .*a number of rows, or a per"):
        load_run_config({"max_skipped_rows": asked})


def test_another_data_set_has_another_bound(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "run.json", [{"config": {"max_skipped_rows": "50%"}}])
    assert load_run_config({}, path).max_skipped_rows == "50%"
    assert load_run_config({"data": "other.jsonl"}, path).max_skipped_rows is None


# Rows that are skipped, the reason, and what helps.
REASONS = [
    (None, "not a JSON object", "Write an object on each line"),
    ({"title": "a"}, "no known columns", r"Check --prompt-column/--response-column \(now by name"),
    (NO_RESPONSE, "no response", "Fill them in, or check --prompt-column"),
    ({"question": None, "answer": "b"}, "no prompt", "Fill them in, or check"),
    ({"question": "a " * 90, "answer": "b"}, "no response token left after", "Raise --max-length"),
    ({"messages": [{"role": "critic"}]}, "a turn of an unknown role", "docs/data.md describes"),
    (
        {"messages": [{"role": r, "content": "a"} for r in ("system", "user", "assistant")]},
        "the chat template refuses it",
        "Change what the template refuses .*choose a --model",
    ),
]


@pytest.fixture(scope="module")
def without_system(tokenizer: Any) -> Any:
    """The tokenizer with a template that takes no turn of the system, as Gemma 2's."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    return other


@pytest.mark.parametrize(("row", "reason", "advice"), REASONS)
def test_more_than_may_be_skipped(without_system: Any, row: Any, reason: str, advice: str) -> None:
    rows = [*word_rows(2), *[row] * 21]
    options = RunConfig(max_length=64)
    assert tokenize_rows(rows[:-1], without_system, options).counts["kept"] == 2
    said = rf"--data x: 21 of 23 rows would be skipped \({reason}.* allows 20 for one reason\. "
    said += rf"All: 2 kept, 21 skipped: {reason}.*\. {advice}.* `lorasb data preview --row 3` "
    with pytest.raises(ConfigError, match=said + ".*--max-skipped-rows 21 goes on without them"):
        tokenize_rows(rows, without_system, options, "--data x")
    allowed = options.model_copy(update={"max_skipped_rows": "21"})
    assert tokenize_rows(rows, without_system, allowed).counts["kept"] == 2


@pytest.mark.parametrize(("row", "reason", "advice"), REASONS[2:])
def test_no_row_is_left(without_system: Any, row: Any, reason: str, advice: str) -> None:
    message = rf"no row is left to learn from \(2 skipped: {reason}.*\. {advice}"
    with pytest.raises(ConfigError, match=message):
        tokenize_rows([row] * 2, without_system, RunConfig(max_length=64))


def test_each_reason_by_itself(tokenizer: Any) -> None:
    rows = [*word_rows(2), *[NO_RESPONSE] * 20, *[{"title": "a"}] * 20]
    assert tokenize_rows(rows, tokenizer, RunConfig()).counts["kept"] == 2
    with pytest.raises(ConfigError, match=r"20 of 42 .*Fill them in.*Check --prompt.* --row 3`"):
        tokenize_rows(rows, tokenizer, RunConfig(max_skipped_rows="19"))


def test_what_is_asked_for_is_not_bounded(tokenizer: Any) -> None:
    rows = [*word_rows(2), *[{"question": "a", "answer": "long " * 100}] * 30]
    options = {"max_length": 64, "max_skipped_rows": "0"}
    found = tokenize_rows(rows, tokenizer, RunConfig(truncation="skip", **options))
    assert dict(found.counts) == {"kept": 2, "skipped: longer than --max-length": 30}
    assert tokenize_rows(rows, tokenizer, RunConfig(**options)).counts["truncated"] == 30


@pytest.mark.parametrize("option", ["data", "eval_data", "init_data"])
def test_each_source_of_a_run(tokenizer: Any, tmp_path: Path, option: str) -> None:
    """Whether its rows are tokenized now, or were before; what is allowed is no part of them."""
    good = write_jsonl(tmp_path / "good.jsonl", word_rows(400))
    bad = write_jsonl(tmp_path / "bad.jsonl", [*word_rows(3), *[NO_RESPONSE] * 21])
    given = {"data": good, option: [good, bad] if option != "eval_data" else bad}
    flag = "--" + option.replace("_", "-")
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"^{flag} {bad}: 21 of 24 rows would be skipped"):
            load_data(load_run_config(given), tokenizer)
    data = load_data(load_run_config(given | {"max_skipped_rows": "90%"}), tokenizer)
    found = {"data": data.train, "eval_data": data.held_out, "init_data": data.init}[option]
    assert found is not None
    assert found.counts["skipped: no response"] == 21
    rows, notes = tokenize_sources((bad,), tokenizer, RunConfig(), refuse=False)
    assert (len(rows.examples), len(notes)) == (3, 1)
    assert "would refuse these rows: --data" in notes[0]
