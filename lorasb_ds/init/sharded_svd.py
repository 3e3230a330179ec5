"""Exact truncated SVD of a matrix whose rows are sharded over ranks. Torch only.

The leading right subspace is found in one of two ways:

- *gram*: an eigensolver on the Gram matrix ``MᵀM`` of the shorter side;
- *krylov*: block Lanczos with M and Mᵀ (lanczos.py), which never forms the Gram matrix.

Both end with Rayleigh-Ritz on r vectors in fp64 (Halko, Martinsson, Tropp 2011, section 5.1) and
CholeskyQR of the long factor (Yamamoto et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from lorasb_ds.distributed.collectives import (
    Alone,
    Group,
    all_reduce,
    broadcast,
    rank_and_size,
    reduce,
)
from lorasb_ds.init.lanczos import leading_ritz_vectors, random_matrix, rank_tolerance
from lorasb_ds.init.products import full_precision
from lorasb_ds.planner.init_bytes import GRAM_SHARE, GRAM_SIDE_SHARED

SVDMethod = Literal["auto", "gram", "krylov"]

# Numbers from `scripts/bench.py svd` (docs/benchmarks.md).
GRAM_SIDE = 192  # gram if n <= max(GRAM_SIDE, GRAM_SHARE * r); GRAM_SIDE_SHARED on several ranks
DENSE_SHARE = 8  # dense eigensolver on the Gram matrix if n <= DENSE_SHARE * r, else Lanczos

CHUNK_ENTRIES = {"cpu": 2**18}  # entries of M that are converted at a time: they fit in a cache


class TruncatedSVD(NamedTuple):
    """``M ~ U diag(S) Vh``; U is sharded like M, S and Vh are bitwise equal on every rank."""

    U_local: torch.Tensor  # (rows here, r), fp32
    S: torch.Tensor  # (r,), fp32, descending
    Vh: torch.Tensor  # (r, n), fp32
    captured_energy: float  # sum of S squared over the squared Frobenius norm of M; 1 if M is 0

    def cut(self, r: int) -> TruncatedSVD:
        """Return the first r directions. Not collective."""
        if r == len(self.S):
            return self
        energies = self.S.square()
        share = (energies[:r].sum() / energies.sum()).item() if self.S[0] > 0 else 1.0
        kept = (self.U_local[:, :r], self.S[:r], self.Vh[:r])
        return TruncatedSVD(*kept, self.captured_energy * share)


def truncated_svd(
    local_rows: torch.Tensor,
    r: int,
    *,
    group: Group | Alone = None,
    seed: int = 0,
    method: SVDMethod = "auto",
) -> TruncatedSVD:
    """Decompose a row-sharded matrix to rank r, with at least 0.9999 of the best possible energy.

    Collective: every rank of ``group`` calls it, in the same order.

    Args:
        local_rows: (rows here, n), the shard of ``row_range(m, rank, world_size)``; may be empty.
            int8 for sign matrices (entries -1, 0, 1; m < 2²⁴), which are exact in bf16 and have an
            exact Gram matrix in fp32. Any other dtype is processed in fp64, which resolves singular
            values down to 1e-5 of the largest. Not modified. The whole matrix must have m >= n.
        r: 1 <= r <= n.
        seed: of Krylov's first block, and of the vectors that complete U if M has a rank below r.
        method: "auto" takes "gram" if n is small or r a large share of n, else "krylov".
    Returns:
        U orthonormal to 1e-5, also for rank-deficient and zero matrices: singular values that are
        zero come with an arbitrary orthonormal completion. Each row of Vh has its largest entry
        positive. The same input on the same number of ranks gives the same bits.
    Raises:
        ValueError: on every rank alike, if a shard is not 2-D or not finite, or r is out of range.
    Communication: all-reduces of (world_size + 1,) and (r, r); broadcasts of (n, r) and
        (r + n + 1, r). Gram: a reduce of (n, n). Krylov: a broadcast and an all-reduce of
        (n, KRYLOV_BLOCK) a step, mostly 3 + r/8 to 3 + r/4 steps, and a few broadcasts of one
        number. A real-valued matrix takes another all-reduce of (r, r); one of a rank below r takes
        two, an all-reduce of (r, n) and another broadcast.
    Memory in addition to the shard, for sign matrices, in bytes: Gram: 4 n², and four times that
        on the rank that solves it. Krylov: 2 for each entry of the shard (4 on processors without
        bf16) and 4 n for each vector of the basis, mostly 48 + 2 r to 48 + 4 r of them, at most n.
        Rayleigh-Ritz: 24 r for each row here and each column.
    """
    return truncated_svds([local_rows], r, group=group, seed=seed, method=method)[0]


@full_precision()
def truncated_svds(
    shards: Sequence[torch.Tensor],
    r: int,
    *,
    group: Group | Alone = None,
    seed: int = 0,
    method: SVDMethod = "auto",
) -> list[TruncatedSVD]:
    """Decompose several matrices as ``truncated_svd`` does, their Gram matrices spread over ranks.

    The i-th Gram matrix is reduced to rank ``i % world_size``, and all ranks solve theirs at the
    same time: give world_size matrices at once (a rank holds all of its Gram matrices together).
    Gives the same bits as one by one, on ranks with the same processors. Collective.
    """
    rank, world_size = rank_and_size(group)
    facts = [_whole_matrix(shard, r, group) for shard in shards]
    side = GRAM_SIDE if world_size == 1 else GRAM_SIDE_SHARED
    by_gram = [
        method == "gram" or (method == "auto" and shard.shape[1] <= max(side, GRAM_SHARE * r))
        for shard in shards
    ]
    grams: dict[int, torch.Tensor] = {}
    for i, shard in enumerate(shards):
        if by_gram[i]:
            gram = reduce(_gram(shard), i % world_size, group)
            if rank == i % world_size:
                grams[i] = gram
    solved = {i: _gram_subspace(gram, r, seed, facts[i]) for i, gram in grams.items()}
    results = []
    for i, shard in enumerate(shards):
        if not by_gram[i]:
            V = broadcast(_krylov_subspace(shard, r, group, seed, facts[i]), 0, group)
        else:
            empty = torch.empty(shard.shape[1], r, dtype=_work_dtype(shard), device=shard.device)
            V = broadcast(solved.pop(i, empty), i % world_size, group)
        results.append(_rayleigh_ritz(shard, V, facts[i], group, seed))
    return results


class _Whole(NamedTuple):
    """Facts about the whole matrix, and where this rank's rows are in it."""

    num_rows: int
    first_row: int  # of this rank
    squared_norm: float


