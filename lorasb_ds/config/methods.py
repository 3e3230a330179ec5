"""The table of methods, LoRA-SB and its relatives: what is decomposed, and what is trained.

    W = W0 + s · B R A  (LoRA-SB's family: R is trained)      W = W0 + s · (B A - B0 A0)  (LoRA's)

A new method is one row, and one short function if none of those here fills its factors.
Pure functions of tensors; the module itself is torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

    Factors = dict[str, torch.Tensor]


PEFT_PREFIX = "peft:"  # --method peft:FILE.json, a PEFT configuration
DEFAULT_METHOD = "lora-sb"
DEFAULT_ALPHA = 16.0  # for methods with a scaling; from LoRA-GA's and LoRA-One's papers
LR_OF_R, LR_OF_AB = 2e-3, 2e-4  # defaults of --lr where R, or A and B, are trained
XS_DEVIATION = 1e-5  # standard deviation of R (arXiv 2405.17604)

# What is decomposed. "update": the step that --init-update makes of the average gradient.
Matrix = Literal["update", "sign", "gradient", "weight", "random", "none"]
TRAIN_R, TRAIN_AB = ("lora_R",), ("lora_A", "lora_B")


class Layer(NamedTuple):
    """One layer, and the leading directions of its matrix ``M ~ U diag(S) Vh``; fp32.

    Without a matrix, k is 0.
    """

    U: torch.Tensor  # (out, k)
    S: torch.Tensor  # (k,), descending
    Vh: torch.Tensor  # (k, in)
    r: int
    scaling: float  # s
    gamma: float
    normal: Callable[..., torch.Tensor]  # standard normal numbers of a shape, from the run's seed
    uniform: Callable[..., torch.Tensor]  # the same, uniform between -1 and 1


def _bases(layer: Layer) -> Factors:
    """Orthonormal ``B = U`` and ``A = Vh``; R is 0, or set by the init's step."""
    return {"lora_A": layer.Vh, "lora_B": layer.U, "lora_R": layer.S.new_zeros(layer.r, layer.r)}


def _xs(layer: Layer) -> Factors:
    """``B = U S``, ``A = Vh``, R all but zero (arXiv 2405.17604, section 2)."""
    R = XS_DEVIATION * layer.normal(layer.r, layer.r)
    return {"lora_A": layer.Vh, "lora_B": layer.U * layer.S, "lora_R": R}


def _lora(layer: Layer) -> Factors:
    """A Kaiming-uniform (a = √5: ±1/√in), B = 0 (arXiv 2106.09685, as in PEFT)."""
    out_features, in_features = len(layer.U), layer.Vh.shape[1]
    A = layer.uniform(layer.r, in_features) / math.sqrt(in_features)
    return {"lora_A": A, "lora_B": A.new_zeros(out_features, layer.r)}


def _pissa(layer: Layer) -> Factors:
    """``s B A`` is the best rank-r part of W0: ``√(S/s)`` in each (arXiv 2404.02948, eq. 2, 3)."""
    root = (layer.S / layer.scaling).sqrt()
    return {"lora_A": root[:, None] * layer.Vh, "lora_B": layer.U * root}


def _lora_ga(layer: Layer) -> Factors:
    """A of the first r directions, B of the next r, times ``out^¼ / √gamma`` (arXiv 2407.05000,
    eq. 9, 10 and its code's "ArB2r", "stable")."""
    size = len(layer.U) ** 0.25 / math.sqrt(layer.gamma)
    return {"lora_A": size * layer.Vh[: layer.r], "lora_B": size * layer.U[:, layer.r :]}


def _lora_one(layer: Layer) -> Factors:
    """``√(S / (S₁ gamma))`` in each, of the SVD of -G (arXiv 2502.01235, algorithm 1).

    The layer has the SVD of G: the sign goes to B. If the gradient is 0, B is 0 and A is not.
    """
    if layer.S[0] == 0:
        A = layer.Vh / math.sqrt(layer.gamma)
        return {"lora_A": A, "lora_B": layer.U * 0}
    root = (layer.S / (layer.S[0] * layer.gamma)).sqrt()
    return {"lora_A": root[:, None] * layer.Vh, "lora_B": -layer.U * root}


@dataclass(frozen=True)
class Method:
    matrix: Matrix
    factors: Callable[[Layer], Factors]
    trained: tuple[str, ...]
    step: bool = False  # R = -eta S, eta given or measured
    scaling: Literal["1", "alpha/r", "alpha/√r"] = "1"
    directions: int = 1  # directions of the SVD, in multiples of r
    offset: bool = False  # B0 A0 are A and B as they were filled: W is W0 at first
    gamma: float = 1.0  # where --gamma is not given; 1: there is none
    paper: str = ""

    def scale(self, r: int, alpha: float | None) -> float:
        """Return the scaling s."""
        alpha = DEFAULT_ALPHA if alpha is None else alpha
        return {"1": 1.0, "alpha/r": alpha / r, "alpha/√r": alpha / math.sqrt(r)}[self.scaling]

    @property
    def source(self) -> Literal["gradient", "weight", "nothing"]:
        """What the decomposed matrix is computed from."""
        if self.matrix == "weight":
            return "weight"
        return "gradient" if self.matrix in ("update", "sign", "gradient") else "nothing"

    @property
    def needs_gradient(self) -> bool:
        return self.source == "gradient"

    @property
    def trains_r(self) -> bool:
        return self.trained == TRAIN_R

    @property
    def lr(self) -> float:
        """Learning rate where --lr is not given."""
        return LR_OF_R if self.trains_r else LR_OF_AB


def _sb(matrix: Matrix, step: bool) -> Method:
    """Return LoRA-SB with other bases or without its step: the ablations of its paper."""
    return Method(matrix, _bases, TRAIN_R, step=step, paper="arXiv 2411.19557, ablations")


METHODS: dict[str, Method] = {
    "lora-sb": Method("update", _bases, TRAIN_R, step=True, paper="arXiv 2411.19557"),
    "lora-xs": Method("weight", _xs, TRAIN_R, paper="arXiv 2405.17604"),
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
    "sb-random": _sb("random", step=False),
    "sb-random-s": _sb("random", step=True),
    "sb-weight": _sb("weight", step=False),
    "sb-weight-s": _sb("weight", step=True),
    "sb-gradient": _sb("gradient", step=False),
    "sb-gradient-s": _sb("gradient", step=True),
    "sb-sign": _sb("sign", step=False),
}


def default_lr(method: str) -> float:
    """Return the learning rate of a method, or of a ``peft:FILE.json``, without --lr."""
    return METHODS[method].lr if method in METHODS else LR_OF_AB
