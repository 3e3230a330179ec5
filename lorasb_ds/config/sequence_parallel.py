"""What ``--sequence-parallel`` does not work with, as far as options tell. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasb_ds.config.run_config import RunConfig

# Keys of a ds_config by which DeepSpeed makes groups of its own, and averages over them.
OWN_GROUPS = ("data_parallel_size", "sequence_parallel_size")


def sequence_problems(config: RunConfig) -> list[str]:
    """Return problems of options that need whole rows on each process."""
    needs = {
        "--packing": config.packing and "DeepSpeed drops the masks that keep packed rows apart",
        "--task-type sequence-classification": config.classifies
        and "a classifier reads one position of a row, which one process has",
    }
    return [
        f"--sequence-parallel {config.sequence_parallel} does not work with {option}: {why}. "
        "Leave one of them out."
        for option, why in needs.items()
        if why and config.sequence_parallel > 1
    ]


def group_problems(size: int, world_size: int) -> list[str]:
    """Return the problem of processes that cannot be divided into groups of a size."""
    if world_size % size == 0:
        return []
    return [
        f"--sequence-parallel {size} does not divide the number of processes, {world_size}, of "
        "which so many compute a row together. Change one of the numbers."
    ]


def own_group_problems(raw: Mapping[str, Any], path: str) -> list[str]:
    """Return the problem of a ds_config that makes groups of its own.

    Args:
        raw: the ds_config as it was read.
    """
    keys = [key for key in OWN_GROUPS if key in raw]
    return keys and [
        f"{path}: {' and '.join(keys)} would change what gradients are divided by. Remove "
        f"{'them' if keys[1:] else 'it'}, and give --sequence-parallel."
    ]
