"""Truncated SVD of a matrix whose rows are sharded over ranks. Torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None

# Directions whose singular value is below this share of the largest are noise of the Gram matrix
# (its fp64 eigenvalues are singular values squared: half of the digits are lost).
RANK_TOLERANCE = 1e-7


class TruncatedSVD(NamedTuple):
    """``M ~ U diag(S) Vh``; U is sharded like M, S and Vh are the same bits on every rank."""

    U_local: torch.Tensor  # (rows here, r), fp32
    S: torch.Tensor  # (r,), fp32, descending
    Vh: torch.Tensor  # (r, n), fp32
    captured_energy: float  # sum of S squared over the squared Frobenius norm of M; 1 if M is 0


def row_range(num_rows: int, rank: int, world_size: int) -> range:
    """The rows of ``rank``: contiguous, in rank order, sizes that differ by at most one.

    Ranges of all ranks cover ``range(num_rows)`` without overlap; some are empty when there are
    more ranks than rows.
    """
    return range(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def truncated_svd(
    local_rows: torch.Tensor, r: int, *, group: Group = None, seed: int = 0
) -> TruncatedSVD:
    """Exact rank-r SVD of a row-sharded matrix, by the Gram matrix of its columns.

    The eigenvectors of ``MᵀM`` give the leading right subspace; ``M V`` is orthonormalised by
    CholeskyQR2 and a small SVD of ``QᵀM`` turns the bases and undoes the Gram matrix's loss of
    digits (Halko, Martinsson, Tropp 2011, section 5.1: Rayleigh-Ritz on an orthonormal range).

    Collective: every rank of ``group`` calls it, in the same order.

    Args:
        local_rows: (rows here, n), the shard of ``row_range(m, rank, world_size)``; may be empty.
            int8 for sign matrices: their Gram matrix is exact in fp32 while m < 2²⁴. Any other
            dtype is worked on in fp64. Not modified. The whole matrix must have m >= n.
        r: 1 <= r <= n.
        seed: of the vectors that complete U where M has fewer than r directions.
    Returns:
        U orthonormal to 1e-5, also for rank-deficient and zero matrices: singular values that are
        zero come with an arbitrary orthonormal completion that depends on ``seed`` and shape only.
        Each row of Vh has its largest entry positive.
    Raises:
        ValueError: on every rank alike, if a shard is not 2-D or r is out of range.
    Communication: all-reduces of (world_size,), (n, n), (r, n), (r, r) twice and (r,) at most
        twice; broadcasts of (n, r), (r, n), (r, r) and (r,).
    """
    if local_rows.ndim != 2:
        raise ValueError(f"local_rows must be 2-D, not {tuple(local_rows.shape)}")
    n = local_rows.shape[1]
    if not 1 <= r <= n:
        raise ValueError(f"r = {r} is not in 1..{n}, the number of columns")
    rank, world_size = _rank_and_size(group)
    num_rows, first_row = _global_rows(len(local_rows), rank, world_size, group, local_rows.device)
    if num_rows < n:
        raise ValueError(f"the matrix has {num_rows} rows and {n} columns; give its transpose")

    work = torch.float32 if local_rows.dtype == torch.int8 else torch.float64
    M = local_rows.to(work)
    gram = _all_reduce(M.T @ M, group)
    squared_norm = gram.diagonal().double().sum().item()

    if rank == 0:
        V = torch.linalg.eigh(gram.double()).eigenvectors[:, -r:].flip(1).contiguous()
    else:
        V = torch.empty(n, r, dtype=torch.float64, device=M.device)
    V = _broadcast(V, group)

    # In fp64: rounding in fp32 would look like directions where there are none.
    Y = M.double() @ V
    scale = _all_reduce(Y.square().sum(0), group).sqrt()
    deficient = scale <= RANK_TOLERANCE * max(scale.max().item(), torch.finfo(torch.float32).tiny)
    if deficient.any():
        Y[:, deficient] = _random_rows(num_rows, r, seed, Y)[
            first_row : first_row + len(Y), deficient
        ]
        scale = _all_reduce(Y.square().sum(0), group).sqrt()
    Q = _cholesky_qr2(Y / scale, group)

    projected = _all_reduce(Q.T @ M.double(), group)  # (r, n)
    U_small, S, Vh = torch.linalg.svd(projected, full_matrices=False)
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # (r, 1)
    # One rank's result for all: LAPACK need not give the same bits on different processors.
    S, Vh, U_small = (_broadcast(t.contiguous(), group) for t in (S, signs * Vh, U_small * signs.T))
    captured = S.square().sum().item() / squared_norm if squared_norm > 0 else 1.0
    return TruncatedSVD((Q @ U_small).float(), S.float(), Vh.float(), captured)


def _cholesky_qr2(Y: torch.Tensor, group: Group) -> torch.Tensor:
    """Orthonormal columns with the span of Y's, twice for accuracy (Yamamoto et al. 2015).

    A column depends on those before it only, so that completing vectors at the end leave the
    leading directions alone. Columns of Y have unit length.
    """
    for _ in range(2):
        L = torch.linalg.cholesky(_all_reduce(Y.T @ Y, group))
        Y = torch.linalg.solve_triangular(L, Y.T, upper=False).T
    return Y


def _random_rows(num_rows: int, r: int, seed: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, r, generator=generator, dtype=torch.float64).to(like.device)


def _rank_and_size(group: Group) -> tuple[int, int]:
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def _global_rows(
    num_local: int, rank: int, world_size: int, group: Group, device: torch.device
) -> tuple[int, int]:
    """Number of rows of the whole matrix, and the index of this rank's first one."""
    counts = torch.zeros(world_size, dtype=torch.int64, device=device)
    counts[rank] = num_local
    counts = _all_reduce(counts, group)
    return int(counts.sum()), int(counts[:rank].sum())


def _all_reduce(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def _broadcast(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.broadcast(tensor, group=group, group_src=0)
    return tensor
