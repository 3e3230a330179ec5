"""Rows, columns, masks and batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_ds.batches import collate
from lorasb_ds.config import ConfigError, RunConfig
from lorasb_ds.data import IGNORE_INDEX, Example, encode, tokenize_rows
from lorasb_ds.rows import choose_columns, load_rows, to_messages
from tests.runs import word_rows, write_jsonl

ROWS = word_rows(5)


def test_files_and_folders(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    table.to_csv(tmp_path / "c.csv")
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "e")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "f")
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet", "e", "f"):
        assert [dict(row) for row in load_rows(str(tmp_path / name))] == ROWS, name


def test_reasoning_gym() -> None:
    rows = load_rows("reasoning-gym:chain_sum?size=7&seed=3&max_terms=2")
    assert len(rows) == 7
    assert all(row["metadata"]["num_terms"] == 2 for row in rows)
    assert (
        rows[0]["question"]
        == load_rows("reasoning-gym:chain_sum?size=1&seed=3&max_terms=2")[0]["question"]
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("reasoning-gym:no_such_task", "has no task 'no_such_task'.*chain_sum"),
        ("reasoning-gym:chain_sum?size=3&colour=red", "colour"),
        ("/no/such/file.jsonl", "no such file"),
        ("rows.jsonl", "no such file"),
        ("someone/some-hub-name", "needs a network"),
    ],
)
def test_bad_sources(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_rows(source, "--eval-data")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "has no rows"),
        ("none.json", "[]", "no data"),
        ("torn.jsonl", '{"question": "a", "ans', "cannot be read as a file"),
        ("rows.txt", "hello", "unknown file type '.txt'"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        (["question", "answer"], (None, None), ("question", "answer")),
        (["type", "query", "response"], (None, None), ("query", "response")),
        (["prompt", "completion"], (None, None), ("prompt", "completion")),
        (["instruction", "input", "output"], (None, None), ("instruction", "output")),
        (["messages"], (None, None), ("messages", "messages")),
        (["question", "answer", "query", "response"], ("query", None), ("query", "response")),
        (["text", "summary", "answer"], ("text", "summary"), ("text", "summary")),
        (["question", "rationale"], (None, "rationale"), ("question", "rationale")),
        (["text", "answer"], ("text", None), ("text", "answer")),
    ],
)
def test_columns(columns: list[str], asked: Any, expected: Any) -> None:
    assert choose_columns(dict.fromkeys(columns, "x"), *asked) == expected


def test_splits(tmp_path: Path) -> None:
    tables = {
        name: datasets.Dataset.from_list(word_rows(n)) for name, n in (("train", 4), ("test", 2))
    }
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "both")
    assert len(load_rows(str(tmp_path / "both"))) == 4
    assert len(load_rows(str(tmp_path / "both"), held_out=True)) == 2
    datasets.DatasetDict(train=tables["train"]).save_to_disk(tmp_path / "train-only")
    with pytest.raises(ConfigError, match=r"--eval-data .*no split test or .*it has train"):
        load_rows(str(tmp_path / "train-only"), "--eval-data", held_out=True)


def test_a_template_that_refuses_a_row_is_counted(tokenizer: Any) -> None:
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "s"}, *turns]}]
    result = tokenize_rows(rows, strict, RunConfig())
    assert dict(result.counts) == {
        "kept": 1,
        "skipped: the chat template refuses the conversation": 1,
    }


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((None, None), "No known prompt and response columns.*It has: text, label"),
        (("title", None), "--prompt-column title: the data has no such column.*text, label"),
        ((None, "reply"), "--response-column reply"),
        (("messages", "text"), "--prompt-column messages"),
    ],
)
def test_missing_columns(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_columns({"text": "a", "label": "b"}, *asked)


def test_messages_bring_their_own_response() -> None:
    row = {"messages": [], "summary": "a"}
    with pytest.raises(ConfigError, match="last assistant turn; leave the option out"):
        choose_columns(row, "messages", "summary")
    with pytest.raises(ConfigError, match="No known prompt"):
        choose_columns(row, None, "summary")


def test_response_in_the_metadata() -> None:
    row = {"question": "q", "answer": "4", "metadata": {"answer_cot": "2 + 2 = 4"}}
    columns = choose_columns(row, None, "answer_cot")
    assert to_messages(row, *columns) == ([{"role": "user", "content": "q"}], "2 + 2 = 4")


def test_forms() -> None:
    alpaca = {"instruction": "Add", "input": "1, 2", "output": 3}
    expected = ([{"role": "user", "content": "Add\n\n1, 2"}], "3")
    assert to_messages(alpaca, "instruction", "output") == expected
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    found = to_messages({"messages": turns}, "messages", "messages")
    assert found == (turns[:2], "Hello"), "up to the last assistant turn"
    for row in ({"question": "a", "answer": " "}, {"question": "a", "answer": {"b": 1}}):
        assert to_messages(row, "question", "answer") == "skipped: no response"
    for messages in (None, "text", [{"role": "user"}], [{"role": "user", "content": "a"}]):
        assert isinstance(to_messages({"messages": messages}, "messages", "messages"), str)


def test_only_the_response_is_labelled(tokenizer: Any) -> None:
    example = encode(tokenizer, [{"role": "user", "content": "Say red"}], "red", 512)
    assert isinstance(example, Example)
    prompt = tokenizer.decode(example.input_ids[: example.first_label])
    assert prompt.endswith("<|im_start|>assistant\n")
    assert "Say red" in prompt
    response = tokenizer.decode(example.input_ids[example.first_label :])
    assert response == f"red{tokenizer.eos_token}"
    batch = collate([example, Example([1, 2, 3], [IGNORE_INDEX, 2, 3])], pad_token_id=2)
    labelled = batch.input_ids[batch.labels != IGNORE_INDEX].tolist()
    assert labelled == [*example.input_ids[example.first_label :], 2, 3]
    assert batch.attention_mask.sum(1).tolist() == [len(example.input_ids), 3]
    assert batch.num_label_tokens == len(labelled)


def test_a_tokenizer_without_a_template_uses_the_default(tokenizer: Any) -> None:
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    example = encode(plain, [{"role": "user", "content": "Say red"}], "red", 512)
    text = plain.decode(example.input_ids)
    assert text == f"### Question:\nSay red\n\n### Answer:\nred{plain.eos_token}"


def test_rows_are_kept_or_counted(tokenizer: Any) -> None:
    rows = [
        *ROWS,
        {"question": "a", "answer": None},
        {"question": None, "answer": "b"},
        {"question": "long " * 400, "answer": "b"},
        {"question": "a", "answer": "long " * 400},
    ]
    result = tokenize_rows(rows, tokenizer, RunConfig(max_length=128))
    assert len(result.examples) == 6
    assert dict(result.counts) == {
        "kept": 6,
        "truncated": 1,
        "skipped: no response": 1,
        "skipped: no prompt": 1,
        "skipped: no response token left after truncation": 1,
    }
    whole = encode(tokenizer, [{"role": "user", "content": "a"}], "b", 512)
    assert isinstance(whole, Example)
    exact = encode(tokenizer, [{"role": "user", "content": "a"}], "b", len(whole.input_ids))
    assert exact == whole, "a row that just fits is not truncated"
    with pytest.raises(ConfigError, match=r"no row is left.*--max-length \(now 8\)"):
        tokenize_rows(ROWS, tokenizer, RunConfig(max_length=8))


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(max_size=40), response=st.text(max_size=40), max_length=st.integers(8, 60))
def test_any_text_is_an_example_or_skipped(
    tokenizer: Any, prompt: str, response: str, max_length: int
) -> None:
    row = {"question": prompt, "answer": response}
    parts = to_messages(row, "question", "answer")
    if isinstance(parts, str):
        assert parts.startswith("skipped: ")
        assert not prompt.strip() or not response.strip()
        return
    example = encode(tokenizer, *parts, max_length)
    if isinstance(example, str):
        assert example.startswith("skipped: ")
    else:
        assert 0 < example.first_label < len(example.input_ids) <= max_length
