"""Examples -> padded micro-batches, dealt out to ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorasb_ds.data import IGNORE_INDEX, Example


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
        n = len(example.input_ids)
        input_ids[i, :n] = torch.tensor(example.input_ids)
        attention_mask[i, :n] = 1
        if not weightless:
            labels[i, :n] = torch.tensor(example.labels)
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
