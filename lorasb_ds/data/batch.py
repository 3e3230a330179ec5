"""Examples -> padded or packed micro-batches, dealt out to ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lorasb_ds.data.sampler import Unit
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example


@dataclass(frozen=True)
class Batch:
    """A micro-batch. ``labels`` are aligned with ``input_ids``; the loss shifts them.

    A packed one has several examples in a row, and no attention mask: transformers finds from
    position ids that begin anew where an example ends, and lets none see another.
    """

    input_ids: torch.Tensor  # (rows, length), int64
    attention_mask: torch.Tensor | None  # (rows, length), int64
    labels: torch.Tensor  # (rows, length), int64, IGNORE_INDEX on prompts and padding
    num_label_tokens: int
    position_ids: torch.Tensor | None = None  # (rows, length), int64, of packed rows
    num_tokens: int = 0  # without padding; 0 for a weightless batch

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with. Position ids only where rows are packed: some models take
        none.
        """
        packed = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **packed}

    @property
    def next_labels(self) -> torch.Tensor:
        """(rows, length): at every position the label of the next one."""
        return F.pad(self.labels[:, 1:], (0, 1), value=IGNORE_INDEX)

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


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
    return Batch(
        input_ids,
        attention_mask,
        labels,
        _num_labels(labels),
        num_tokens=0 if weightless else int(attention_mask.sum()),
    )


def collate_packed(
    packs: Sequence[Sequence[Example]],
    pad_token_id: int,
    *,
    one_row: bool,
    weightless: bool = False,
) -> Batch:
    """Examples behind each other, a row for every pack.

    Args:
        one_row: all packs in one row without padding, as variable-length kernels want it.
        weightless: as in ``collate``.
    """
    if one_row:
        packs = [[example for pack in packs for example in pack]]
    length = max(sum(len(e.input_ids) for e in pack) for pack in packs)
    input_ids = torch.full((len(packs), length), pad_token_id)
    # Padding is an example of its own.
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    num_tokens = 0
    for i, pack in enumerate(packs):
        start = 0
        for example in pack:
            end = start + len(example.input_ids)
            input_ids[i, start:end] = torch.tensor(example.input_ids)
            position_ids[i, start:end] = torch.arange(end - start)
            if not weightless:
                labels[i, start:end] = torch.tensor(example.labels)
                labels[i, start] = IGNORE_INDEX  # not to be predicted from the example before it
            start = end
        position_ids[i, start:] = torch.arange(length - start)
        num_tokens += start
    return Batch(
        input_ids,
        None,
        labels,
        _num_labels(labels),
        position_ids,
        num_tokens=0 if weightless else num_tokens,
    )


def _num_labels(labels: torch.Tensor) -> int:
    # The first token of a row has nothing before it to be predicted from.
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def deal(
    lengths: Sequence[int], micro_batch_size: int, world_size: int, rounds: int | None = None
) -> list[list[list[int]]]:
    """Share out units to ranks and micro-batches: longest first, as evenly as it goes.

    Units of similar lengths come together, which saves padding, and the ranks have about the same
    work in every round. What a step computes does not depend on it: its loss is a mean over tokens.

    Args:
        lengths: of the units, in tokens.
        rounds: micro-batches of every rank. [default: as few as hold all units]
    Returns:
        ``[round][rank]`` -> positions in ``lengths``; some may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if rounds is None:
        rounds = math.ceil(len(order) / (micro_batch_size * world_size))
    places = rounds * world_size
    assert len(order) <= places * micro_batch_size, "the accumulation is made for the step's rows"
    starts = [place * len(order) // places for place in range(places + 1)]
    parts = [order[a:b] for a, b in pairwise(starts)]
    return [parts[i : i + world_size] for i in range(0, places, world_size)]


def share_out(
    examples: Sequence[Example],
    lengths: Sequence[int] | np.ndarray,
    units: Sequence[Unit],
    *,
    micro_batch_size: int,
    pad_token_id: int,
    rank: int,
    world_size: int,
    rounds: int | None = None,
    one_row: bool | None = None,
) -> list[Batch]:
    """A rank's micro-batches of some units; as many on every rank.

    Args:
        lengths: of the examples, in tokens.
        rounds: as in ``deal``.
        one_row: pack each unit, as in ``collate_packed``. None: units are single rows, and padded.
    """
    unit_lengths = [sum(int(lengths[row]) for row in unit) for unit in units]
    dealt = deal(unit_lengths, micro_batch_size, world_size, rounds)
    shortest = min(range(len(units)), key=lambda i: unit_lengths[i])  # for a rank without rows
    batches = []
    for of_ranks in dealt:
        mine = of_ranks[rank]
        packs = [[examples[row] for row in units[i]] for i in mine or [shortest]]
        if one_row is None:
            batch = collate([e for pack in packs for e in pack], pad_token_id, weightless=not mine)
        else:
            batch = collate_packed(packs, pad_token_id, one_row=one_row, weightless=not mine)
        batches.append(batch)
    return batches
