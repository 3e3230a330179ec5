"""What a row says, by the names of its columns."""

from __future__ import annotations

import math
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import pytest

from lorasb_ds.data.formats import check_columns, find_columns, parse_row, unknown_columns
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be short."}


@pytest.mark.parametrize(
    ("columns", "asked", "expected"),
    [
        (["question", "answer"], (None, None), ("question", "answer")),
        (["type", "query", "response"], (None, None), ("query", "response")),
        (["prompt", "completion"], (None, None), ("prompt", "completion")),
        (["instruction", "input", "output"], (None, None), ("instruction", "output")),
        (["messages"], (None, None), ("messages", None)),
        (["id", "conversations"], (None, None), ("conversations", None)),
        (["text", "id"], (None, None), ("text", None)),
        (["prompt", "prompt_id", "messages"], (None, None), ("messages", None)),
        (["question", "answer", "messages"], ("messages", None), ("messages", None)),
        (["question", "answer", "query", "response"], ("query", None), ("query", "response")),
        (["text", "summary", "answer"], ("text", "summary"), ("text", "summary")),
        (["question", "rationale"], (None, "rationale"), ("question", "rationale")),
        (["text", "answer"], ("text", None), ("text", "answer")),
        (["text", "label"], ("title", None), None),
        (["text", "label"], (None, "reply"), None),
        (["question"], ("question", None), None),
        (["messages", "summary"], (None, "summary"), None),
        (["text", "label"], ("messages", "text"), None),
    ],
)
def test_columns(columns: list[str], asked: Any, expected: Any) -> None:
    assert find_columns(dict.fromkeys(columns, "x"), *asked) == expected


def test_empty_columns_belong_to_rows_of_other_forms() -> None:
    joined = {"question": None, "answer": None, "messages": None, "text": "abc"}
    assert parse_row(joined)[:2] == ("text", "abc")
    joined |= {"text": None, "messages": [USER, BOT]}
    assert parse_row(joined)[:2] == ("messages", [USER, BOT])
    joined = {"question": math.nan, "answer": math.nan, "text": "abc"}  # as pandas writes them
    assert parse_row(joined)[:2] == ("text", "abc")
    row = {"instruction": "Hi", "input": math.nan, "output": "Hello"}
    assert parse_row(row)[:2] == ("instruction/output", [USER, BOT])


# What is read, and what is learned.
WRITTEN = {
    "02108": "02108",
    "nan": "nan",
    18: "18",
    123456789012345678: "123456789012345678",
    -1.5: "-1.5",
    math.inf: "Infinity",
    -math.inf: "-Infinity",
    Decimal("1.50"): "1.50",
    Decimal("1E+3"): "1000",
    date(2024, 1, 31): "2024-01-31",
    datetime(2024, 1, 31, 12): "2024-01-31 12:00:00",
    time(12, 30): "12:30:00",
}


@pytest.mark.parametrize(("cell", "text"), [*WRITTEN.items(), (True, "true"), (False, "false")])
def test_cells(cell: Any, text: str) -> None:
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert parse_row({"question": cell, "answer": cell})[:2] == ("question/answer", said)


@pytest.mark.parametrize(
    ("row", "form", "said"),
    [
        ({"question": "Hi", "answer": "Hello"}, "question/answer", [USER, BOT]),
        (
            {"instruction": "Add", "input": "1, 2", "output": 3},
            "instruction/output",
            [{"role": "user", "content": "Add\n\n1, 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Hello"},
            "instruction/output",
            [USER, BOT],
        ),
        ({"messages": [SYSTEM, USER, BOT, USER]}, "messages", [SYSTEM, USER, BOT]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "Hi"]},
                    BOT,
                ]
            },
            "messages",
            [USER, BOT],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be short."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "user", "value": "Hi"},
                    {"from": "assistant", "value": "Hello"},
                ]
            },
            "conversations",
            [SYSTEM, USER, BOT, USER, BOT],
        ),
        ({"prompt": [SYSTEM, USER], "completion": [BOT]}, "prompt/completion", [SYSTEM, USER, BOT]),
        ({"prompt": [USER], "completion": "Hello"}, "prompt/completion", [USER, BOT]),
        ({"text": " as it is\n"}, "text", " as it is\n"),
        (
            {"question": "Hi", "answer": "4", "metadata": {"answer": "5"}},
            "question/answer",
            [USER, {"role": "assistant", "content": "4"}],
        ),
    ],
)
def test_forms(row: dict[str, Any], form: str, said: Any) -> None:
    assert parse_row(row)[:2] == (form, said)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "said", "left_out"),
    [
        (
            {
                "system": "Answer in French.",
                "instruction": "Say hello",
                "input": "",
                "output": "Bonjour",
                "history": [["Who are you?", "A helper."]],
            },
            [
                turn("system", "Answer in French."),
                turn("user", "Who are you?"),
                turn("assistant", "A helper."),
                turn("user", "Say hello"),
                turn("assistant", "Bonjour"),
            ],
            (),
        ),
        (
            {"instruction": "When?", "context": "In 1911.", "response": "1911", "category": "qa"},
            [turn("user", "When?\n\nIn 1911."), turn("assistant", "1911")],
            ("category",),
        ),
        (
            {
                "system": "Be short.",
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
            },
            [SYSTEM, USER, BOT],
            (),
        ),
        (
            {"system_prompt": "Be short.", "prompt": "Hi", "response": "Hello"},
            [SYSTEM, USER, BOT],
            (),
        ),
        ({"system": "Be long.", "messages": [SYSTEM, USER, BOT]}, [SYSTEM, USER, BOT], ("system",)),
        (
            {"question": "Hi", "answer": "Hello", "id": 0, "source": "web", "note": " ", "x": None},
            [USER, BOT],
            ("id", "source"),
        ),
        ({"text": "a", "system": "s", "tools": "[]", "y": float("nan")}, "a", ("system", "tools")),
        (
            {"history": [["a", None]], "instruction": "Hi", "output": "Hello"},
            [USER, BOT],
            ("history",),
        ),
    ],
)
def test_what_a_row_holds_is_taken_or_said(row: Any, said: Any, left_out: Any) -> None:
    found = parse_row(row)
    assert (found.said, found.left_out) == (said, left_out)


