"""Make padded or packed micro-batches of examples, and assign them to ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lorasb_ds.data.sampler import Pack
from lorasb_ds.data.tokenization import IGNORE_INDEX, Example


@dataclass(frozen=True)
class Batch:
    """A micro-batch. ``labels`` are aligned with ``input_ids``; the loss shifts them.

    A piece of one has one column of labels more: those of the token behind it.

    A packed one has several examples in a row, and no attention mask: position ids start again
    where an example ends, by which transformers keeps examples apart.

    Rows that are classified have ``targets``, and no labels of tokens: wherever label tokens are
    counted, such rows count as one each.
    """

    input_ids: torch.Tensor  # (rows, length), int64
    attention_mask: torch.Tensor | None  # (rows, length), int64
    labels: torch.Tensor  # (rows, length), int64, IGNORE_INDEX on prompts and padding
    num_label_tokens: int
    position_ids: torch.Tensor | None = None  # (rows, length), int64, of packed rows and pieces
    num_tokens: int = 0  # without padding; 0 for a weightless batch
    targets: torch.Tensor | None = None  # (rows,), int64: classes; fp32: numbers
    token_type_ids: torch.Tensor | None = None  # (rows, length), int64

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model. Some models take no position ids: only packed rows and
        pieces have them. Token types are there if the tokenizer gives them.
        """
        optional = {"position_ids": self.position_ids, "token_type_ids": self.token_type_ids}
        given = {name: ids for name, ids in optional.items() if ids is not None}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **given}

    @property
    def next_labels(self) -> torch.Tensor:
        """Labels of the next position, (rows, length)."""
        length = self.input_ids.shape[1]
        return F.pad(self.labels, (0, 1), value=IGNORE_INDEX)[:, 1 : length + 1]

    @cached_property
    def label_positions(self) -> torch.Tensor:
        """Positions of ``next_labels`` that hold a label, in the flattened batch: (labels,), int64.

        Its first use waits for the batch's device. ``to`` finds them before, on the host.
        """
        return (self.next_labels != IGNORE_INDEX).flatten().nonzero().flatten()

    def piece(self, index: int, count: int) -> Batch:
        """Return one of ``count`` pieces of equal length that all rows are cut into.

        Rows are padded at their ends until they can be, without a position of its own: positions
        may have a table. Padding is not masked, since nothing comes after it; without any mask
        transformers would take it for packed rows. Not for these, or rows that are classified.
        """
        assert self.attention_mask is not None, "packed rows would see each other"
        assert self.targets is None, "a classifier reads the last token, which is in one piece"
        whole = self.input_ids.shape[1]
        length = math.ceil(whole / count)
        first, last = index * length, (index + 1) * length

        def cut(values: torch.Tensor, last: int, padding: int) -> torch.Tensor:
            missing = max(0, last - values.shape[1])
            return F.pad(values, (0, missing), value=padding)[:, first:last].contiguous()

        input_ids, labels = cut(self.input_ids, last, 0), cut(self.labels, last + 1, IGNORE_INDEX)
        return Batch(
            input_ids,
            torch.ones_like(input_ids),
            labels,
            _num_labels(labels),
            torch.arange(first, last).clamp(max=whole - 1).repeat(len(labels), 1),
            num_tokens=int(cut(self.attention_mask, last, 0).sum()) if self.num_tokens else 0,
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, without waiting for what the device still has to do."""

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if device.type == "cpu" or value.device.type != "cpu":
                return value.to(device)
            # Of pageable memory the copy may wait for the device's stream, asynchronous or not.
            return value.pin_memory().to(device, non_blocking=True)

        batch = Batch(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})
        vars(batch)["label_positions"] = moved(self.label_positions)
        return batch


@dataclass(frozen=True)
class Sample:
    """This rank's micro-batches of some rows, and the counts over all ranks."""

    batches: Sequence[Batch]
    num_rows: int
    num_label_tokens: int


def collate(examples: Sequence[Example], pad_token_id: int, weightless: bool = False) -> Batch:
    """Pad on the right to the longest example.

    Args:
        weightless: leave out all labels, so that the batch takes part in every collective of a
            step and adds nothing to it. For ranks that have no rows.
    """
    length = max(len(e.input_ids) for e in examples)
    input_ids = torch.full((len(examples), length), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, example in enumerate(examples):
        n = len(example.input_ids)
        input_ids[i, :n] = torch.tensor(example.input_ids)
        attention_mask[i, :n] = 1
        if not weightless and example.target is None:
            labels[i, :n] = torch.tensor(example.labels)
    batch = Batch(
        input_ids,
        attention_mask,
        labels,
        _num_labels(labels),
        num_tokens=0 if weightless else int(attention_mask.sum()),
    )
    return batch if examples[0].target is None else _classified(batch, examples, weightless)


def _classified(batch: Batch, examples: Sequence[Example], weightless: bool) -> Batch:
    """Add what rows that are classified have. A weightless batch has targets that do not count."""
    token_type_ids = None
    if any(example.token_type_ids for example in examples):
        token_type_ids = torch.zeros_like(batch.input_ids)
        for i, example in enumerate(examples):
            token_type_ids[i, : len(example.input_ids)] = torch.tensor(example.token_type_ids)
    return replace(
        batch,
        num_label_tokens=0 if weightless else len(examples),
        targets=torch.tensor([example.target for example in examples]),
        token_type_ids=token_type_ids,
    )


def collate_packed(
    packs: Sequence[Sequence[Example]],
    pad_token_id: int,
    *,
    one_row: bool,
    weightless: bool = False,
) -> Batch:
    """Put the examples of each pack behind each other, in one row.

    Args:
        one_row: put all packs into one row without padding, for variable-length kernels.
        weightless: as in ``collate``.
    """
    if one_row:
        packs = [[example for pack in packs for example in pack]]
    length = max(sum(len(e.input_ids) for e in pack) for pack in packs)
    input_ids = torch.full((len(packs), length), pad_token_id)
    # Padding counts as an example of its own.
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
                labels[i, start] = IGNORE_INDEX  # else it is predicted from the example before it
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


def assign_to_ranks(
    lengths: Sequence[int],
    micro_batch_size: int,
    world_size: int,
    num_micro_batches: int | None = None,
) -> list[list[list[int]]]:
    """Distribute packs over micro-batches and ranks: longest first, as evenly as possible.

    Packs of similar lengths come together, which saves padding, and all ranks have about the same
    work at a time. A step's result does not depend on it: its loss is a mean over tokens.

    Args:
        lengths: number of tokens of each pack.
        num_micro_batches: for each rank; by default as few as hold all packs.
    Returns:
        ``[micro-batch][rank]`` -> positions in ``lengths``; some may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if num_micro_batches is None:
        num_micro_batches = math.ceil(len(order) / (micro_batch_size * world_size))
    num_parts = num_micro_batches * world_size
    assert len(order) <= num_parts * micro_batch_size, "the accumulation is made for a step's rows"
    starts = [i * len(order) // num_parts for i in range(num_parts + 1)]
    parts = [order[a:b] for a, b in pairwise(starts)]
    return [parts[i : i + world_size] for i in range(0, num_parts, world_size)]


def rank_batches(
    examples: Sequence[Example],
    lengths: Sequence[int] | np.ndarray,
    packs: Sequence[Pack],
    *,
    micro_batch_size: int,
    pad_token_id: int,
    rank: int,
    world_size: int,
    num_micro_batches: int | None = None,
    one_row: bool | None = None,
) -> list[Batch]:
    """Return a rank's micro-batches of some packs; every rank gets the same number.

    Args:
        lengths: number of tokens of each example.
        packs: positions in ``examples``.
        num_micro_batches: as in ``assign_to_ranks``.
        one_row: as in ``collate_packed``. None: each pack is one example, and padded.
    """
    pack_lengths = [sum(int(lengths[row]) for row in pack) for pack in packs]
    assigned = assign_to_ranks(pack_lengths, micro_batch_size, world_size, num_micro_batches)
    shortest = min(range(len(packs)), key=lambda i: pack_lengths[i])  # for a rank without rows
    batches = []
    for of_ranks in assigned:
        mine = of_ranks[rank]
        chosen = [[examples[row] for row in packs[i]] for i in mine or [shortest]]
        if one_row is None:
            batch = collate([e for pack in chosen for e in pack], pad_token_id, weightless=not mine)
        else:
            batch = collate_packed(chosen, pad_token_id, one_row=one_row, weightless=not mine)
        batches.append(batch)
    return batches
