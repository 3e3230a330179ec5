"""The first step that an optimizer would take with a gradient: ``--init-update``. Torch only.

An update is a matrix of the gradient's shape, without the learning rate, which is eta in R. The
gradient is given as rows of G or of its transpose: every rule gives the same update for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from lorasb_ds.distributed.collectives import Group, all_reduce
from lorasb_ds.init.sharded_svd import TruncatedSVD

ADAM_EPSILON = 1e-8
# Adafactor's epsilon for squared gradients, its smallest weight RMS, and the RMS to which it clips
# updates (arXiv 1804.04235, algorithm 4 and section 9).
ADAFACTOR_EPSILON, ADAFACTOR_SIZE, ADAFACTOR_CLIP = 1e-30, 1e-3, 1.0
# Singular values below this share of the largest are noise in an fp32 gradient.
NOISE = 1e-5


class UpdateRule(NamedTuple):
    """How to turn a gradient into the matrix that is decomposed."""

    matrix: Callable[[torch.Tensor, Group], torch.Tensor]  # rows of G -> rows of the matrix
    orthogonal: bool = False  # whether to replace the matrix's singular values by 1


def adafactor(G: torch.Tensor, group: Group) -> torch.Tensor:
    """Return Adafactor's update ``G / sqrt(r cᵀ / mean(r))``, clipped to RMS 1. Collective.

    r and c are the mean squares of rows and columns. In the first step the decay of the second
    moment is 0 (arXiv 1804.04235, algorithm 4: ``1 - t^-0.8``), so that r and c are those of this
    gradient alone. Allocates one matrix of G's size.

    Communication: all-reduces of (n + 2,) and of one number.

    Args:
        G: (rows here, n), fp32.
    """
    n = G.shape[1]
    rows = torch.linalg.vector_norm(G, dim=1, dtype=torch.float64).square() / n
    facts = G.new_zeros(n + 2, dtype=torch.float64)  # columns' squares; number of rows; sum of r
    facts[:n] = torch.linalg.vector_norm(G, dim=0, dtype=torch.float64).square()
    facts[n], facts[n + 1] = len(G), rows.sum()
    all_reduce(facts, group)
    num_rows = facts[n]
    columns = facts[:n] / num_rows + ADAFACTOR_EPSILON
    mean = facts[n + 1] / num_rows + ADAFACTOR_EPSILON
    rows = rows + ADAFACTOR_EPSILON
    M = G * (mean / rows).sqrt().to(G.dtype)[:, None]
    M *= columns.rsqrt().to(G.dtype)
    squares = torch.linalg.vector_norm(M, dtype=torch.float64).square()
    rms = (all_reduce(squares, group) / (num_rows * n)).sqrt()
    return M.div_((rms / ADAFACTOR_CLIP).clamp(min=1.0).to(G.dtype))


UPDATE_RULES = {
    # AdamW's first step in the limit of a small epsilon, as in LoRA-SB's paper. Lion's, too.
    "sign": UpdateRule(lambda G, group: G.sign().to(torch.int8)),
    # AdamW's first step with its epsilon: entries near epsilon move less.
    "adam": UpdateRule(lambda G, group: G / (G.abs() + ADAM_EPSILON)),
    # The gradient: the first step of SGD.
    "raw": UpdateRule(lambda G, group: G),
    "adafactor": UpdateRule(adafactor),
    # U Vh of G = U S Vh, to which Muon's Newton-Schulz steps converge. All its singular values are
    # 1; the directions kept are G's largest, along which the loss falls most.
    "muon": UpdateRule(lambda G, group: G, orthogonal=True),
}


def step_scale(
    update: str, out_features: int, in_features: int, weight_rms: Callable[[], float]
) -> float:
    """Return the number by which the optimizer multiplies a layer's update.

    Muon: ``sqrt(max(1, out / in))`` (torch's "original"). Adafactor: the weight's root mean square,
    at least 1e-3 (arXiv 1804.04235, section 8). Others: 1.

    Args:
        update: a key of ``UPDATE_RULES``.
        weight_rms: returns that of the base's weight; called only if needed. May be collective.
    """
    if update == "muon":
        return math.sqrt(max(1.0, out_features / in_features))
    if update == "adafactor":
        return max(ADAFACTOR_SIZE, weight_rms())
    return 1.0


def update_svd(svd: TruncatedSVD, update: str, scale: float = 1.0) -> TruncatedSVD:
    """Turn the SVD of the matrix of a rule into the SVD of the update. Not collective.

    Args:
        svd: of ``UPDATE_RULES[update].matrix``.
        scale: from ``step_scale``.
    """
    if not UPDATE_RULES[update].orthogonal:
        return svd if scale == 1.0 else svd._replace(S=svd.S * scale)
    r, n = svd.Vh.shape
    found = NOISE * svd.S[0] < svd.S  # all False if the gradient is 0
    captured = r / n if found.all() else 1.0  # 1: G has no more directions than were found
    return svd._replace(S=scale * found.to(svd.S), captured_energy=captured)
