"""Choose the rows of each optimizer step: the same on every rank, for any number of ranks."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

# The rows of so many steps are sorted by length together (as transformers' group_by_length does):
# enough for batches of nearly equal lengths, few enough to keep an epoch's order random.
STEPS_PER_GROUP = 50

Pack = list[int]  # rows that become one row of a batch: one, or with packing as many as fit


class StepSampler:
    """Choose the rows of an optimizer step from the step's number alone.

    Epochs follow each other, each in its own order. A step has ``packs_per_step`` packs; the last
    step of an epoch has the rest: no row is lost or seen twice.

    Args:
        lengths: (rows,), number of tokens of each row.
        packs_per_step: number of packs in an optimizer step, on all ranks together.
        seed: the run's seed.
        source_sizes: number of rows of each source, in the order of the rows; by default there is
            one source.
        weights: how often an epoch sees the rows of each source; by default once.
        group_by_length: put rows of similar lengths into a step.
        pack_length: put rows together into packs of at most so many tokens, by best-fit
            decreasing. By default each row is a pack of its own.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        packs_per_step: int,
        seed: int,
        *,
        source_sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        group_by_length: bool = False,
        pack_length: int | None = None,
    ) -> None:
        self._lengths = lengths
        self._packs_per_step = packs_per_step
        self._seed = seed
        self._sizes = list(source_sizes or [len(lengths)])
        self._weights = list(weights or [1.0] * len(self._sizes))
        self._group_by_length = group_by_length
        self._pack_length = pack_length
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self.steps_of_epoch = lru_cache(maxsize=None)(self._count_steps)

    def packs(self, step: int) -> list[Pack]:
        """Return the packs of a step, counted from 0."""
        epoch = 0
        while step >= (num_steps := self.steps_of_epoch(epoch)):
            step -= num_steps
            epoch += 1
        rows, ends = self._epoch(epoch)
        first = step * self._packs_per_step
        bounds = [0, *ends[first : first + self._packs_per_step].tolist()]
        if first:
            bounds[0] = int(ends[first - 1])
        return [rows[start:end].tolist() for start, end in pairwise(bounds)]

    def _count_steps(self, epoch: int) -> int:
        """Return the number of steps of an epoch; with packing, packs the epoch's rows."""
        if self._pack_length is None:
            num_packs = sum(map(_rows_per_epoch, self._sizes, self._weights))
        else:
            num_packs = len(self._epoch(epoch)[1])
        return math.ceil(num_packs / self._packs_per_step)

    def num_steps(self, epochs: float) -> int:
        """Return the number of optimizer steps of some epochs, at least 1."""
        whole = int(epochs)
        steps = sum(map(self.steps_of_epoch, range(whole)))
        if part := epochs - whole:
            steps += round(part * self.steps_of_epoch(whole))
        return max(1, steps)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's rows in their order, and where in it each pack ends."""
        rows = mixed_order(self._sizes, self._weights, self._seed, epoch)
        ends = np.arange(1, len(rows) + 1)
        if self._pack_length is not None:
            rows = np.sort(rows)  # the same rows give the same packs, whatever the epoch
            packs = best_fit_decreasing(self._lengths[rows].tolist(), self._pack_length)
            order = _permutation(len(packs), _epoch_seed(self._seed, epoch))
            rows = rows[np.concatenate([packs[i] for i in order])]
            ends = np.cumsum([len(packs[i]) for i in order])
        if self._group_by_length:
            tokens = np.diff(np.cumsum(self._lengths[rows], dtype=np.int64)[ends - 1], prepend=0)
            grouped = group_by_length(tokens, self._packs_per_step, self._seed, epoch)
            parts = [rows[start:end] for start, end in pairwise([0, *ends.tolist()])]
            rows = np.concatenate([parts[i] for i in grouped])
            ends = np.cumsum([len(parts[i]) for i in grouped])
        return rows, ends


def epoch_order(num_rows: int, seed: int, epoch: int) -> list[int]:
    """Return the order of one epoch's rows: a permutation, the same on every rank."""
    return _permutation(num_rows, _epoch_seed(seed, epoch)).tolist()


def _epoch_seed(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch


def _permutation(count: int, seed: int) -> np.ndarray:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


def _rows_per_epoch(size: int, weight: float) -> int:
    """Return how many rows of a source an epoch sees: at least 1, if the source has any."""
    return max(1, round(weight * size)) if size else 0


def mixed_order(
    sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int
) -> np.ndarray:
    """Return the rows of an epoch that sees source i ``weights[i]`` times, in random order.

    A source's rows are drawn without replacement until all have been seen, and then again, across
    epochs: with a weight of 0.5 the second epoch sees the rows that the first one left out.
    """
    parts, offset = [], 0
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        count = _rows_per_epoch(size, weight)
        if count == 0:  # all of its rows are held out
            continue
        first, last = epoch * count, (epoch + 1) * count
        for turn in range(first // size, -(-last // size)):
            rows = _permutation(size, _epoch_seed(seed + 7919 * source, turn))
            parts.append(offset + rows[max(0, first - turn * size) : last - turn * size])
        offset += size
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate(parts)
    return rows[_permutation(len(rows), _epoch_seed(seed, epoch) + 500_009)]


def group_by_length(lengths: np.ndarray, packs_per_step: int, seed: int, epoch: int) -> list[int]:
    """Return an order in which the packs of a step have similar lengths.

    The packs of every ``STEPS_PER_GROUP`` steps are sorted by length, then whole steps are
    shuffled. The packs after the last whole step stay at the end.

    Args:
        lengths: (packs,), number of tokens of each pack.
    """
    num_steps, left = divmod(len(lengths), packs_per_step)
    size = STEPS_PER_GROUP * packs_per_step
    order = np.arange(len(lengths))
    for first in range(0, num_steps * packs_per_step, size):
        part = slice(first, min(first + size, num_steps * packs_per_step))
        order[part] = first + np.argsort(-lengths[part], kind="stable")
    steps = order[: len(order) - left].reshape(num_steps, packs_per_step)
    shuffled = steps[_permutation(num_steps, _epoch_seed(seed, epoch) + 700_001)]
    return [*shuffled.flatten().tolist(), *order[len(order) - left :].tolist()]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into bins: the longest first, each into the fullest bin that has room for it.

    Args:
        lengths: length of each item, at most ``capacity``.
    Returns:
        The items in each bin.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free space -> bins
    rooms: list[int] = []  # its keys, sorted
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(rooms, lengths[item])
        if at == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        bins[number].append(item)
        left = room - lengths[item]
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(number)
    return bins


def init_sample(num_rows: int, wanted: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Draw the init's sample.

    It has ``wanted`` rows, or 0.1 % of all but at least 64; never more than there are. One in eight
    is held back, at least one; a sample of one row is used for both.

    Returns:
        The rows for the gradient, and the rows that are held back to measure losses on.
    """
    count = min(wanted or max(64, math.ceil(num_rows / 1000)), num_rows)
    order = epoch_order(num_rows, seed, epoch=-1)[:count]
    if count == 1:
        return order, order
    num_held_back = max(1, count // 8)
    return order[num_held_back:], order[:num_held_back]
