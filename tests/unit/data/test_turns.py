"""Turns, tools and their calls, in the forms that people store them in."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasb_ds.data.formats import parse_row
from lorasb_ds.data.turns import RowError, parse_tools, parse_turns

RATE = {"name": "get_rate", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": RATE}
CALL = {"type": "function", "function": {"name": "get_rate", "arguments": {"of": "EUR"}}}
TURNS = [
    {"role": "user", "content": "rate?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "1.1", "tool_call_id": "7"},
    {"role": "assistant", "content": "It is 1.1.", "reasoning_content": "A rate."},
]


@pytest.mark.parametrize(
    "tools",
    [[TOOL], [RATE], json.dumps([TOOL]), json.dumps([RATE]), [json.dumps(TOOL)], RATE],
    ids=["OpenAI's", "bare", "as text", "bare, as text", "texts", "one"],
)
def test_tools(tools: Any) -> None:
    assert parse_tools(tools) == [TOOL]
    row = {"tools": tools, "messages": TURNS}
    assert parse_row(row) == ("messages", TURNS, [TOOL], ())


def test_tables_give_every_tool_the_fields_of_all_others() -> None:
    assert parse_tools([{**RATE, "strict": None, "parameters": {"type": "object", "x": None}}]) == [
        TOOL
    ]


def test_no_tools_and_none_that_can_be_read() -> None:
    for nothing in (None, "", "[]", [], {}):
        assert parse_tools(nothing) is None
    for wrong in ("search, calculator", 3, ["search"]):
        with pytest.raises(RowError, match="tools that are not a JSON list of objects"):
            parse_tools(wrong)
        with pytest.raises(RowError, match="tools that are not a JSON list of objects"):
            parse_row({"tools": wrong, "messages": TURNS})
        found = parse_row({"tools": wrong, "question": "Which tool?", "answer": "A saw."})
        assert (found.tools, found.left_out) == (None, ("tools",))


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [{"name": "get_rate", "arguments": {"of": "EUR"}}],
        [{"type": "function", "function": {"name": "get_rate", "arguments": '{"of": "EUR"}'}}],
    ],
    ids=["objects", "as text", "bare", "arguments as text"],
)
def test_calls(calls: Any) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": calls}, *TURNS[2:]]
    assert parse_turns(turns) == TURNS


def test_sharegpts_calls() -> None:
    """As LLaMA-Factory stores them."""
    stored = [
        {"from": "human", "value": "rate?"},
        {"from": "function_call", "value": '{"name": "get_rate", "arguments": {"of": "EUR"}}'},
        {"from": "observation", "value": "1.1"},
        {"from": "gpt", "value": "It is 1.1."},
    ]
    found = parse_turns(stored)
    assert found[:2] == TURNS[:2]
    assert [turn["role"] for turn in found[2:]] == ["tool", "assistant"]
    with pytest.raises(RowError, match="calls of tools that are not JSON objects"):
        parse_turns([stored[0], {"from": "function_call", "value": "get_rate()"}])


JSON = st.recursive(
    st.integers() | st.booleans() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(arguments=st.dictionaries(st.text(max_size=5), JSON, min_size=1))
def test_arguments_as_text_are_those_as_objects(arguments: dict[str, Any]) -> None:
    """OpenAI stores them as text, and templates write objects."""
    found = []
    for stored in (arguments, json.dumps(arguments)):
        call = {"function": {"name": "f", "arguments": stored}}
        found.append(parse_turns([{"role": "assistant", "tool_calls": [call]}]))
    assert found[0] == found[1]
    assert found[0][0]["tool_calls"][0]["function"]["arguments"] == arguments
