"""Computations on low-rank updates ``ΔW = B A`` that never form the (out, in) matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class LoraPair(NamedTuple):
    """``ΔW = lora_B @ lora_A``, with any scaling folded in."""

    A: torch.Tensor  # (r, in)
    B: torch.Tensor  # (out, r)


class ProductSVD(NamedTuple):
    """``B A = U diag(S) Vh``; k = min(r, out, in) directions, fp64."""

    U: torch.Tensor  # (out, k)
    S: torch.Tensor  # (k,), descending
    Vh: torch.Tensor  # (k, in)

    def pair(self, r: int) -> LoraPair:
        """Return the best rank-r update (Eckart and Young 1936), fp32: A orthonormal, B times S."""
        return padded(LoraPair(self.Vh[:r].float(), (self.U[:, :r] * self.S[:r]).float()), r)


def padded(pair: LoraPair, r: int) -> LoraPair:
    """Return the same update with factors padded by zeros to rank r, if theirs is lower."""
    missing = max(0, r - len(pair.A))
    return LoraPair(F.pad(pair.A, (0, 0, 0, missing)), F.pad(pair.B, (0, missing)))


def product_svd(pair: LoraPair) -> ProductSVD:
    """Return the exact SVD of an update: thin QR of B and of Aᵀ, and the SVD of the r x r core."""
    Q_B, core_B = torch.linalg.qr(pair.B.double())
    Q_A, core_A = torch.linalg.qr(pair.A.double().T)
    U, S, Vh = torch.linalg.svd(core_B @ core_A.T, full_matrices=False)
    return ProductSVD(Q_B @ U, S, Vh @ Q_A.T)


def energy_kept(S: torch.Tensor) -> torch.Tensor:
    """Return the share of ``‖ΔW‖²`` in the first k directions, for k = 1, 2, …; 1 if ΔW is 0."""
    energy = S.double().square().cumsum(0)
    return energy / energy[-1] if energy[-1] > 0 else torch.ones_like(energy)


def effective_rank(S: torch.Tensor) -> float:
    """Return exp of the entropy of the singular values' shares, or 0 if all of them are 0.

    Source: Roy and Vetterli 2007.
    """
    if not S.sum() > 0:
        return 0.0
    shares = S.double() / S.double().sum()
    return torch.special.entr(shares).sum().exp().item()


def orthonormality_error(Q: torch.Tensor) -> float:
    """Return the largest entry of ``|QᵀQ - I|``, Q being transposed if it is wider than long."""
    Q = Q.double() if len(Q) >= Q.shape[1] else Q.double().T
    return (Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max().item()


def weighted_sum(pairs: Sequence[LoraPair], weights: Sequence[float]) -> LoraPair:
    """Return ``Σ wᵢ ΔWᵢ``, exactly.

    Its rank is that of one update if all have the same A, and otherwise the sum of their ranks.
    """
    A = pairs[0].A
    if all(torch.equal(pair.A, A) for pair in pairs[1:]):
        # One A: the B's add up. For LoRA-SB's B R this is the weighted sum of the R's.
        B = sum(w * pair.B.double() for w, pair in zip(weights, pairs, strict=True))
        return LoraPair(A, torch.as_tensor(B).float())
    scaled = [w * pair.B for w, pair in zip(weights, pairs, strict=True)]
    return LoraPair(torch.cat([pair.A for pair in pairs]), torch.cat(scaled, dim=1))
