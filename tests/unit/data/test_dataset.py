"""Rows, columns, masks and batches."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.data.batch import collate
from lorasb_ds.data.chat import HELD
from lorasb_ds.data.dataset import tokenize_columns, tokenize_rows
from lorasb_ds.data.formats import parse_row
from lorasb_ds.data.json_rows import JsonRows
from lorasb_ds.data.notes import of_source
from lorasb_ds.data.sources import load_rows, source_fingerprint
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example, encode
from lorasb_ds.errors import ConfigError
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


def test_a_slice_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, as on the hub: here out of the cache that `datasets` has of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "someone/made").mkdir(parents=True)
    write_jsonl(tmp_path / "someone/made/train.jsonl", ROWS)
    write_jsonl(tmp_path / "someone/made/test.jsonl", ROWS[:2])
    datasets.load_dataset("someone/made")
    with pytest.raises(ConfigError, match="someone/made is a folder here, and not a data set of"):
        load_rows("someone/made@train")
    (tmp_path / "someone").rename(tmp_path / "gone")
    (tmp_path / "cache/made").rename(tmp_path / "cache/someone___made")
    first = load_rows("someone/made@train[:3]")
    assert [dict(row) for row in first] == ROWS[:3]
    assert [dict(row) for row in load_rows("someone/made:default@train[40%:60%]")] == ROWS[2:3]
    whole = load_rows("someone/made@train")
    assert len(whole) == len(ROWS)
    assert source_fingerprint("someone/made@train[:3]", first) != source_fingerprint(
        "someone/made@train", whole
    )
    with pytest.raises(ConfigError, match=r"@dev\[:3\] cannot be read as a hub name: .*dev"):
        load_rows("someone/made@dev[:3]")


BAD = {
    "empty.jsonl": ("", "has no rows"),
    "blank.json": (" \n", "has no rows"),
    "word.json": ("nonsense", r"row 1 of word\.json: Expecting value"),
    "none.json": ("[ ]", "has no rows"),
    "torn.jsonl": (
        '{"question": "a", "ans',
        r"no row is a JSON.*row 1 of torn\.jsonl: Unt",
    ),
    "numbers.jsonl": ("1\n2\n", r"numbers\.jsonl is of type int\. Write an object"),
    "torn.json": (
        '[{"question": "a"}, {"question": "b", ',
        "JSON array: the array does not",
    ),
    "two.json": ("[1] [2]", "is not a JSON array: something follows"),
    "other.jsonl": ('{"title": "a", "label": 1}\n1\n', "no known prompt.*has: title, label"),
    "rows.txt": ("hello", r"unknown file type '\.txt'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tokenizer: Any, tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        tokenize_rows(load_rows(str(tmp_path / name)), tokenizer, RunConfig())


def test_asking_for_columns_that_are_not_there(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="--prompt-column title: --data has no such column"):
        tokenize_rows(ROWS, tokenizer, RunConfig(prompt_column="title"))
    with pytest.raises(ConfigError, match="assistant turns; leave the option out"):
        tokenize_rows(ROWS, tokenizer, RunConfig(prompt_column="messages", response_column="a"))


def test_a_tokenizer_that_does_not_tell_where_tokens_lie() -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ConfigError, match=r"\(SimpleNamespace\).*needs a tokenizer\.json"):
        tokenize_rows(ROWS, slow, RunConfig())


# Each line, and whether it is kept.
LINES = [
    (b'{"question": "a", "answer": "b"}', True),
    (b'{"question": "a", "answer": "b"}\r', True),
    ('{"question": "\u2028 \U0001f642 \u2029", "answer": "\U0001f44d\U0001f3fd"}'.encode(), True),
    (b'{"question": "\\u0000", "answer": "nul \\u0000 inside"}', True),
    (b'{"text": "' + b"long " * 20_000 + b'"}', True),
    (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        True,
    ),
    (b'{"instruction": "a", "input": "", "output": 7, "more": {"x": [1, {}]}}', True),
    (b'{"prompt": 1.5, "response": 2}', True),
    (b'{"question": "", "answer": "b"}', False),
    (b'{"question": "a", "answer": ""}', False),
    (b'{"question": ["a"], "answer": false}', False),
    (b'{"question": "a", "answer": NaN}', False),
    (b'{"question": "a", "answer": false},', True),
    (b'{"question": "a", "ans', False),
    (b'{"question": "a\x00", "answer": "b"}', False),
    (b'{"question": "\xff", "answer": "b"}', False),
    (b'{"question": "\\ud83d", "answer": "b"}', False),
    (b"\x00\x00\x00", False),
    (b"[" * 100_000, False),
    (b"[1, 2]", False),
    (b"null", False),
    (b'{"title": "other schema"}', False),
]


def test_every_line_is_kept_or_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n \r\n".join(line for line, _ in LINES))
    rows = load_rows(str(path))
    assert len(rows) == len(LINES)
    result = tokenize_rows(rows, tokenizer, RunConfig())
    kept = [number for number, (_, keep) in enumerate(LINES, 1) if keep]
    assert result.row_numbers.tolist() == kept
    counts = dict(result.counts)
    assert counts.pop("truncated") == 1
    assert sum(counts.values()) == len(LINES)
    assert counts == {
        "kept": len(kept),
        "skipped: no prompt": 1,
        "skipped: no response": 2,
        "skipped: malformed messages": 1,
        "skipped: not a JSON object": 7,
        "skipped: text that is not valid Unicode": 1,
        "skipped: no known columns": 1,
    }
    assert "5 question/answer" in result.describe()
    assert "1 messages" in result.describe()


def test_an_array_is_read_element_by_element(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": '] , {"'}, [], 3, None, {"a": [{"b": "\\"}]}, {"c": '\\"['}]
    for indent in (None, 2):
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows, indent=indent))
        assert list(load_rows(str(path))) == rows
    path.write_text("\n".join(map(json.dumps, rows)))
    assert list(load_rows(str(path))) == rows, "lines, whatever the file's name"
    path.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False))
    assert list(load_rows(str(path))) == rows, "a mark at the beginning is none of its bytes"
    path.write_text('[{"a": 1}, {"b": nonsense}, {"c": 3}]')
    assert list(load_rows(str(path))) == [{"a": 1}, None, {"c": 3}]


def test_an_array_of_lines(tmp_path: Path) -> None:
    """In a file of any name; an array that is torn is refused by one that says it is one."""
    lines = ",\n".join(map(json.dumps, ROWS))
    path = tmp_path / "rows.jsonl"
    for content in (f"[\n{lines}\n]", f"\ufeff [{lines}]\n", json.dumps(ROWS, indent=1), lines):
        path.write_text(content)
        assert list(load_rows(str(path))) == ROWS, content
    path.write_text(f"[\n{lines}")
    assert list(load_rows(str(path))) == [None, *ROWS]
    path.write_text(f"[1]\n{lines}")
    assert list(load_rows(str(path))) == [[1], *ROWS]
    path.rename(tmp_path / "rows.json")
    with pytest.raises(ConfigError, match="not a JSON array: something follows"):
        load_rows(str(tmp_path / "rows.json"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings(tmp_path: Path, encoding: str) -> None:
    """That begin with their mark, as Windows writes them."""
    rows = [{"text": "\u00e9 \u20ac \U0001f642"}, {"text": "\u0a0d"}]  # with the bytes of line ends
    for content in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        path = tmp_path / "rows.json"
        path.write_text(content, encoding=encoding)
        assert list(load_rows(str(path))) == rows


def test_a_number_is_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    numbers = ["1.50", "1e5", "18", "0.1234567890123456789", "-Infinity", "1e400"]
    path.write_text("".join(f'{{"question": "?", "answer": {number}}}\n' for number in numbers))
    rows = load_rows(str(path))
    for row, number in zip(rows, numbers, strict=True):
        assert parse_row(row)[1][-1] == {"role": "assistant", "content": number}
    assert [row["answer"] for row in rows] == [float(number) for number in numbers]
    assert json.loads(json.dumps(rows[0])) == {"question": "?", "answer": 1.5}


def test_a_torn_array_takes_as_long_as_its_length(tmp_path: Path) -> None:
    """Within a string of escaped quotes, each of which looks like the start of another string."""
    path = tmp_path / "rows.json"
    path.write_text('["' + '\\"' * 500_000)  # twenty minutes, if it were searched from each of them
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="the array does not end"):
        load_rows(str(path))
    assert time.perf_counter() - start < 10


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=8))
def test_any_bytes_are_rows_or_counted(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "rows.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in [*lines, b'{"text": "a b"}']))
    counts = tokenize_rows(load_rows(str(path)), tokenizer, RunConfig()).counts
    assert counts.total() == sum(bool(line.strip(b" \t\r")) for line in lines) + 1
    assert counts["kept"] == 1


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(JSON_VALUES, max_size=6), indent=st.sampled_from([None, 1]))
def test_any_array_and_any_lines_are_read_as_json_reads_them(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.json").write_text(json.dumps(rows, indent=indent))
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert repr(list(JsonRows(folder / "a.json"))) == repr(rows)  # NaN is not itself
    one_array = len(rows) == 1 and isinstance(rows[0], list)
    assert repr(list(JsonRows(folder / "b.jsonl"))) == repr(rows[0] if one_array else rows)


def test_only_the_response_is_labelled(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Say red"}, {"role": "assistant", "content": "red"}]
    example = encode(tokenizer, turns, RunConfig())
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
    assert "by form" not in result.describe()
    with pytest.raises(ConfigError, match=r"no row is left.*--max-length \(now 8\)"):
        tokenize_rows(ROWS, tokenizer, RunConfig(max_length=8))


def test_what_is_known_of_the_examples(tokenizer: Any) -> None:
    result = tokenize_rows([*ROWS, {"text": "a b c"}], tokenizer, RunConfig(max_length=36))
    examples = list(result.examples)
    assert result.lengths.tolist() == [len(e.input_ids) for e in examples]
    assert result.num_labels.tolist() == [e.num_label_tokens for e in examples]
    assert result.first_labels.tolist() == [e.first_label for e in examples]
    assert {result.lengths.dtype, result.num_labels.dtype, result.first_labels.dtype} == {
        np.dtype(np.int32)
    }
    assert sum(e.truncated for e in examples) == result.counts["truncated"] == 2
    assert result.examples[1:3] == examples[1:3]
    assert result.examples[-1] == examples[-1]
    with pytest.raises(IndexError):
        result.examples[6]

    part = result.select([5, 2, 0])
    assert list(part.examples) == [examples[i] for i in (5, 2, 0)]
    assert part.lengths.tolist() == [len(examples[i].input_ids) for i in (5, 2, 0)]
    assert dict(part.counts) == {"kept": 3, "truncated": 1}
    assert [part.row_id(i) for i in range(3)] == ["--data:6", "--data:3", "--data:1"]
    assert list(part.select([1]).examples) == [examples[2]]


def test_the_digest_tells_examples_apart(tokenizer: Any) -> None:
    def digest(rows: Any, **options: Any) -> str:
        return tokenize_rows(rows, tokenizer, RunConfig(**options)).digest

    whole = tokenize_rows(ROWS, tokenizer, RunConfig())
    assert digest([*ROWS[:2], {}, *ROWS[2:]]) == whole.digest, "what is skipped does not matter"
    assert whole.select([1, 2]).digest == digest(ROWS[1:3])
    others = [
        digest(ROWS[:4]),
        digest(ROWS[::-1]),
        digest(ROWS, loss_on="all"),
        digest([ROWS[0] | {"answer": "grey"}, *ROWS[1:]]),
    ]
    assert len({whole.digest, *others}) == 5


NAMES = "question answer prompt completion instruction input output messages conversations text"
NAMES += " metadata role content from value system history context tools tool_calls name \ud800"
COLUMN_NAMES = st.sampled_from(NAMES.split())
SURROGATES = st.text(st.characters(codec=None, categories=["Cs", "L", "Cc"]), max_size=6)
CELLS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | SURROGATES
    | st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool", "Hello"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(COLUMN_NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    row=CELLS | st.dictionaries(COLUMN_NAMES, CELLS, max_size=4),
    max_length=st.integers(8, 60),
    loss_on=st.sampled_from(["responses", "last", "all"]),
    truncation=st.sampled_from(["right", "left", "skip"]),
)
def test_any_row_is_an_example_or_skipped(
    tokenizer: Any, row: Any, max_length: int, loss_on: Any, truncation: Any
) -> None:
    config = RunConfig(max_length=max_length, loss_on=loss_on, truncation=truncation)
    columns = tokenize_columns([row], [0], tokenizer, config)
    (outcome,), (input_ids,), (labels,) = (
        columns[name] for name in ("outcome", "input_ids", "labels")
    )
    assert len(input_ids) == len(labels)
    if outcome != "kept":
        assert outcome.startswith("skipped: ")
        assert len(input_ids) == 0
        return
    assert 0 < len(input_ids) <= max_length
    assert columns["num_labels"][0] > 0
    assert all(
        label in (token, IGNORE_INDEX) for token, label in zip(input_ids, labels, strict=True)
    )


def test_what_is_not_learned_of_kept_rows_is_counted(tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [{**row, "id": i, "source": "web"} for i, row in enumerate(ROWS)]
    rows[1]["source"] = ""
    rows.append({"title": "skipped", "url": "…"})
    rows += [{"text": "a<|im_end|>"}, {"text": "b<|im_end|>"}]
    thinking = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    ]
    rows.append({"messages": thinking})
    assert tokenize_rows(rows, tokenizer, RunConfig()).notes == (
        "left out of the rows: id (5 rows), source (4 rows), reasoning_content of turns (1 rows)",
        f"2 rows {HELD} (row 7, for example)",
    )
    many = [{"question": "a", "answer": "b", **{f"c{i}": i + 1 for i in range(15)}}]
    (listed,) = tokenize_rows(many, tokenizer, RunConfig()).notes
    assert listed.endswith("c11 (1 rows) and 3 more")
    assert tokenize_rows(ROWS, tokenizer, RunConfig()).notes == ()


def test_notes_name_their_source() -> None:
    notes = ["left out of the rows: id (5 rows)", "warning: 3 rows have …"]
    assert of_source("a.jsonl", notes) == [
        "a.jsonl: left out of the rows: id (5 rows)",
        "warning: a.jsonl: 3 rows have …",
    ]
    generated = "reasoning-gym:chain_sum?size=3"
    assert of_source(generated, notes) == [f"warning: {generated}: 3 rows have …"]


def test_reasons_in_a_templates_own_words_may_be_many(tokenizer: Any) -> None:
    template = (
        "{% if messages | length == 2 %}{{ raise_exception(messages[0].content) }}{% endif %}"
    )
    loud = copy.deepcopy(tokenizer)
    loud.chat_template = template + tokenizer.chat_template
    turns = [USER, BOT, USER, BOT]
    rows = [{"question": f"q{i}", "answer": "b"} for i in range(20)]
    found = tokenize_rows([*rows, {"messages": turns}], loud, RunConfig())
    assert found.describe().count("skipped: the chat template refuses it: q") == 11
    assert "for 9 other reasons" in found.describe()


USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def test_rows_that_are_nested_too_deeply_are_skipped(tokenizer: Any) -> None:
    deep: Any = "x"
    for _ in range(2000):
        deep = [deep]
    rows = [{"messages": [USER, BOT | {"tool_calls": deep}]}, {"messages": [USER, BOT]}]
    assert tokenize_rows(rows, tokenizer, RunConfig()).counts == {
        "kept": 1,
        "skipped: nested too deeply": 1,
    }


def test_rows_that_a_template_refuses_are_counted(tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system turns.') }}{% endif %}"
    )
    strict.chat_template = refuses + tokenizer.chat_template
    rows = [
        {"messages": [{"role": "system", "content": "s"}, USER, BOT]},
        {"messages": [USER, BOT]},
    ]
    counts = tokenize_rows(rows, strict, RunConfig()).counts
    reason = "skipped: the chat template refuses it: No system turns."
    assert counts == {"kept": 1, reason: 1}
    with pytest.raises(
        ConfigError, match=r"\(1 .*No system turns.*Change what the template refuses"
    ):
        tokenize_rows(rows[:1], strict, RunConfig())
