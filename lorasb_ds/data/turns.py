"""Parse turns of a conversation, OpenAI's or ShareGPT's, and the tools that they may call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

# Turns of role, content and what else they have (tool_calls, reasoning_content, …), by the names
# that chat templates know. weight "0": not learned.
Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]]  # each {"type": "function", "function": {"name": …, …}}

# OpenAI's roles, and what ShareGPT, LLaMA-Factory and Llama call them.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
PARSED = ("role", "from", "content", "value", "weight", "train")  # all others are kept as they are


class RowError(Exception):
    """The reason why a row is skipped."""


def parse_turns(value: Any) -> Messages:
    """Parse turns of role and content (OpenAI), or of from and value (ShareGPT).

    Raises:
        RowError: if they are no conversation of text.
    """
    if not is_list(value):
        raise RowError("no messages")
    return [_turn(turn) for turn in value]


def parse_tools(value: Any) -> Tools | None:
    """Parse the descriptions of tools, which may be JSON text; None if there are none.

    Raises:
        RowError: if they are no list of objects.
    """
    found = _from_json(value)
    if is_empty(found):
        return None
    tools = [_from_json(tool) for tool in found] if is_list(found) else [found]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools that are not a JSON list of objects")
    check_unicode(tools)
    return [_as_function(_without_none(tool)) for tool in tools]


def as_turns(value: str | list[Any], role: str) -> Messages:
    """Return the turns of a cell: those that it lists, or one of its text."""
    return [{"role": role, "content": value}] if isinstance(value, str) else parse_turns(value)


def parse_history(value: Any) -> Messages | None:
    """Parse earlier turns as pairs of a prompt and a response (Alpaca); None if they are not."""
    if not is_list(value):
        return None
    turns: Messages = []
    for pair in value:
        if not is_list(pair) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            return None
        turns += [*as_turns(pair[0], "user"), *as_turns(pair[1], "assistant")]
    return turns


def is_list(value: Any) -> bool:
    """Return whether a value is a sequence, but not text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_empty(value: Any) -> bool:
    """Return whether a cell holds nothing: null, NaN, blank text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value in ([], {}) or value != value


def check_unicode(value: Any) -> None:
    """Raise RowError for half a surrogate pair in a value, which tokenizers do not take."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise RowError("text that is not valid Unicode") from None


def _turn(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise RowError("malformed messages")
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError("a turn of an unknown role")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    rest = {k: _without_none(v) for k, v in turn.items() if k not in PARSED and not is_empty(v)}
    calls = rest.pop("tool_calls", None)
    if role == "function_call":  # LLaMA-Factory's: the call is the content
        calls, content = content, None
    if calls is not None:
        rest["tool_calls"] = _tool_calls(calls)
        content = "" if content is None else content
    parsed = {"role": ROLES[role], "content": _content(content), **rest}
    # OpenAI's and axolotl's ways to exclude a turn of the assistant from the loss.
    if turn.get("weight") == 0 or turn.get("train") is False:
        parsed["weight"] = "0"
    return parsed


def _tool_calls(value: Any) -> list[Any]:
    """Parse calls, which may be JSON text, as their arguments may: templates write those as JSON.

    https://huggingface.co/docs/transformers/chat_extras has the form that templates expect.
    """
    calls = _from_json(value)
    calls = calls if is_list(calls) else [calls]
    parsed = []
    for call in calls:
        if not isinstance(call, Mapping):
            raise RowError("calls of tools that are not JSON objects")
        call = _as_function(_without_none(call))
        function = call.get("function")
        if isinstance(function, Mapping):
            arguments = _from_json(function.get("arguments"))
            if isinstance(arguments, Mapping):
                call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return parsed


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool or a call in OpenAI's form: name and so on below "function"."""
    return {"type": "function", "function": tool} if "name" in tool else tool


def _from_json(value: Any) -> Any:
    """Return what a text says as JSON; a value that is none as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _without_none(value: Any) -> Any:
    """Leave out null fields: Arrow gives every row of a table the fields of all others."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(item) for item in value] if is_list(value) else value


def _content(content: Any) -> str:
    """Return a turn's text, from a string or from parts that are text."""
    if isinstance(content, str):
        return content
    if not is_list(content):
        raise RowError("malformed messages")
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise RowError("a turn with parts that are not text (images, sound)")
    return "".join(map(str, texts))
