"""Leading eigenvectors of a symmetric matrix, given as a product with it. Torch only, local.

Block Lanczos (Golub, Underwood 1977). The energy that a block Krylov space captures converges even
without a gap after the r-th singular value (Musco, Musco 2015, arXiv 1504.05477).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lorasb_ds.planner.init_bytes import KRYLOV_BLOCK

# Numbers from `scripts/bench.py svd` (docs/benchmarks.md).
# For sign matrices: stop when the residuals say that this share of the energy found is missing. In
# 798 trials at most half of it was really missing, bf16's 1e-5 included (docs/benchmarks.md).
ENERGY_TOLERANCE = 8e-5
# For real-valued matrices: stop when the residuals give every singular value to half of this share.
VALUE_TOLERANCE = 1e-2


def leading_ritz_vectors(
    product: Callable[[torch.Tensor], torch.Tensor],
    n: int,
    r: int,
    like: torch.Tensor,
    seed: int,
    trace: float,
    agree: Callable[[torch.Tensor], list[bool]],
    looks_at_steps: bool = False,
) -> torch.Tensor:
    """Return the r leading Ritz vectors of a symmetric, positive semidefinite matrix G: (n, r).

    Full reorthogonalisation: with a basis V, ``H = Vᵀ G V``, and the residual of a Ritz vector
    ``V z`` is ``B z_last``, where B is the part of a step outside V. An exhausted Krylov space may
    have missed copies of a multiple eigenvalue; it grows on in random directions until it is twice
    as large or holds all energy, and ends with all n directions at the latest. (An eigenvalue that
    occurs more than KRYLOV_BLOCK times, to all digits, before the space is exhausted, is missed.)

    The host waits for the device only where convergence is looked at, every few steps. If a step in
    between was close to exhaustion, all is done again with a look at each step, by exact QR.

    Args:
        product: ``X -> G X`` for X of (n, up to KRYLOV_BLOCK).
        like: a tensor of the dtype (fp32 for sign matrices, else fp64) and the device to work with.
        seed: of the first block and of random directions.
        trace: of G.
        agree: turns this rank's verdicts, a bool tensor, into those of all ranks.
        looks_at_steps: whether to look at each step.
    """
    generator = torch.Generator().manual_seed(seed)
    block: torch.Tensor = torch.linalg.qr(random_matrix(n, min(KRYLOV_BLOCK, n), generator, like)).Q
    basis = block.new_empty(min(n, 4 * (r + KRYLOV_BLOCK)), n)  # its rows are the vectors
    columns: list[torch.Tensor] = []  # of H, block by block, down to the diagonal
    k, next_check, exhausted_at = 0, min(2 * r + 3 * KRYLOV_BLOCK, n), 0
    fine = torch.ones((), dtype=torch.bool, device=like.device)
    while True:
        if k + block.shape[1] > len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[k : k + block.shape[1]] = block.T
        k += block.shape[1]
        V = basis[:k]
        W = product(block)
        columns.append(V @ W)
        W -= V.T @ columns[-1]
        Q, B = _qr(W, looks_at_steps)
        if k >= next_check:
            values, vectors = torch.linalg.eigh(upper_triangle(columns), UPLO="U")  # ascending
            vectors = vectors[:, -r:]
            residuals = torch.linalg.vector_norm(B @ vectors[k - block.shape[1] :], dim=0)
            noise = rank_tolerance(values.dtype) ** 2
            converged = is_converged(values, residuals, noise) & (k >= 2 * exhausted_at)
            converged = converged | _complete(values[-r:], trace)
            is_done, is_fine = agree(torch.stack([converged, fine]))
            if not is_fine:
                given = product, n, r, like, seed, trace, agree
                return leading_ritz_vectors(*given, looks_at_steps=True)
            if is_done or k == n:
                found: torch.Tensor = V.T @ vectors.flip(1)
                return found.contiguous()
            next_check = min(k + max(KRYLOV_BLOCK, k // 6), n)
        if looks_at_steps:
            block, exhausted = _orthogonal_to(V, Q[:, : n - k], generator)
            exhausted_at = k if exhausted else exhausted_at
        else:
            block, kept = _orthogonalized(V, Q[:, : n - k], exact=False)
            fine = fine & (kept > 0.5).all()


def upper_triangle(columns: list[torch.Tensor]) -> torch.Tensor:
    """Assemble H (…, k, k) from its columns, with zeros below the diagonal blocks."""
    *batch, k, _ = columns[-1].shape
    matrix = columns[-1].new_zeros(*batch, k, k)
    for part in columns:
        rows, width = part.shape[-2:]
        matrix[..., :rows, rows - width : rows] = part
    return matrix


def is_converged(values: torch.Tensor, residuals: torch.Tensor, noise: float) -> torch.Tensor:
    """Return whether the leading Ritz pairs are good enough, as a bool tensor (…).

    Sign matrices are judged by the missing energy: a Ritz value t with residual s is low by about
    ``s² / (t - u)``, where u is the Rayleigh quotient of the directions yet to be mixed in (Parlett
    1998, section 11.7), estimated by the next best Ritz values. Other matrices are judged by each
    value, which is exact to within s.

    Args:
        values: (…, k), ascending; fp32 for sign matrices, else fp64.
        residuals: (…, r), of the last r values.
        noise: share of the largest value below which a value is rounding.
    """
    r = residuals.shape[-1]
    wanted, next_best = values[..., -r:], values[..., -r - KRYLOV_BLOCK : -r]
    floor = wanted[..., -1:] * noise + torch.finfo(values.dtype).tiny
    if values.dtype == torch.float64:
        return (residuals <= VALUE_TOLERANCE * torch.maximum(wanted, floor)).all(-1)
    distance = wanted - next_best.mean(-1, keepdim=True) if next_best.shape[-1] else wanted
    missing = residuals.square() / torch.maximum(distance, floor)
    return torch.le(missing.sum(-1), ENERGY_TOLERANCE * wanted.sum(-1))


def _complete(values: torch.Tensor, trace: float) -> torch.Tensor:
    """Return whether these eigenvalues make up the whole trace, as a bool tensor."""
    rest = ENERGY_TOLERANCE if values.dtype == torch.float32 else 1e-13
    return torch.ge(values.sum(), (1 - rest) * trace)


def _orthogonal_to(
    V: torch.Tensor, Q: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, bool]:
    """Orthonormalize Q's columns against each other and against the rows of V.

    Returns:
        The columns, where those in the span of V are replaced by random ones; whether any were.
    """
    any_lost = False
    while True:
        Q, kept = _orthogonalized(V, Q, exact=True)
        if kept.numel() == 0 or kept.min() > 0.5:  # twice is enough (Parlett 1998, section 6.9)
            return Q, any_lost
        for lost in (kept < 1e-4).nonzero().flatten().tolist():
            any_lost = True
            Q[:, lost] = random_matrix(len(Q), 1, generator, Q)[:, 0] / len(Q) ** 0.5


def _orthogonalized(
    V: torch.Tensor, Q: torch.Tensor, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormalize Q's columns once; return them and which part of each was not in V's span."""
    Q, R = _qr(Q - V.T @ (V @ Q), exact)
    return Q, R.diagonal().abs()


