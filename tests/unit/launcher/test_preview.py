"""`lorasb data preview`: rows as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from launcher.workers.preview import main
from tests.runs import run_command, word_rows, write_jsonl

TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Say red"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "Now 🙂"},
    {"role": "assistant", "content": "🙂!"},
]
HEAD = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nSay red<|im_end|>\n"
ASSISTANT = "<|im_start|>assistant\n"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    data = [{"messages": TURNS}, {"question": "a"}, *word_rows(3), {"text": "Once upon a time"}]
    return write_jsonl(tmp_path / "rows.jsonl", data)


def preview(*arguments: Any) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_learned_is_set_apart(demo_model: Path, rows: str) -> None:
    output = preview("--model", demo_model, "--data", rows, "-n", 1)
    first, _, rest = output.partition("---\n")
    header, _, text = first.partition("\n")
    assert header == "--- rows.jsonl:1: 37 tokens, 6 learned; from messages"
    assert text == (
        f"{HEAD}{ASSISTANT}⟦red<|im_end|>⟧\n<|im_start|>user\nNow 🙂<|im_end|>\n"
        f"{ASSISTANT}⟦🙂!<|im_end|>⟧\n"
    )
    described, statistics = rest.splitlines()
    assert described.startswith("5 kept, 1 skipped: no known columns; kept by form: ")
    assert statistics.endswith("of all are learned")
    assert "38 at most" in statistics


def test_colors_and_options(demo_model: Path, rows: str) -> None:
    some = ("--model", demo_model, "--data", rows, "--row", 1, "--loss-on", "last")
    text = preview(*some, "--color", "--max-length", 36, "--truncation", "left")
    assert "36 tokens, 4 learned, truncated; from messages\n" in text
    dimmed = HEAD.removeprefix("<|im_start|>") + f"{ASSISTANT}red<|im_end|>\n"
    dimmed += f"<|im_start|>user\nNow 🙂<|im_end|>\n{ASSISTANT}"
    assert click.style(dimmed, dim=True) + "🙂!<|im_end|>\n" in text


def test_a_row_of_each_source(demo_model: Path, rows: str) -> None:
    some = ("--model", demo_model, "--data", rows, "--data", rows)
    text = preview(*some, "--row", 6)
    assert text.count("⟦Once upon a time<|im_end|>⟧") == 2
    assert f"--- {rows}:2: skipped: no known columns" in preview(*some, "--row", 2)
    assert f"--- {rows} has 6 rows" in preview(*some, "--row", 7)


def test_rows_that_training_would_refuse(demo_model: Path, tmp_path: Path) -> None:
    """Are shown, with what is wrong: to find that out is what the preview is for."""
    rows = [*word_rows(3), *[{"question": "a", "answer": None}] * 4, {"text": "b", "id": 1}]
    some = ("--model", demo_model, "--data", write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "refuse" not in preview(*some)
    output = preview(*some, "-n", 1, "--max-skipped-rows", 3)
    note = output.splitlines()[0]
    assert note.startswith("`lorasb train` would refuse these rows: --data ")
    assert "4 of 8 rows would be skipped (no response)" in note
    assert "\n--- rows.jsonl:1: " in output
    assert "\n4 kept, 4 skipped: no response; kept by form: 3 question/answer, 1 text\n" in output
    assert ":4: skipped: no response" in preview(*some, "--row", 4)


def test_what_was_found_where_and_what_was_left_out(demo_model: Path, tmp_path: Path) -> None:
    inside = {"id": 1, "metadata": {"question": "a", "answer": "b"}}
    rendered = {"prompt": f"{HEAD}{ASSISTANT}", "completion": "red<|im_end|>", "id": 2}
    rows = write_jsonl(tmp_path / "rows.jsonl", [inside, rendered])
    text = preview("--model", demo_model, "--data", rows)
    assert text.startswith(f"{rows}: left out of the rows: id (2 rows)\n")
    assert f"{rows}: 1 rows were rendered already: " in text
    assert " learned; from metadata.question/metadata.answer; left out: id\n" in text
    assert "\nrows like this one were rendered already: " in text
    assert text.count("You are a helpful AI assistant") == 1, "of the first row"


@pytest.mark.slow
def test_the_command_itself(demo_model: Path, rows: str) -> None:
    command = ["lorasb", "data", "preview", "--model", str(demo_model), "--data", rows]
    assert "--- rows.jsonl:3: " in run_command(*command)


def test_the_command(demo_model: Path, rows: str) -> None:
    command = ["lorasb", "data", "preview", "--model", str(demo_model), "--data", rows]
    assert "not trained on are dimmed" in CliRunner().invoke(main, ["--help"]).output
    message = run_command(*command, "--prompt-column", "title", status=2)
    assert f"lorasb: error: --prompt-column title: --data {rows} has no such column." in message