def _whole_matrix(local_rows: torch.Tensor, r: int, group: Group | Alone) -> _Whole:
    if local_rows.ndim != 2:
        raise ValueError(f"local_rows must be 2-D, not {tuple(local_rows.shape)}")
    n = local_rows.shape[1]
    if not 1 <= r <= n:
        raise ValueError(f"r = {r} is not in 1..{n}, the number of columns")
    rank, world_size = rank_and_size(group)
    facts = torch.zeros(world_size + 1, dtype=torch.float64, device=local_rows.device)
    facts[rank] = len(local_rows)
    if _is_signs(local_rows):
        facts[-1] = torch.count_nonzero(local_rows)
    else:
        facts[-1] = torch.linalg.vector_norm(local_rows, dtype=torch.float64).square()
    *sizes, squared_norm = all_reduce(facts, group).tolist()
    whole = _Whole(int(sum(sizes)), int(sum(sizes[:rank])), squared_norm)
    if whole.num_rows < n:
        raise ValueError(f"the matrix has {whole.num_rows} rows, {n} columns; give its transpose")
    if not math.isfinite(squared_norm):
        raise ValueError("the matrix is not finite")
    return whole


def _rayleigh_ritz(
    local_rows: torch.Tensor, V: torch.Tensor, whole: _Whole, group: Group | Alone, seed: int
) -> TruncatedSVD:
    """Return the SVD of M restricted to the span of V's columns.

    Rotates V so that the columns of M V are orthogonal. In fp64: fp32's rounding errors would look
    like directions of a rank-deficient M.
    """
    n, r = V.shape
    V = V.double()
    V = _cholesky_qr(V, V.T @ V)
    Y = V.new_empty(len(local_rows), r)  # M V
    for rows in _chunks(local_rows):
        torch.mm(local_rows[rows].double(), V, out=Y[rows])
    squares, W = torch.linalg.eigh(all_reduce(Y.T @ Y, group))
    S, W = squares.clamp_min(0).sqrt().flip(0), W.flip(1)
    # Rank 0's result for all: LAPACK may give other bits on other processors.
    S, W, V = broadcast(torch.cat([S[None], W, V @ W]), 0, group).split([1, r, n])
    S, Vh = S[0], V.T

    deficient = rank_tolerance(_work_dtype(local_rows)) * S[0] >= S  # all of them, where M is 0
    U = Y @ W / torch.where(deficient, 1.0, S)  # orthonormal to 1e-8 for signs, 1e-2 for others
    if deficient.any():
        completion = random_matrix(whole.num_rows, r, torch.Generator().manual_seed(seed), U)
        here = slice(whole.first_row, whole.first_row + len(U))
        U[:, deficient] = completion[here, deficient] / whole.num_rows**0.5
        for _ in range(2):
            U = _cholesky_qr(U, all_reduce(U.T @ U, group))
        # Half another iteration, which is exact if M has a rank below r.
        projected = V.new_zeros(r, n)  # UᵀM
        for rows in _chunks(local_rows):
            projected.addmm_(U[rows].T, local_rows[rows].double())
        U_small, S, Vh = torch.linalg.svd(all_reduce(projected, group), full_matrices=False)
        S, W, V = broadcast(torch.cat([S[None], U_small, Vh.T]), 0, group).split([1, r, n])
        U, S, Vh = U @ W, S[0], V.T
    elif not _is_signs(local_rows):
        U = _cholesky_qr(U, all_reduce(U.T @ U, group))
    signs = Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()  # (r, 1)
    captured = S.square().sum().item() / whole.squared_norm if whole.squared_norm > 0 else 1.0
    Vh = (signs * Vh).float().contiguous()
    return TruncatedSVD((U * signs.T).float(), S.float(), Vh, captured)


