"""The table of methods, LoRA-SB and its relatives: the matrix to decompose and the factors.

    W = W0 + s · B R A  (LoRA-SB's family trains R)    W = W0 + s · (B A - B0 A0)  (LoRA's: A, B)

A new method is one row, and one short function unless one of those here computes its factors.
Pure, and torch-free: the functions are given tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    Factors = dict[str, torch.Tensor]


PEFT_PREFIX = "peft:"  # --method peft:FILE.json
DEFAULT_METHOD = "lora-sb"
DEFAULT_ALPHA = 16.0  # for methods with a scaling (LoRA-GA's and LoRA-One's papers)
# Defaults of --lr: where A and B are trained, and, times r, where R is. A step of AdamW moves the
# update by up to lr · r. Numbers from docs/results.md.
LR_OF_AB, LR_TIMES_R, XS_LR_TIMES_R = 2e-4, 0.1, 0.03
XS_DEVIATION = 1e-5  # standard deviation of LoRA-XS's initial R (arXiv 2405.17604)

# The matrix that is decomposed. "update": --init-update, applied to the average gradient.
Matrix = Literal["update", "sign", "gradient", "weight", "random", "none"]
TRAIN_R, TRAIN_AB = ("lora_R",), ("lora_A", "lora_B")


class FactorInputs(NamedTuple):
    """What a layer's factors are computed from: the truncated SVD ``M ~ U diag(S) Vh``; fp32.

    Methods that decompose nothing have k = 0.
    """

    U: torch.Tensor  # (out, k)
    S: torch.Tensor  # (k,), descending
    Vh: torch.Tensor  # (k, in)
    r: int
    scaling: float  # s
    gamma: float
    normal: Callable[..., torch.Tensor]  # shape -> standard normal numbers, from the run's seed
    uniform: Callable[..., torch.Tensor]  # shape -> uniform numbers in [-1, 1), likewise


def _bases(given: FactorInputs) -> Factors:
    """Return orthonormal ``B = U`` and ``A = Vh``, and R = 0, which the init's step may replace."""
    return {"lora_A": given.Vh, "lora_B": given.U, "lora_R": given.S.new_zeros(given.r, given.r)}


def _xs(given: FactorInputs) -> Factors:
    """Return ``B = U S``, ``A = Vh`` and a nearly zero R (arXiv 2405.17604, section 2)."""
    R = XS_DEVIATION * given.normal(given.r, given.r)
    return {"lora_A": given.Vh, "lora_B": given.U * given.S, "lora_R": R}


def _lora(given: FactorInputs) -> Factors:
    """Return A from Kaiming's uniform distribution (a = √5: within ±1/√in) and B = 0.

    Source: arXiv 2106.09685, as in PEFT.
    """
    out_features, in_features = len(given.U), given.Vh.shape[1]
    A = given.uniform(given.r, in_features) / math.sqrt(in_features)
    return {"lora_A": A, "lora_B": A.new_zeros(out_features, given.r)}


def _pissa(given: FactorInputs) -> Factors:
    """Return A and B with ``√(S/s)`` in each, so that ``s B A`` is W0's best rank-r approximation.

    Source: arXiv 2404.02948, eq. 2, 3.
    """
    root = (given.S / given.scaling).sqrt()
    return {"lora_A": root[:, None] * given.Vh, "lora_B": given.U * root}


def _lora_ga(given: FactorInputs) -> Factors:
    """Return A of the first r directions and B of the next r, both times ``out^¼ / √gamma``.

    Source: arXiv 2407.05000, eq. 9, 10, and "ArB2r", "stable" of its code.
    """
    size = len(given.U) ** 0.25 / math.sqrt(given.gamma)
    return {"lora_A": size * given.Vh[: given.r], "lora_B": size * given.U[:, given.r :]}


