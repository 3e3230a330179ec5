"""Prompt and response -> token ids with the prompt masked -> padded batches."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError

from lorasb_ds.config import ConfigError, RunConfig
from lorasb_ds.rows import Messages, Row, choose_columns, to_messages

IGNORE_INDEX = -100  # torch's cross-entropy skips these labels

# For tokenizers without a chat template.
DEFAULT_PROMPT = "### Question:\n{prompt}\n\n### Answer:\n"


@dataclass(frozen=True)
class Example:
    """One row as the model sees it: labels are the token ids from ``num_prompt_tokens`` on."""

    input_ids: list[int]
    num_prompt_tokens: int
    truncated: bool = False

    @property
    def num_label_tokens(self) -> int:
        return len(self.input_ids) - self.num_prompt_tokens


@dataclass
class TokenizedRows:
    """Examples, and what became of every row: ``kept``, ``truncated`` (also kept) or skipped."""

    examples: list[Example] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        return ", ".join(f"{n} {what}" for what, n in self.counts.items())


def digest(examples: Iterable[Example]) -> str:
    """Equal for equal examples in equal order."""
    result = hashlib.sha256()
    for example in examples:
        result.update(f"{example.num_prompt_tokens}:{example.input_ids}".encode())
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
    return Example(input_ids[:max_length], len(prompt_ids), len(input_ids) > max_length)


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


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch. ``labels`` are aligned with ``input_ids``; the loss shifts them."""

    input_ids: torch.Tensor  # (rows, length), int64
    attention_mask: torch.Tensor  # (rows, length), int64
    labels: torch.Tensor  # (rows, length), int64, IGNORE_INDEX on prompts and padding
    num_label_tokens: int

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.num_label_tokens,
        )


@dataclass(frozen=True)
class Sample:
    """Rows as micro-batches, this rank's; and their numbers, of all ranks together."""

    batches: Sequence[Batch]
    num_rows: int
    num_label_tokens: int


def collate(examples: Sequence[Example], pad_token_id: int, weightless: bool = False) -> Batch:
    """Pad on the right to the longest example.

    Args:
        weightless: label nothing, so that the batch takes part in every collective of a step
            and adds nothing to it. For ranks that are short of rows.
    """
    length = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, example in enumerate(examples):
        n, start = len(example.input_ids), example.num_prompt_tokens
        input_ids[i, :n] = torch.tensor(example.input_ids)
        attention_mask[i, :n] = 1
        if not weightless:
            labels[i, start:n] = input_ids[i, start:n]
    # The first token of a row has nothing before it to be predicted from.
    num_label_tokens = int((labels[:, 1:] != IGNORE_INDEX).sum())
    return Batch(input_ids, attention_mask, labels, num_label_tokens)


def micro_batches(
    examples: Sequence[Example],
    indices: Sequence[int],
    micro_batch_size: int,
    pad_token_id: int,
    rank: int,
    world_size: int,
) -> Iterator[Batch]:
    """This rank's share of ``indices``, in micro-batches; the same number on every rank.

    Micro-batches are dealt out in turn: micro-batch ``i`` of rank ``k`` holds the rows from
    ``(i * world_size + k) * micro_batch_size`` on. A rank without rows gets weightless batches.
    """
    rows_per_round = micro_batch_size * world_size
    for round_index in range(math.ceil(len(indices) / rows_per_round)):
        start = round_index * rows_per_round + rank * micro_batch_size
        mine = [examples[i] for i in indices[start : start + micro_batch_size]]
        yield collate(mine or [examples[indices[0]]], pad_token_id, weightless=not mine)


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """The order of one epoch's rows: a permutation, the same on every rank."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_rows, generator=generator).tolist()


def init_sample(num_rows: int, wanted: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Rows of the init sample: those of the gradient, and those held back to measure losses on.

    ``wanted`` rows together, or 0.1 % of all but at least 64; never more than all. One in eight is
    held back, but at least one; a sample of one row is used for both.
    """
    count = min(wanted or max(64, math.ceil(num_rows / 1000)), num_rows)
    order = epoch_order(num_rows, seed, epoch=-1)[:count]
    if count == 1:
        return order, order
    num_held_back = max(1, count // 8)
    return order[num_held_back:], order[:num_held_back]
