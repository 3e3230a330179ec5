"""Row-sharded matrices, and collectives that do nothing in a single process."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


class Alone:
    """A group of this process alone, in which collectives do nothing."""


ALONE = Alone()


def row_range(num_rows: int, rank: int, world_size: int) -> range:
    """Return the rows of ``rank``: contiguous, in rank order, of sizes that differ by at most one.

    The ranges of all ranks cover ``range(num_rows)`` without overlap; some are empty if there are
    more ranks than rows.
    """
    return range(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def gather_rows(local: torch.Tensor, num_rows: int, group: Group) -> torch.Tensor | None:
    """Gather a matrix on the group's rank 0; return None elsewhere. Collective.

    Args:
        local: (rows here, r), the shard of ``row_range(num_rows, rank, world_size)``.
    """
    rank, world_size = rank_and_size(group)
    if world_size == 1:
        return local
    sizes = [len(row_range(num_rows, k, world_size)) for k in range(world_size)]
    padded = local.new_zeros(max(sizes), local.shape[1])  # dist.gather needs equal sizes
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sizes] if rank == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    if parts is None:
        return None
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def rank_and_size(group: Group | Alone) -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if isinstance(group, Alone) or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _has_others(group: Group | Alone) -> TypeGuard[Group]:
    return rank_and_size(group)[1] > 1


def all_reduce(tensor: torch.Tensor, group: Group | Alone) -> torch.Tensor:
    """Sum a tensor over ranks in place, and return it. Collective."""
    if _has_others(group):
        dist.all_reduce(tensor, group=group)
    return tensor


def reduce(tensor: torch.Tensor, owner: int, group: Group | Alone) -> torch.Tensor:
    """Sum a tensor over ranks in place on the group's rank ``owner``, and return it. Collective.

    On other ranks its values are undefined afterwards.
    """
    if _has_others(group):
        dist.reduce(tensor, group=group, group_dst=owner)
    return tensor


def broadcast(tensor: torch.Tensor, owner: int, group: Group | Alone) -> torch.Tensor:
    """Copy a tensor from the group's rank ``owner`` in place, and return it. Collective."""
    if _has_others(group):
        dist.broadcast(tensor, group=group, group_src=owner)
    return tensor
