"""What an init found: layer by layer, of its step, and as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerInit:
    """What the init found in one layer. The update is that of ``UPDATES``, without eta."""

    captured_energy: float  # share of its squared Frobenius norm in the r directions kept
    spectrum: tuple[float, ...]  # its r largest singular values
    orthonormality_error: float  # largest entry of |UᵀU - I| and |Vh Vhᵀ - I|, in fp32
    stored_orthonormality_error: float  # the same as A and B are stored, in the run's dtype
    slopes: tuple[float, ...]  # S_i u_iᵀ G v_i of each direction
    batches_reached: int  # micro-batches of all ranks that called the layer

    @property
    def slope(self) -> float:
        """<U S Vh, G>: to first order the loss falls by eta times this. R is 0 where it is not
        positive: without a gradient (the basis is then arbitrary), or where the rank-r image of the
        update points uphill, since few entries dominate G."""
        return sum(self.slopes)

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the update, all directions."""
        return sum(s * s for s in self.spectrum) / self.captured_energy

    def R(self, eta: float) -> torch.Tensor:
        """(r, r), fp32: ``-eta diag(S)``, or 0."""
        return torch.diag((-eta if self.slope > 0 else 0.0) * torch.tensor(self.spectrum))


@dataclass(frozen=True)
class Step:
    """The eta that was taken, and what it does to rows that the gradient has not seen."""

    init_lr: float | None  # eta; of methods that take no step None
    num_samples: int
    loss_before: float  # at the base
    loss_after: float  # with A, B and R filled
    losses: dict[str, float]  # every eta that was tried and its loss; empty where eta was given
    seconds: float


@dataclass(frozen=True)
class InitReport:
    update: str  # what was decomposed
    num_samples: int  # rows of the gradient
    num_label_tokens: int
    num_batches: int  # micro-batches of all ranks
    loss: float | None  # of the gradient's rows, at the base; None if there was no gradient
    step: Step
    num_groups: int  # of layers, whose gradients were held at the same time
    passes: int  # forward and backward over the sample; by segments it is one, and a forward more
    by_segments: bool
    predicted_memory_bytes: int  # of gradients and SVD, without activations (init_plan.py)
    peak_memory_bytes: int  # of rank 0, all that it holds
    memory_at_start_bytes: int
    gradients_s: float  # forward, backward and the gathers of ZeRO in them
    communication_s: float  # reductions of gradients into shards; not in gradients_s
    svd_s: float  # with the filling of A and B
    total_s: float  # with the step's
    layers: dict[str, LayerInit]

    @property
    def not_descending(self) -> list[str]:
        """Layers whose R starts at 0."""
        return [name for name, layer in self.layers.items() if layer.slope <= 0]

    @property
    def partly_reached(self) -> dict[str, int]:
        """Layers that some micro-batches never called, and how many did."""
        return {
            name: layer.batches_reached
            for name, layer in self.layers.items()
            if layer.batches_reached < self.num_batches
        }


def no_gradient_report(step: Step) -> InitReport:
    """Of an init that decomposes nothing and is made by someone else."""
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
