"""Rows -> token ids and the labels among them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateError

from lorasb_ds.config import ConfigError, RunConfig
from lorasb_ds.rows import Messages, Row, choose_columns, to_messages

IGNORE_INDEX = -100  # torch's cross-entropy skips these labels

# For tokenizers without a chat template.
DEFAULT_PROMPT = "### Question:\n{prompt}\n\n### Answer:\n"


@dataclass(frozen=True)
class Example:
    """One row as the model sees it. Labels are aligned with the token ids; the loss shifts them."""

    input_ids: list[int]
    labels: list[int]  # IGNORE_INDEX where nothing is to be learned
    truncated: bool = False

    @property
    def num_label_tokens(self) -> int:
        """The first token of a row has nothing before it to be predicted from."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])

    @property
    def first_label(self) -> int:
        """Position of the first token that is learned; the row's length if none is."""
        known = (i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)
        return next(known, len(self.labels))


@dataclass
class TokenizedRows:
    """Examples, and what became of every row: ``kept``, ``truncated`` (also kept) or skipped."""

    examples: list[Example] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(example.input_ids) for example in self.examples], np.int32)

    @property
    def source_sizes(self) -> tuple[int, ...]:
        return (len(self.examples),)

    @property
    def digest(self) -> str:
        return digest(self.examples)

    def row_id(self, i: int) -> str:
        return f"row:{i + 1}"

    def describe(self) -> str:
        return ", ".join(f"{n} {what}" for what, n in self.counts.items())


def digest(examples: Iterable[Example]) -> str:
    """Equal for equal examples in equal order."""
    result = hashlib.sha256()
    for example in examples:
        result.update(f"{example.input_ids}{example.labels}".encode())
    return result.hexdigest()


def render_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of everything before the response: the chat template's, or ``DEFAULT_PROMPT``."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    text = DEFAULT_PROMPT.format(prompt="\n\n".join(turn["content"] for turn in messages))
    return tokenizer(text)["input_ids"]


def encode(tokenizer: Any, messages: Messages, response: str, max_length: int) -> Example | str:
    """Prompt + response + end of sequence, cut to ``max_length``; or why the row is skipped.

    A row of which no response token is left has nothing to learn from and would weigh nothing.
    """
    try:
        prompt_ids = render_prompt(tokenizer, messages)
    except TemplateError:  # Gemma's template refuses system turns, Mistral's needs alternation, …
        return "skipped: the chat template refuses the conversation"
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    input_ids = [*prompt_ids, *response_ids, tokenizer.eos_token_id]
    if len(prompt_ids) >= max_length:
        return "skipped: no response token left after truncation"
    labels = [IGNORE_INDEX] * len(prompt_ids) + input_ids[len(prompt_ids) :]
    return Example(input_ids[:max_length], labels[:max_length], len(input_ids) > max_length)


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    config: RunConfig,
    option: str = "--data",
) -> TokenizedRows:
    """All rows as examples; every row is kept or counted.

    Raises:
        ConfigError: if no column fits, or nothing is left.
    """
    columns = choose_columns(rows[0], config.prompt_column, config.response_column)
    result = TokenizedRows()
    for row in rows:
        parts = to_messages(row, *columns)
        example = parts if isinstance(parts, str) else encode(tokenizer, *parts, config.max_length)
        if isinstance(example, Example):
            result.examples.append(example)
            result.counts["kept"] += 1
            result.counts["truncated"] += example.truncated
        else:
            result.counts[str(example)] += 1
    result.counts = +result.counts
    if not result.examples:
        raise ConfigError(
            f"{option}: no row is left to learn from ({result.describe()}). Check "
            f"--prompt-column/--response-column (now {columns[0]}/{columns[1]}) and --max-length "
            f"(now {config.max_length})."
        )
    return result
