"""Where rows come from, and which of their columns are the prompt and the response."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from lorasb_ds.config import ConfigError

Row = Mapping[str, Any]
Messages = list[dict[str, str]]

# Prompt columns and their partners, in the order in which they are looked for.
COLUMN_PAIRS = (
    ("question", ("answer",)),
    ("query", ("response",)),
    ("prompt", ("response", "completion", "answer")),
    ("instruction", ("output", "response")),
    ("messages", ("messages",)),
)
RESPONSE_COLUMNS = tuple(dict.fromkeys(p for _, partners in COLUMN_PAIRS for p in partners))
FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
REASONING_GYM = "reasoning-gym:"
HELD_OUT_SPLITS = ("test", "validation", "valid", "dev")


def load_rows(source: str, option: str = "--data", *, held_out: bool = False) -> Sequence[Row]:
    """Rows of a file, a saved folder, a reasoning-gym task or a hub data set.

    A hub data set is named ``NAME``, ``NAME:CONFIG``, ``NAME@SPLIT`` or ``NAME:CONFIG@SPLIT``.
    Without a split it is train, or with ``held_out`` the first of ``HELD_OUT_SPLITS`` there is.

    Raises:
        ConfigError: if it cannot be read or has no rows; ``option`` is named in the message.
    """
    if source.startswith(REASONING_GYM):
        rows: Sequence[Row] = reasoning_gym_dataset(source, option)
    else:
        rows = _load_with_datasets(source, option, held_out)
    if len(rows) == 0:
        raise ConfigError(f"{option} {source} has no rows. Give data with at least one row.")
    return rows


def _load_with_datasets(source: str, option: str, held_out: bool) -> Sequence[Row]:
    import datasets

    path = Path(source).expanduser()
    splits = HELD_OUT_SPLITS if held_out else ("train",)
    try:
        if path.is_file():
            file_type = FILE_TYPES.get(path.suffix.lower())
            if file_type is None:
                raise ConfigError(
                    f"{option} {source}: unknown file type {path.suffix!r}. Known: "
                    f"{', '.join(FILE_TYPES)}."
                )
            if path.stat().st_size == 0:
                return []
            return datasets.load_dataset(file_type, data_files=str(path), split="train")
        if path.is_dir():
            return _one_split(datasets.load_from_disk(str(path)), splits, source, option)
        if path.suffix.lower() in FILE_TYPES or source.startswith((".", "/", "~")):
            raise ConfigError(f"{option} {source}: there is no such file.")
        hub = re.fullmatch(r"([^:@]+)(?::([^@]+))?(?:@(.+))?", source)
        if hub is None:
            raise ConfigError(f"{option} {source}: a hub data set is named NAME[:CONFIG][@SPLIT].")
        name, configuration, split = hub.groups()
        loaded = datasets.load_dataset(name, configuration)
        return _one_split(loaded, (split,) if split else splits, source, option)
    except ConfigError:
        raise
    except Exception as error:
        # datasets raises some twenty types here, from parse errors to the hub client's.
        reason = _root_cause(error)
        raise ConfigError(
            f"{option} {source} cannot be read as "
            f"{'a file' if path.is_file() else 'a saved folder' if path.is_dir() else 'a hub name'}"
            f": {reason} Give a {'/'.join(FILE_TYPES)} file, a folder saved by `datasets`, a hub "
            "name (needs a network or a filled cache), or 'reasoning-gym:NAME?size=N&seed=S'."
        ) from error


def _one_split(loaded: Any, wanted: tuple[str, ...], source: str, option: str) -> Sequence[Row]:
    if not isinstance(loaded, Mapping):
        return loaded
    found = next((name for name in wanted if name in loaded), None)
    if found is None:
        raise ConfigError(
            f"{option} {source}: no split {' or '.join(wanted)}; it has {', '.join(loaded)}."
        )
    return loaded[found]


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(".") + "."


def reasoning_gym_dataset(source: str, option: str = "--data") -> Any:
    """The generated task ``reasoning-gym:NAME?size=N&seed=S``; it also scores answers.

    Other parameters of the address go to the task's configuration, numbers as numbers.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError(
            f"{option} {source} needs the package reasoning-gym: pip install 'lorasb-ds[demo]'."
        ) from None
    name, _, query = source.removeprefix(REASONING_GYM).partition("?")
    if name not in DATASETS:
        raise ConfigError(
            f"{option} {source}: reasoning-gym has no task {name!r}. It has: "
            f"{', '.join(sorted(DATASETS))}."
        )
    parameters = {key: _number(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    try:
        return reasoning_gym.create_dataset(name, **{"size": 1000, "seed": 0, **parameters})
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"{option} {source}: {error}. The address is reasoning-gym:NAME?size=N&seed=S, with "
            f"further parameters of the task {name}."
        ) from None


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def choose_columns(row: Row, prompt: str | None, response: str | None) -> tuple[str, str]:
    """The prompt's and the response's column: as asked for, else the first known pair.

    A response column may also lie one level down, in the row's ``metadata`` (reasoning-gym).
    """
    columns = {*row, *(row["metadata"] if isinstance(row.get("metadata"), Mapping) else ())}
    for option, name in (("--prompt-column", prompt), ("--response-column", response)):
        if name is not None and name not in columns:
            raise ConfigError(f"{option} {name}: the data has no such column. {_has(row)}")
    if response is not None and "messages" in (prompt, response):
        raise ConfigError(
            f"--response-column {response}: the response of messages is their last assistant turn; "
            "leave the option out."
        )
    known: tuple[tuple[str, tuple[str, ...]], ...] = COLUMN_PAIRS
    if prompt is not None:
        known = ((prompt, dict(COLUMN_PAIRS).get(prompt, RESPONSE_COLUMNS)),)
    for candidate, partners in known:
        partner = response or next((p for p in partners if p in columns), None)
        usable = candidate in columns and (response is None or candidate != "messages")
        if usable and partner is not None:
            return candidate, partner
    raise ConfigError(
        f"No known prompt and response columns in the data. {_has(row)} Name them by "
        "--prompt-column and --response-column. Known pairs: "
        f"{', '.join(f'{p}/{q[0]}' for p, q in COLUMN_PAIRS)}."
    )


def _has(row: Row) -> str:
    return f"It has: {', '.join(map(str, row))}."


def to_messages(row: Row, prompt_column: str, response_column: str) -> tuple[Messages, str] | str:
    """A row as the turns before the response, and the response; or why the row is skipped."""
    if prompt_column == "messages":
        return _split_conversation(row.get("messages"))
    prompt, response = _text(row, prompt_column), _text(row, response_column)
    if prompt is None:
        return "skipped: no prompt"
    if response is None:
        return "skipped: no response"
    extra = _text(row, "input") if prompt_column == "instruction" else None
    content = f"{prompt}\n\n{extra}" if extra else prompt
    return [{"role": "user", "content": content}], response


def _text(row: Row, column: str) -> str | None:
    value = row.get(column)
    if value is None and isinstance(row.get("metadata"), Mapping):
        value = row["metadata"].get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return str(value) if str(value).strip() else None


def _split_conversation(messages: Any) -> tuple[Messages, str] | str:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return "skipped: no messages"
    turns = []
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            return "skipped: malformed messages"
        turns.append({"role": str(turn.get("role")), "content": turn["content"]})
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if last == 0 or not turns[last]["content"].strip():
        return "skipped: no response"
    return turns[:last], turns[last]["content"]