def _gram_subspace(gram: torch.Tensor, r: int, seed: int, whole: _Whole) -> torch.Tensor:
    """Return the r leading eigenvectors of ``MᵀM``: (n, r), fp32 or fp64. Not collective."""
    if len(gram) > DENSE_SHARE * r:
        trace = whole.squared_norm
        return leading_ritz_vectors(
            lambda block: gram @ block, len(gram), r, gram, seed, trace, torch.Tensor.tolist
        )
    eigenvectors: torch.Tensor = torch.linalg.eigh(gram).eigenvectors  # ascending
    return eigenvectors[:, -r:].flip(1).contiguous()


def _gram(local_rows: torch.Tensor) -> torch.Tensor:
    """Return ``MᵀM`` of the rows here: (n, n), fp32 and exact for sign matrices, else fp64."""
    on_cpu = local_rows.device.type == "cpu"
    if _is_signs(local_rows) and on_cpu and torch.cpu._is_vnni_supported() and len(local_rows):
        # 5 to 8 times as fast as fp32; without VNNI it would be a slow loop.
        exact: torch.Tensor = torch._int_mm(local_rows.T.contiguous(), local_rows)
        return exact.float()
    n = local_rows.shape[1]
    gram = torch.zeros(n, n, dtype=_work_dtype(local_rows), device=local_rows.device)
    for rows in _chunks(local_rows):
        chunk = local_rows[rows].to(gram.dtype)
        gram.addmm_(chunk.T, chunk)
    return gram


def _krylov_subspace(
    local_rows: torch.Tensor, r: int, group: Group | Alone, seed: int, whole: _Whole
) -> torch.Tensor:
    """Return the r leading Ritz vectors of ``MᵀM`` in a block Krylov space: (n, r), fp32 or fp64.

    Sign matrices are multiplied in bf16, in which they are exact. Rounding the other factor to bf16
    costs the square of the rounding error: 1e-5 of the energy.
    """
    work = _work_dtype(local_rows)
    M = local_rows.to(_product_dtype(local_rows))

    def product(block: torch.Tensor) -> torch.Tensor:
        # Rank 0's block for all: its result is the one that is used.
        factor = broadcast(block.to(M.dtype).contiguous(), 0, group)
        return all_reduce((M.T @ (M @ factor)).to(work), group)

    def agree(verdicts: torch.Tensor) -> list[bool]:  # rank 0's
        return [x > 0 for x in broadcast(verdicts.float(), 0, group).tolist()]

    like = torch.empty(0, dtype=work, device=local_rows.device)
    trace = whole.squared_norm
    return leading_ritz_vectors(product, local_rows.shape[1], r, like, seed, trace, agree)


def _cholesky_qr(Y: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Orthonormalize Y's columns, with an error of the square of Y's condition number.

    A column of the result depends only on the columns of Y up to it.

    Args:
        Y: (rows here, r), fp64, with columns of about unit length.
        gram: ``YᵀY`` of all rows.
    """
    L = torch.linalg.cholesky(gram)
    orthonormal: torch.Tensor = torch.linalg.solve_triangular(L, Y.T, upper=False)
    return orthonormal.T


def _is_signs(local_rows: torch.Tensor) -> bool:
    return local_rows.dtype == torch.int8


def _work_dtype(local_rows: torch.Tensor) -> torch.dtype:
    return torch.float32 if _is_signs(local_rows) else torch.float64


def _product_dtype(local_rows: torch.Tensor) -> torch.dtype:
    if _is_signs(local_rows):
        on_cpu = local_rows.device.type == "cpu"
        if not on_cpu or torch.cpu._is_avx512_bf16_supported():
            return torch.bfloat16
    return _work_dtype(local_rows)


def _chunks(local_rows: torch.Tensor) -> list[slice]:
    entries = CHUNK_ENTRIES.get(local_rows.device.type, 2**24)
    size = max(1, entries // local_rows.shape[1])
    return [slice(start, start + size) for start in range(0, len(local_rows), size)]
