"""What an optimizer's first step makes of a gradient, which the init then imitates. Torch only.

An update is a matrix of the gradient's shape, without the learning rate: that is left to R's eta.
The gradient comes as rows of it, or of its transpose, which no rule here tells apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from lorasb_ds.distributed.collectives import Group, all_reduce
from lorasb_ds.init.sharded_svd import TruncatedSVD

ADAM_EPSILON = 1e-8
# Adafactor's on squares and on the size of a weight, and what clips its update (arXiv 1804.04235,
# algorithm 4 and section 9).
ADAFACTOR_EPSILON, ADAFACTOR_SIZE, ADAFACTOR_CLIP = 1e-30, 1e-3, 1.0
# Singular values below this share of the largest are noise of an fp32 gradient.
NOISE = 1e-5


class Update(NamedTuple):
    """A rule: what is decomposed, and whether its singular values are all 1 then."""

    matrix: Callable[[torch.Tensor, Group], torch.Tensor]
    orthogonal: bool = False


def adafactor(G: torch.Tensor, group: Group) -> torch.Tensor:
    """``G / sqrt(r cᵀ / mean(r))``, r and c the mean squares of rows and columns, clipped to RMS 1.

    Collective: all-reduces of (n + 2,) and of one number. At the first step the decay of the second
    moment is 0 (arXiv 1804.04235, algorithm 4: ``1 - t^-0.8``), so that r and c are this gradient's
    own. One matrix of G's size is made.

    Args:
        G: (rows here, n), fp32.
    """
    n = G.shape[1]
    rows = torch.linalg.vector_norm(G, dim=1, dtype=torch.float64).square() / n
    facts = G.new_zeros(n + 2, dtype=torch.float64)  # of columns; number of rows, sum of their r
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


UPDATES = {
    # AdamW's first step, in the limit of a small epsilon: LoRA-SB's paper's. Lion's, too.
    "sign": Update(lambda G, group: G.sign().to(torch.int8)),
    # AdamW's first step itself: entries near epsilon move less.
    "adam": Update(lambda G, group: G / (G.abs() + ADAM_EPSILON)),
    # The gradient: the first step of SGD.
    "raw": Update(lambda G, group: G),
    "adafactor": Update(adafactor),
    # U Vh of G = U S Vh, to which Muon's Newton-Schulz steps converge. All its directions count the
    # same; those that are kept are G's largest, along which the loss falls most.
    "muon": Update(lambda G, group: G, orthogonal=True),
}


def step_scale(
    update: str, out_features: int, in_features: int, weight_rms: Callable[[], float]
) -> float:
    """How far the optimizer steps in one layer, against others: the part of its first step that is
    one number for a matrix.

    Muon: ``sqrt(max(1, out / in))`` (torch's "original"). Adafactor: the weight's root mean square,
    at least 1e-3 (arXiv 1804.04235, section 8).

    Args:
        weight_rms: of the base's weight; called where it is needed. May be collective.
    """
    if update == "muon":
        return math.sqrt(max(1.0, out_features / in_features))
    if update == "adafactor":
        return max(ADAFACTOR_SIZE, weight_rms())
    return 1.0


def finished(svd: TruncatedSVD, update: str, scale: float = 1.0) -> TruncatedSVD:
    """The SVD of a layer's update, from that of the matrix its rule gives. Not collective.

    Args:
        scale: as ``step_scale``.
    """
    if not UPDATES[update].orthogonal:
        return svd if scale == 1.0 else svd._replace(S=svd.S * scale)
    r, n = svd.Vh.shape
    found = NOISE * svd.S[0] < svd.S  # none of a gradient that is 0
    captured = r / n if found.all() else 1.0  # of as many as the gradient has
    return svd._replace(S=scale * found.to(svd.S), captured_energy=captured)
