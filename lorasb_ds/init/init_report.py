"""The report of an init: its layers, its step, and the whole. Stored as init.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LayerInit:
    """The decomposition of one layer's update, which is that of ``UPDATE_RULES``, without eta."""

    captured_energy: float  # share of its squared Frobenius norm in the r directions kept
    spectrum: tuple[float, ...]  # its r largest singular values
    orthonormality_error: float  # largest entry of |UᵀU - I| and |Vh Vhᵀ - I|, in fp32
    stored_orthonormality_error: float  # the same, of U and Vh rounded to the run's dtype
    slopes: tuple[float, ...]  # S_i u_iᵀ G v_i of each direction
    batches_reached: int  # micro-batches of all ranks that called the layer

    @property
    def slope(self) -> float:
        """<U S Vh, G>: to first order the loss falls by eta times this.

        R is 0 where it is not positive: if the gradient is 0 (the basis is then arbitrary), or the
        rank-r approximation of the update points uphill, since few entries dominate G.
        """
        return sum(self.slopes)

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the whole update, not only of the directions kept."""
        return sum(s * s for s in self.spectrum) / self.captured_energy

    def R(self, eta: float) -> torch.Tensor:
        """Return R, (r, r) fp32: ``-eta diag(S)``, or 0 where ``slope`` is not positive."""
        return torch.diag((-eta if self.slope > 0 else 0.0) * torch.tensor(self.spectrum))


@dataclass(frozen=True, eq=False)
class ExpertsInit:
    """The decompositions of the experts of one projection. Tensors are on the CPU."""

    captured_energy: torch.Tensor  # (experts,), as in LayerInit
    spectrum: torch.Tensor  # (experts, r)
    slopes: torch.Tensor  # (experts, r)
    tokens: torch.Tensor  # (experts,), tokens of the sample that gave it a gradient; 0 without one
    orthonormality_error: float  # the largest of all experts'
    stored_orthonormality_error: float

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the updates of all experts."""
        return float((self.spectrum.double().square().sum(1) / self.captured_energy).sum())

    def R(self, eta: float) -> torch.Tensor:
        """Return R, (experts, r, r) fp32, as ``LayerInit.R``."""
        descends = self.slopes.sum(1, keepdim=True) > 0
        return torch.diag_embed(torch.where(descends, -eta * self.spectrum, 0.0))

    @property
    def unreached(self) -> list[int]:
        """Numbers of the experts without a gradient, whose R starts at 0."""
        return torch.nonzero(self.tokens == 0).flatten().tolist()


def join_experts(parts: Sequence[ExpertsInit]) -> ExpertsInit:
    """Return the report of a projection, from those of some of its experts at a time."""
    return ExpertsInit(
        captured_energy=torch.cat([part.captured_energy for part in parts]),
        spectrum=torch.cat([part.spectrum for part in parts]),
        slopes=torch.cat([part.slopes for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        orthonormality_error=max(part.orthonormality_error for part in parts),
        stored_orthonormality_error=max(part.stored_orthonormality_error for part in parts),
    )


@dataclass(frozen=True)
class InitStep:
    """The init's step: eta, and the loss before and after on rows that the gradient did not use."""

    init_lr: float | None  # eta; None if the method takes no step
    num_samples: int
    loss_before: float  # of the base
    loss_after: float  # with all factors filled
    losses: dict[str, float]  # every eta that was tried -> its loss; empty if eta was given
    seconds: float


@dataclass(frozen=True)
class InitReport:
    """The whole init."""

    update: str  # what was decomposed
    num_samples: int  # rows of the sample that the gradient was computed on
    num_label_tokens: int  # of that sample
    num_batches: int  # micro-batches of all ranks
    loss: float | None  # of that sample, at the base; None if there was no gradient
    step: InitStep
    num_groups: int  # groups of layers whose gradients were held at the same time
    passes: float  # of a block, forward and backward over the sample; segments add a forward pass
    by_segments: bool
    predicted_memory_bytes: int  # of gradients and SVD, without activations (init_plan.py)
    peak_memory_bytes: int  # of rank 0, base included
    memory_at_start_bytes: int  # of rank 0
    gradients_s: float  # forward, backward, and ZeRO's gathers in them
    communication_s: float  # reductions of gradients into shards; not in gradients_s
    svd_s: float  # including filling the factors
    total_s: float  # including the step's
    layers: dict[str, LayerInit]
    experts: dict[str, ExpertsInit] = field(default_factory=dict)  # projections of MoE experts

    @property
    def decompositions(self) -> dict[str, LayerInit | ExpertsInit]:
        """All layers and projections of experts."""
        return {**self.layers, **self.experts}

    @property
    def not_descending(self) -> list[str]:
        """Names of the layers whose slope is not positive: their R starts at 0."""
        return [name for name, layer in self.layers.items() if layer.slope <= 0]

    @property
    def partly_reached(self) -> dict[str, int]:
        """Layers that some micro-batches did not call -> the number of those that did."""
        return {
            name: layer.batches_reached
            for name, layer in self.layers.items()
            if layer.batches_reached < self.num_batches
        }


def no_gradient_report(step: InitStep) -> InitReport:
    """Return the report of an init that PEFT made: nothing was decomposed."""
    return InitReport(
        update="nothing (PEFT's init)",
        num_samples=0,
        num_label_tokens=0,
        num_batches=0,
        loss=None,
        step=step,
        num_groups=1,
        passes=0,
        by_segments=False,
        predicted_memory_bytes=0,
        peak_memory_bytes=0,
        memory_at_start_bytes=0,
        gradients_s=0.0,
        communication_s=0.0,
        svd_s=0.0,
        total_s=step.seconds,
        layers={},
    )
