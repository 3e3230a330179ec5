"""Parse rows: a prompt and a response, a conversation, or plain text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from lorasb_ds.errors import ConfigError

Row = Mapping[str, Any]
CELL_TYPES = (str, int, float, bool, Decimal, date, time)  # whose text is learned
Messages = list[dict[str, str]]  # turns of role and content; weight "0": not learned

# Prompt columns and their response columns, in the order of the search.
COLUMN_PAIRS = (
    ("question", ("answer",)),
    ("query", ("response",)),
    ("prompt", ("response", "completion", "answer")),
    ("instruction", ("output", "response")),
    ("problem", ("solution",)),
)
PARTNERS = dict(COLUMN_PAIRS)
RESPONSE_COLUMNS = tuple(dict.fromkeys(p for _, partners in COLUMN_PAIRS for p in partners))
CONVERSATIONS = ("messages", "conversations")
WHOLE_COLUMNS = (*CONVERSATIONS, "text")  # each has all of a row
# OpenAI's roles, and what ShareGPT calls them.
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
    "tool": "tool",
}


class RowError(Exception):
    """The reason why a row is skipped."""


NO_COLUMNS = "no known columns"


def parse_row(
    row: Any, prompt_column: str | None = None, response_column: str | None = None
) -> tuple[str, Messages | str]:
    """Parse a row by the names of its columns.

    Args:
        prompt_column, response_column: if given, no other column is used.
    Returns:
        The row's form, named by its columns; and a conversation that ends with a turn of the
        assistant, or plain text.
    Raises:
        RowError: if the row is to be skipped.
    """
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object")
    found = find_columns(row, prompt_column, response_column)
    if found is None:
        raise RowError(NO_COLUMNS)
    prompt, response = found
    if response is not None:
        return f"{prompt}/{response}", _up_to_the_last_response(_pair(row, prompt, response))
    if prompt in CONVERSATIONS or is_list(row[prompt]):
        return prompt, _up_to_the_last_response(_turns(row[prompt]))
    if not isinstance(row[prompt], str) or not row[prompt].strip():
        raise RowError("no text")
    return prompt, _unicode(row[prompt])


def find_columns(
    row: Row, prompt: str | None = None, response: str | None = None
) -> tuple[str, str | None] | None:
    """Find the columns of prompt and response, or the one with both; None if there are none.

    A response column may also be one level down, in the row's ``metadata`` (reasoning-gym).
    """
    inner = row.get("metadata")
    cells = {**(inner if isinstance(inner, Mapping) else {}), **row}
    named = None if prompt in PARTNERS or response is not None else prompt
    if named is not None and is_list(row.get(named)):
        return named, None
    filled = {name for name, value in cells.items() if not is_missing(value)}
    # In tables of rows of several forms, the other forms' columns are empty.
    for columns in (filled, set(cells)):
        if pair := _find_pair(columns, prompt, response):
            return pair
        if response is None:
            wanted = [name for name in WHOLE_COLUMNS if prompt is None or name == prompt]
            whole = next((name for name in wanted if name in columns and name in row), None)
            if whole is not None:
                return whole, None
    return None


def _find_pair(
    columns: Collection[str], prompt: str | None, response: str | None
) -> tuple[str, str] | None:
    pairs: Sequence[tuple[str, tuple[str, ...]]] = COLUMN_PAIRS
    if prompt in CONVERSATIONS:
        return None
    if prompt is not None:
        pairs = ((prompt, PARTNERS.get(prompt, RESPONSE_COLUMNS)),)
    for candidate, partners in pairs:
        wanted = partners if response is None else (response,)
        partner = next((p for p in wanted if p in columns), None)
        if candidate in columns and partner is not None:
            return candidate, partner
    return None


def check_columns(prompt: str | None, response: str | None) -> None:
    """Raise ConfigError for a response column beside a conversation, which has its own."""
    named = next((name for name in CONVERSATIONS if name in (prompt, response)), None)
    if response is not None and named is not None:
        raise ConfigError(
            f"--response-column {response}: the responses of {named} are their assistant turns; "
            "leave the option out."
        )


def unknown_columns(option: str, row: Row, prompt: str | None, response: str | None) -> ConfigError:
    """Return the error for data without a known form; ``row`` is the first one."""
    has = f"The first row has: {', '.join(map(str, row))}."
    for asked, name in (("--prompt-column", prompt), ("--response-column", response)):
        if name is not None and name not in row:
            return ConfigError(f"{asked} {name}: {option} has no such column. {has}")
    return ConfigError(
        f"{option}: no known prompt and response columns. {has} Name them by --prompt-column and "
        "--response-column. Known: "
        f"{', '.join(f'{p}/{q[0]}' for p, q in COLUMN_PAIRS)}, {', '.join(WHOLE_COLUMNS)}."
    )


def _pair(row: Row, prompt_column: str, response_column: str) -> Messages:
    prompt, response = _cell(row, prompt_column), _cell(row, response_column)
    if prompt is None or prompt == []:
        raise RowError("no prompt")
    if response is None or response == []:
        raise RowError("no response")
    extra = _cell(row, "input") if prompt_column == "instruction" else None
    if isinstance(prompt, str) and isinstance(extra, str):
        prompt = f"{prompt}\n\n{extra}"
    return [*_as_turns(prompt, "user"), *_as_turns(response, "assistant")]


def _cell(row: Row, column: str) -> str | list[Any] | None:
    """Return a cell's text or turns; None if it has neither."""
    value: Any = row.get(column)
    if value is None and isinstance(row.get("metadata"), Mapping):
        value = row["metadata"].get(column)
    if is_list(value):
        return list(value)
    if is_missing(value) or not isinstance(value, CELL_TYPES):
        return None
    text = _written(value)
    return text if text.strip() else None


def _written(value: str | float | Decimal | date | time) -> str:
    """Return a cell as text: as JSON writes it, and decimals with all of their digits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isinf(value) and type(value) is float:
        return "Infinity" if value > 0 else "-Infinity"
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: None, or a number that is none (NaN, of pandas)."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def _as_turns(value: str | list[Any], role: str) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else _turns(value)


def _turns(value: Any) -> Messages:
    """Parse OpenAI's turns (role, content) or ShareGPT's (from, value)."""
    if not is_list(value):
        raise RowError("no messages")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise RowError("malformed messages")
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise RowError("a turn of an unknown role")
        if turn.get("tool_calls"):
            raise RowError("a turn that calls tools")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        turns.append({"role": ROLES[role], "content": _content(content)})
        # OpenAI's and axolotl's ways to exclude a turn of the assistant from the loss.
        if turn.get("weight") == 0 or turn.get("train") is False:
            turns[-1]["weight"] = "0"
    return turns


def _content(content: Any) -> str:
    """Return a turn's text, from a string or from parts that are text."""
    if isinstance(content, str):
        return content
    if not is_list(content):
        raise RowError("malformed messages")
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise RowError("a turn with parts that are not text")
    return "".join(map(str, texts))


def _up_to_the_last_response(turns: Messages) -> Messages:
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None or not turns[last]["content"].strip():
        raise RowError("no response")
    if last == 0:
        raise RowError("no prompt")
    for turn in turns:
        _unicode(turn["content"])
    return turns[: last + 1]


def _unicode(text: str) -> str:
    """Return the text; RowError for half a surrogate pair, which tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("text that is not valid Unicode") from None
    return text


def is_list(value: Any) -> bool:
    """Return whether a value is a sequence, but not text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
