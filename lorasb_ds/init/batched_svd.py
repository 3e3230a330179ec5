"""Truncated SVDs of many matrices of one shape at once, on one device. Torch only, local.

For the experts of an MoE block, which are many and small: each rank decomposes its own. The ways
are those of ``sharded_svd``, in lockstep over the batch: an eigensolver on the Gram matrices where
the shorter side is small, otherwise block Lanczos until every matrix has converged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from lorasb_ds.init.lanczos import is_converged, random_matrix, upper_triangle
from lorasb_ds.init.products import full_precision
from lorasb_ds.init.sharded_svd import GRAM_SIDE
from lorasb_ds.planner.init_bytes import EXPERT_SVD_ENTRIES, GRAM_SHARE, KRYLOV_BLOCK


class BatchedSVD(NamedTuple):
    """``M_e ~ U_e diag(S_e) Vh_e`` of every matrix e; fp32."""

    U: torch.Tensor  # (batch, m, r), orthonormal columns
    S: torch.Tensor  # (batch, r), descending
    Vh: torch.Tensor  # (batch, r, n), orthonormal rows
    captured_energy: torch.Tensor  # (batch,), as in TruncatedSVD


@full_precision()
def batched_svd(
    matrices: torch.Tensor,
    r: int,
    seed: int = 0,
    update: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> BatchedSVD:
    """Decompose every matrix to rank r, with at least 0.9999 of the best possible energy.

    Args:
        matrices: (batch, m, n) with m >= n >= r. The batch may be empty.
            int8 for sign matrices, which are processed in fp32; others in fp64.
        update: applied to some matrices at a time before they are decomposed.
        seed: of the first block, and of directions that complete the bases of matrices whose rank
            is below r.
    Returns:
        Each row of Vh has its largest entry positive.
    """
    batch, m, n = matrices.shape
    at_once = max(1, EXPERT_SVD_ENTRIES // (m * n))
    split = matrices.split(at_once) if batch else ()
    parts = [_svd(update(part) if update else part, r, seed) for part in split]
    if not parts:
        empty = torch.zeros(0, device=matrices.device)
        return BatchedSVD(empty.view(0, m, r), empty.view(0, r), empty.view(0, r, n), empty)
    return BatchedSVD(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _svd(matrices: torch.Tensor, r: int, seed: int) -> BatchedSVD:
    M = matrices.to(torch.float32 if matrices.dtype == torch.int8 else torch.float64)
    n = M.shape[2]
    energy = torch.linalg.matrix_norm(M).double().square()
    if n <= max(GRAM_SIDE, GRAM_SHARE * r):
        V = torch.linalg.eigh(M.mT @ M).eigenvectors[..., -r:]
    else:
        V = _leading_vectors(M, r, seed)
    # Rayleigh-Ritz on r vectors. QR completes U where M V has a rank below r.
    V = torch.linalg.qr(V).Q
    Q, R = torch.linalg.qr(M @ V)
    Y, S, Vh = torch.linalg.svd(R)
    Vh = Vh @ V.mT
    largest = Vh.gather(2, Vh.abs().argmax(2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(Vh.dtype)
    U = (Q @ Y) * signs.mT
    found = S.double().square().sum(1)
    captured = torch.where(energy > 0, found / energy, torch.ones_like(energy)).clamp(max=1.0)
    return BatchedSVD(U.float(), S.float(), (Vh * signs).float(), captured.float())


def _leading_vectors(M: torch.Tensor, r: int, seed: int) -> torch.Tensor:
    """Return about the r leading right singular vectors of every matrix, (batch, n, r).

    Block Lanczos with full reorthogonalisation, as ``lanczos.leading_ritz_vectors``. Where a Krylov
    space is exhausted, random directions take its place.
    """
    batch, _, n = M.shape
    generator = torch.Generator().manual_seed(seed)

    def random() -> torch.Tensor:
        return random_matrix(n, min(KRYLOV_BLOCK, n), generator, M).expand(batch, -1, -1)

    basis = torch.linalg.qr(random()).Q
    columns: list[torch.Tensor] = []
    block, next_check = basis, min(2 * r + 3 * KRYLOV_BLOCK, n)
    noise = _noise(M.dtype)
    scale = torch.linalg.matrix_norm(M)[:, None, None].square()
    while True:
        W = M.mT @ (M @ block)
        columns.append(basis.mT @ W)
        W = W - basis @ columns[-1]
        k, width = basis.shape[2], block.shape[2]
        if k >= next_check:
            B = torch.linalg.qr(W).R
            values, vectors = torch.linalg.eigh(upper_triangle(columns), UPLO="U")
            vectors = vectors[..., -r:]
            residuals = torch.linalg.vector_norm(B @ vectors[:, k - width :], dim=1)
            if k == n or bool(is_converged(values, residuals, noise).all()):
                return (basis @ vectors).flip(2)
            next_check = min(k + max(KRYLOV_BLOCK, k // 6), n)
        # A column that is nothing but rounding is replaced before it is made orthogonal.
        spent = torch.linalg.vector_norm(W, dim=1, keepdim=True) <= noise * scale
        W = torch.where(spent, random(), W)[..., : n - k]
        for _ in range(2):
            W = W - basis @ (basis.mT @ W)
            W = torch.linalg.qr(W).Q
        block = W
        basis = torch.cat([basis, block], 2)


def _noise(dtype: torch.dtype) -> float:
    """Return the share of the largest eigenvalue below which an eigenvalue is rounding."""
    return 1e-6 if dtype == torch.float32 else 1e-13