@pytest.mark.parametrize("empty", [{}, {"messages": None}])
def test_metadata_comes_after_the_rows_own_columns(empty: dict[str, Any]) -> None:
    inner = {"metadata": {"question": "Who?", "answer": "Me"}}
    found = parse_row({**inner, "messages": [USER, BOT]})
    assert (found.form, found.said, found.left_out) == ("messages", [USER, BOT], ("metadata",))
    assert parse_row({**inner, "text": "abc"})[:2] == ("text", "abc")
    found = parse_row({**inner, **empty})
    assert found.form == "metadata.question/metadata.answer"
    assert (found.said, found.left_out) == ([turn("user", "Who?"), turn("assistant", "Me")], ())


def test_named_columns() -> None:
    row = {"question": "Hi", "answer": "4", "metadata": {"cot": "Hello"}, "dialog": [USER, BOT]}
    assert parse_row(row, None, "cot")[:2] == ("question/metadata.cot", [USER, BOT])
    assert parse_row(row, "dialog")[:2] == ("dialog", [USER, BOT])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "not a JSON object"),
        ([1], "not a JSON object"),
        ({}, "no known columns"),
        ({"title": "a"}, "no known columns"),
        ({"question": "a", "answer": None}, "no response"),
        ({"question": "a", "answer": " "}, "no response"),
        ({"question": "a", "answer": {"b": 1}}, "no response"),
        ({"question": None, "answer": "b"}, "no prompt"),
        ({"question": math.nan, "answer": "b"}, "no prompt"),
        ({"question": "a", "answer": math.nan}, "no response"),
        ({"question": "a", "answer": Decimal("nan")}, "no response"),
        ({"prompt": [], "completion": [BOT]}, "no prompt"),
        ({"prompt": [USER], "completion": []}, "no response"),
        ({"text": " \n"}, "no text"),
        ({"text": 3}, "no text"),
        ({"messages": None}, "no messages"),
        ({"messages": "text"}, "no messages"),
        ({"messages": []}, "no response"),
        ({"messages": [USER]}, "no response"),
        ({"messages": [BOT]}, "no prompt"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "no response"),
        ({"messages": ["Hi"]}, "malformed messages"),
        ({"messages": [{"role": "user"}, BOT]}, "malformed messages"),
        ({"messages": [{"role": 3, "content": "a"}, BOT]}, "a turn of an unknown role"),
        ({"messages": [{"role": "critic", "content": "a"}, BOT]}, "a turn of an unknown role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "a"}]}, BOT]},
            "a turn with parts that are not text (images, sound)",
        ),
        ({"question": "\ud800", "answer": "b"}, "text that is not valid Unicode"),
        ({"text": "half \udc00"}, "text that is not valid Unicode"),
        ({"messages": [USER, BOT | {"name": "\ud800"}]}, "text that is not valid Unicode"),
        ({"messages": [USER, BOT], "tools": [{"\ud800": 1}]}, "text that is not valid Unicode"),
    ],
)
def test_rows_that_are_skipped(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        parse_row(row)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            (None, None),
            "--data a: no known prompt and response columns.*row has: title, label",
        ),
        (("headline", None), "--prompt-column headline: --data a has no such column.*title, label"),
        ((None, "reply"), "--response-column reply"),
    ],
)
def test_missing_columns(asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        raise unknown_columns("--data a", {"title": "a", "label": "b"}, *asked)


def test_conversations_bring_their_own_responses() -> None:
    for prompt, response in (("messages", "summary"), (None, "conversations")):
        with pytest.raises(ConfigError, match="their assistant turns; leave the option out"):
            check_columns(prompt, response)
    check_columns("messages", None)
