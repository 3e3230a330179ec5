"""SVDs of row-sharded matrices, each of which goes whole to one rank and is decomposed there.

Ranks decompose theirs at the same time, and wait for each other only before and after. A rank holds
a whole matrix; ``sharded_svd`` decomposes those that are too large for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lorasb_ds.distributed.collectives import ALONE, Group, broadcast, rank_and_size, row_range
from lorasb_ds.init.sharded_svd import TruncatedSVD, truncated_svd


def truncated_svds_by_rank(
    shards: Sequence[torch.Tensor],
    heights: Sequence[int],
    r: int,
    *,
    group: Group = None,
    seed: int = 0,
) -> list[TruncatedSVD]:
    """Decompose matrices as ``truncated_svd`` does, the i-th on the group's rank i. Collective.

    Args:
        shards: (rows here, n) of each matrix, of one dtype; at most as many as there are ranks.
        heights: the number of rows of each whole matrix.
    Returns:
        What ``truncated_svd`` returns: U is sharded as the matrix was.
    Raises:
        ValueError: on every rank alike, if a matrix is not finite.
    Communication: an all-to-all of the matrices and one of all U; a broadcast of (r, n) and of
        r + 1 numbers for each matrix.
    """
    rank, world_size = rank_and_size(group)
    none = [0] * (world_size - len(shards))
    owns_one = rank < len(shards)
    height, n = (heights[rank], shards[rank].shape[1]) if owns_one else (0, 0)
    rows = [len(row_range(height, k, world_size)) for k in range(world_size)]
    whole = _all_to_all(
        torch.cat([M.flatten() for M in shards]),
        [M.numel() for M in shards] + none,
        [of * n for of in rows],
        group,
    )
    mine = shards[0].new_empty(0, dtype=torch.float32)
    U = mine
    if owns_one:
        if not whole.is_floating_point() or torch.isfinite(whole).all():
            svd = truncated_svd(whole.view(height, n), r, group=ALONE, seed=seed)
            U = svd.U_local
            mine = torch.cat([svd.S.new_full((1,), svd.captured_energy), svd.S, svd.Vh.flatten()])
        else:  # to be raised on every rank
            U, mine = (mine.new_full((length,), math.nan) for length in (height * r, 1 + r + r * n))
    del whole
    sizes = [len(M) * r for M in shards]
    of_all = _all_to_all(U.flatten(), [of * r for of in rows], sizes + none, group)
    svds, energies = [], []
    for i, (M, U_local) in enumerate(zip(shards, of_all.split(sizes), strict=True)):
        n = M.shape[1]
        facts = mine if i == rank else mine.new_empty(1 + r + r * n)
        captured, S, Vh = broadcast(facts, i, group).split([1, r, r * n])
        svds.append(TruncatedSVD(U_local.view(-1, r), S, Vh.view(r, n), captured_energy=0.0))
        energies.append(captured)
    found = torch.cat(energies).tolist()  # one wait for the device
    if not all(map(math.isfinite, found)):
        raise ValueError("the matrix is not finite")
    return [svd._replace(captured_energy=e) for svd, e in zip(svds, found, strict=True)]


def _all_to_all(
    numbers: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: Group
) -> torch.Tensor:
    """Send each rank so many of the numbers, and return those that come from all. Collective."""
    found = numbers.new_empty(sum(received))
    dist.all_to_all_single(found, numbers, list(received), list(sent), group=group)
    return found
