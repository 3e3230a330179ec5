"""Parse rows: a prompt and a response, a conversation, or plain text."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, NamedTuple

from lorasb_ds.data.turns import (
    Messages,
    RowError,
    Tools,
    as_turns,
    check_unicode,
    is_empty,
    is_list,
    parse_history,
    parse_tools,
    parse_turns,
)
from lorasb_ds.errors import ConfigError

Row = Mapping[str, Any]
CELL_TYPES = (str, int, float, bool, Decimal, date, time)  # whose text is learned

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
SYSTEM_COLUMNS = ("system", "system_prompt")
ADDED_TO_INSTRUCTION = ("input", "context")  # Alpaca's and Dolly's


class ParsedRow(NamedTuple):
    """What a row says.

    Attributes:
        form: named by the columns it was found in.
        said: a conversation that ends with a turn of the assistant, or plain text.
        tools: that the conversation may call.
        left_out: the row's other columns that hold something.
    """

    form: str
    said: Messages | str
    tools: Tools | None
    left_out: tuple[str, ...]


NO_COLUMNS = "no known columns"


def parse_row(
    row: Any, prompt_column: str | None = None, response_column: str | None = None
) -> ParsedRow:
    """Parse a row by the names of its columns.

    Beside prompt and response, or a conversation, these columns are read: a system prompt, earlier
    turns (``history``), ``tools``, and what belongs to an ``instruction``.

    Args:
        prompt_column, response_column: if given, prompt and response are in no other column.
    Raises:
        RowError: if the row is to be skipped.
    """
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object")
    found = find_columns(row, prompt_column, response_column)
    if found is None:
        raise RowError(NO_COLUMNS)
    prompt, response = found
    used = {name.partition(".")[0] for name in _found_in(row, found)}
    form = "/".join(_found_in(row, found))
    if response is None and prompt not in CONVERSATIONS and not is_list(row[prompt]):
        if not isinstance(row[prompt], str) or not row[prompt].strip():
            raise RowError("no text")
        check_unicode(row[prompt])
        return ParsedRow(form, row[prompt], None, _left_out(row, used))
    others = {name: value for name, value in row.items() if name not in used}
    if response is None:
        turns = parse_turns(row[prompt])
    else:
        turns, added = _pair(row, prompt, response, others)
        used |= added
    if (history := parse_history(others.get("history"))) and response is not None:
        turns = [*history, *turns]
        used.add("history")
    system = next((name for name in SYSTEM_COLUMNS if _text(others.get(name))), None)
    if system is not None and turns and turns[0]["role"] not in ("system", "developer"):
        turns = [*as_turns(others[system], "system"), *turns]
        used.add(system)
    tools = None
    try:
        tools = parse_tools(others.get("tools"))
        used.add("tools")
    except RowError:  # beside a question, the column may be about something else
        if response is None:
            raise
    return ParsedRow(form, _up_to_the_last_response(turns), tools, _left_out(row, used))


def _found_in(row: Row, columns: tuple[str, str | None]) -> list[str]:
    """Return the names of the columns, those in the row's metadata as ``metadata.NAME``."""
    named = [name for name in columns if name is not None]
    return [name if row.get(name) is not None else _place(row, name) for name in named]


def _place(row: Row, name: str) -> str:
    inner = row.get("metadata")
    is_inside = isinstance(inner, Mapping) and inner.get(name) is not None
    return f"metadata.{name}" if is_inside else name


def _left_out(row: Row, used: Collection[str]) -> tuple[str, ...]:
    names = (str(n) for n, value in row.items() if n not in used and not is_empty(value))
    return tuple(name.encode(errors="replace").decode() for name in names)


def find_columns(
    row: Row, prompt: str | None = None, response: str | None = None
) -> tuple[str, str | None] | None:
    """Find the columns of prompt and response, or the one with both; None if there are none.

    Both may also be one level down, in the row's ``metadata`` (reasoning-gym); the row's own
    columns come first.
    """
    inner = row.get("metadata")
    inner = inner if isinstance(inner, Mapping) else {}
    named = None if prompt in PARTNERS or response is not None else prompt
    if named is not None and is_list(row.get(named)):
        return named, None
    own = {name for name, value in row.items() if not is_missing(value)}
    inside = {name for name, value in inner.items() if not is_missing(value)}
    # In tables of rows of several forms, the other forms' columns are empty.
    for columns in (own, own | inside, {*row}, {*row, *inner}):
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


def _pair(
    row: Row, prompt_column: str, response_column: str, others: Row
) -> tuple[Messages, set[str]]:
    """Return the turns of prompt and response, and the other columns that belong to them."""
    prompt, response = _cell(row, prompt_column), _cell(row, response_column)
    if prompt is None or prompt == []:
        raise RowError("no prompt")
    if response is None or response == []:
        raise RowError("no response")
    added = set()
    if prompt_column == "instruction" and isinstance(prompt, str):
        for name in ADDED_TO_INSTRUCTION:
            if isinstance(text := _cell(others, name), str):
                prompt = f"{prompt}\n\n{text}"
                added.add(name)
    return [*as_turns(prompt, "user"), *as_turns(response, "assistant")], added


def _text(value: Any) -> bool:
    return isinstance(value, str) and not is_empty(value)


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


def _up_to_the_last_response(turns: Messages) -> Messages:
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None or not (turns[last]["content"].strip() or turns[last].get("tool_calls")):
        raise RowError("no response")
    if last == 0:
        raise RowError("no prompt")
    check_unicode(turns)
    return turns[: last + 1]