def _qr(Y: torch.Tensor, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q and R of Y (n, k).

    Fp32 blocks by CholeskyQR in fp64, shifted so that it always succeeds (Fukaya et al. 2020, arXiv
    1809.11085): three products and a k x k factorization, in place of 2 k reflections one after the
    other. Q is orthonormal to rounding unless Y is nearly rank-deficient, when what the shift has
    taken is missing of Q's columns; orthonormalizing them again shows it.

    Args:
        exact: by Householder reflections, whatever Y is.
    """
    if exact or Y.dtype == torch.float64:
        Q, R = torch.linalg.qr(Y)
        return Q, R
    n, k = Y.shape
    gram = Y.T.double() @ Y.double()
    shift = 11 * (n * k + k * (k + 1)) * torch.finfo(torch.float64).eps
    gram.diagonal().add_(shift * gram.diagonal().sum() + torch.finfo(Y.dtype).tiny)
    L = torch.linalg.cholesky_ex(gram).L
    inverse = torch.linalg.solve_triangular(
        L, torch.eye(k, dtype=L.dtype, device=L.device), upper=False
    )
    return Y @ inverse.T.to(Y.dtype), L.T.to(Y.dtype)


def rank_tolerance(work: torch.dtype) -> float:
    """Return the share of the largest singular value below which others are noise."""
    return 1e-4 if work == torch.float32 else 1e-7


def random_matrix(
    rows: int, columns: int, generator: torch.Generator, like: torch.Tensor
) -> torch.Tensor:
    """Draw standard normal numbers in fp64 on the CPU, for ``like``'s dtype and device."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(like)