def _lora_one(given: FactorInputs) -> Factors:
    """Return A and B of the SVD of -G with ``√(S / (S₁ gamma))`` in each.

    The SVD given here is G's; B takes the minus sign. Where G is 0, so is B, but not A.

    Source: arXiv 2502.01235, algorithm 1.
    """
    if given.S[0] == 0:
        A = given.Vh / math.sqrt(given.gamma)
        return {"lora_A": A, "lora_B": given.U * 0}
    root = (given.S / (given.S[0] * given.gamma)).sqrt()
    return {"lora_A": root[:, None] * given.Vh, "lora_B": -given.U * root}


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        matrix: the matrix that is decomposed.
        factors: computes the initial factors of a layer.
        trained: names of the factors that are trained.
        takes_step: whether the init ends with a step ``R = -eta S``, eta given or measured.
        scaling: the formula of s.
        directions: how many directions the SVD keeps, as a multiple of r.
        offset: whether ``B0 A0`` is subtracted, B0 and A0 being the initial B and A, so that W
            starts as W0.
        gamma: the default of --gamma; 1 where the method has none.
        lr_times_r: the default of --lr, times r, where R is trained.
        paper: the source.
    """

    matrix: Matrix
    factors: Callable[[FactorInputs], Factors]
    trained: tuple[str, ...]
    takes_step: bool = False
    scaling: Literal["1", "alpha/r", "alpha/√r"] = "1"
    directions: int = 1
    offset: bool = False
    gamma: float = 1.0
    lr_times_r: float = LR_TIMES_R
    paper: str = ""

    def scale(self, r: int, alpha: float | None) -> float:
        """Return s; alpha is ``DEFAULT_ALPHA`` where it is None."""
        alpha = DEFAULT_ALPHA if alpha is None else alpha
        return {"1": 1.0, "alpha/r": alpha / r, "alpha/√r": alpha / math.sqrt(r)}[self.scaling]

    @property
    def decomposes(self) -> Literal["gradient", "weight", "nothing"]:
        """The kind of matrix that is decomposed, as the planner names it."""
        if self.matrix == "weight":
            return "weight"
        return "gradient" if self.matrix in ("update", "sign", "gradient") else "nothing"

    @property
    def needs_gradient(self) -> bool:
        return self.decomposes == "gradient"

    @property
    def trains_r(self) -> bool:
        return self.trained == TRAIN_R

    def lr(self, r: int) -> float:
        """Return the learning rate where --lr is not given, to three digits."""
        return float(f"{self.lr_times_r / r:.3g}") if self.trains_r else LR_OF_AB


def _sb(matrix: Matrix, takes_step: bool) -> Method:
    """Return a variant of LoRA-SB from its paper's ablations: other bases, or R = 0 at first."""
    return Method(
        matrix, _bases, TRAIN_R, takes_step=takes_step, paper="arXiv 2411.19557, ablations"
    )


METHODS: dict[str, Method] = {
    "lora-sb": Method("update", _bases, TRAIN_R, takes_step=True, paper="arXiv 2411.19557"),
    "lora-xs": Method("weight", _xs, TRAIN_R, lr_times_r=XS_LR_TIMES_R, paper="arXiv 2405.17604"),
    "lora-one": Method(
        "gradient",
        _lora_one,
        TRAIN_AB,
        scaling="alpha/√r",
        gamma=128.0,
        paper="arXiv 2502.01235",
    ),
    "lora-ga": Method(
        "gradient",
        _lora_ga,
        TRAIN_AB,
        scaling="alpha/√r",
        directions=2,
        offset=True,
        gamma=16.0,
        paper="arXiv 2407.05000",
    ),
    "lora": Method("none", _lora, TRAIN_AB, scaling="alpha/r", paper="arXiv 2106.09685"),
    "rslora": Method("none", _lora, TRAIN_AB, scaling="alpha/√r", paper="arXiv 2312.03732"),
    "pissa": Method(
        "weight", _pissa, TRAIN_AB, scaling="alpha/r", offset=True, paper="arXiv 2404.02948"
    ),
    "sb-random": _sb("random", takes_step=False),
    "sb-random-s": _sb("random", takes_step=True),
    "sb-weight": _sb("weight", takes_step=False),
    "sb-weight-s": _sb("weight", takes_step=True),
    "sb-gradient": _sb("gradient", takes_step=False),
    "sb-gradient-s": _sb("gradient", takes_step=True),
    "sb-sign": _sb("sign", takes_step=False),
}


def default_lr(method: str, r: int) -> float:
    """Return the learning rate of a method, or of a ``peft:FILE.json``, without --lr."""
    return METHODS[method].lr(r) if method in METHODS else LR_OF_AB
