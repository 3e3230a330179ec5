"""Matrices whose rows are sharded over ranks, and collectives that one process does without."""

from __future__ import annotations

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


def row_range(num_rows: int, rank: int, world_size: int) -> range:
    """The rows of ``rank``: contiguous, in rank order, sizes that differ by at most one.

    Ranges of all ranks cover ``range(num_rows)`` without overlap; some are empty when there are
    more ranks than rows.
    """
    return range(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def gather_rows(local: torch.Tensor, num_rows: int, group: Group) -> torch.Tensor | None:
    """The whole matrix on rank 0 of the group, None elsewhere. Collective.

    Args:
        local: (rows here, r), the shard of ``row_range(num_rows, rank, world_size)``.
    """
    rank, world_size = rank_and_size(group)
    if world_size == 1:
        return local
    sizes = [len(row_range(num_rows, k, world_size)) for k in range(world_size)]
    padded = local.new_zeros(max(sizes), local.shape[1])  # gather wants equal sizes
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in sizes] if rank == 0 else None
    dist.gather(padded, parts, group=group, group_dst=0)
    if parts is None:
        return None
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def rank_and_size(group: Group) -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_reduce(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    if rank_and_size(group)[1] > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def reduce(tensor: torch.Tensor, owner: int, group: Group) -> torch.Tensor:
    if rank_and_size(group)[1] > 1:
        dist.reduce(tensor, group=group, group_dst=owner)
    return tensor


def broadcast(tensor: torch.Tensor, owner: int, group: Group) -> torch.Tensor:
    if rank_and_size(group)[1] > 1:
        dist.broadcast(tensor, group=group, group_src=owner)
    return tensor
