"""In which order rows are seen; the same on every rank."""

from __future__ import annotations

import math

import torch


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
