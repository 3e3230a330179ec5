"""The init of one projection's experts: whole matrices, decomposed by the rank that owns them."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from lorasb_ds.adapters.experts import LoraSBExperts
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.distributed.collectives import Group, gather_rows, row_range
from lorasb_ds.init.batched_svd import BatchedSVD, batched_svd
from lorasb_ds.init.factors import (
    Basis,
    Directions,
    InitSettings,
    compute_factors,
    fill_factors,
    generator_of,
    random_bases,
)
from lorasb_ds.init.gradient_shards import gradient_shape, is_transposed
from lorasb_ds.init.init_report import ExpertsInit, join_experts
from lorasb_ds.init.products import full_precision
from lorasb_ds.init.update_rules import UPDATE_RULES

# Optimizers whose updates take every entry of a gradient by itself.
EXPERT_UPDATES = ("sign", "adam", "raw")


class ExpertDirections(NamedTuple):
    """The SVDs of the matrices of all experts of a projection, not transposed; fp32, on rank 0."""

    U: torch.Tensor  # (experts, out, r)
    S: torch.Tensor  # (experts, r)
    Vh: torch.Tensor  # (experts, r, in)


class ExpertSVDs:
    """The SVDs of the updates of a projection's experts, from the gradients of some at a time.

    An expert that no token of the sample has reached has no gradient. Its basis is that of the mean
    gradient of the projection's other experts, and its singular values are 0, so that R starts at
    0 and can grow where theirs did.

    Args:
        name: of the projection, for messages.
        settings: with an update of ``EXPERT_UPDATES``.
    """

    def __init__(
        self, name: str, adapter: LoraSBExperts, settings: InitSettings, group: Group
    ) -> None:
        self.name, self.adapter, self.group = name, adapter, group
        rule = UPDATE_RULES[settings.update]
        self._svd = partial(
            batched_svd, r=adapter.r, seed=settings.seed, update=lambda G: rule.matrix(G, None)
        )
        _, *sides = gradient_shape(adapter)
        self._sum = torch.zeros(sides, device=accelerator.device())  # of gradients
        # First expert -> the directions on rank 0, None elsewhere; and the report, on every rank.
        self._parts: dict[int, tuple[ExpertDirections | None, ExpertsInit]] = {}
        self._missing = adapter.num_matrices

    @full_precision()
    def add(self, experts: range, gradients: torch.Tensor, tokens: torch.Tensor) -> None:
        """Decompose the updates of some experts. Collective.

        Args:
            experts: those that ``GradientShards`` held.
            gradients: (experts here, long side, short side), of ``GradientShards``.
            tokens: (those experts,), of ``GradientShards.tokens``.
        Raises:
            FloatingPointError: on every rank, if a gradient is not finite, naming the experts.
        """
        number = len(experts)
        largest = torch.linalg.vector_norm(gradients, torch.inf, dim=(1, 2))
        finite = _all_experts(torch.isfinite(largest), number, self.group).tolist()
        if bad := [str(e) for e, ok in zip(experts, finite, strict=True) if not ok]:
            raise FloatingPointError(
                f"the gradient of {self.name} of expert {', '.join(bad[:8])} is not finite. The "
                "base or the data hold values that overflow in its dtype. Try --dtype fp32."
            )
        svd = self._svd(gradients)
        slopes = svd.S * ((svd.U.mT @ gradients) * svd.Vh).sum(2)  # S_i u_iᵀ G v_i
        assert experts.start not in self._parts
        self._parts[experts.start] = (
            _gather(self.adapter, svd, number, self.group),
            _describe(self.adapter, svd, slopes, tokens, self.group),
        )
        for G in gradients:
            self._sum += G
        self._missing -= number

    @property
    def is_complete(self) -> bool:
        """Whether all experts have been added."""
        return self._missing == 0

    def result(self) -> tuple[ExpertDirections | None, ExpertsInit]:
        """Return the directions of all experts, on rank 0, None elsewhere; and the report.

        Collective: the mean gradient is all-reduced, if there is an expert without a token.
        """
        parts = [self._parts[first] for first in sorted(self._parts)]
        report = join_experts([of for _, of in parts])
        found = [directions for directions, _ in parts if directions is not None]
        directions = ExpertDirections(*map(torch.cat, zip(*found, strict=True))) if found else None
        if unreached := report.unreached:
            dist.all_reduce(self._sum, group=self.group)
            self._sum /= max(1, self.adapter.num_matrices - len(unreached))
            mean = self._svd(self._sum[None])
            report.captured_energy[unreached] = mean.captured_energy.cpu()
            if directions is not None:
                U, _, Vh = _not_transposed(self.adapter, mean.U, mean.S, mean.Vh)
                directions.U[unreached], directions.Vh[unreached] = U, Vh
        return directions, report


def decompose_weights(
    adapter: LoraSBExperts, settings: InitSettings, group: Group
) -> tuple[ExpertDirections | None, ExpertsInit]:
    """Compute the SVD of every expert's W. Collective: the projection's weight is gathered."""
    base, owned = adapter.base_layer, _owned(adapter.num_matrices, group)
    with zero.gathered(base.parameters()):
        weights = [base.expert_weight(expert).float() for expert in owned]
    transposed = is_transposed(adapter.out_features, adapter.in_features)
    _, *sides = gradient_shape(adapter)
    matrices = torch.zeros(len(weights), *sides, device=accelerator.device())
    for matrix, W in zip(matrices, weights, strict=True):
        matrix.copy_(W.T if transposed else W)
    svd = batched_svd(matrices, adapter.r, settings.seed)
    tokens = torch.zeros(adapter.num_matrices, dtype=torch.int64, device=accelerator.device())
    # Without a gradient the slopes are unknown; these let eta's search decide.
    slopes = svd.S.square()
    return (
        _gather(adapter, svd, adapter.num_matrices, group),
        _describe(adapter, svd, slopes, tokens, group),
    )


def random_expert_directions(
    name: str, adapter: LoraSBExperts, settings: InitSettings
) -> ExpertDirections | None:
    """Return random orthonormal directions with S = 1, on rank 0; None elsewhere."""
    if zero.rank() != 0:
        return None
    U, Vh = random_bases(name, adapter, settings, adapter.num_matrices)
    return ExpertDirections(U, torch.ones(adapter.num_matrices, adapter.r), Vh)


def random_experts_report(adapter: LoraSBExperts) -> ExpertsInit:
    """Return the report of random directions."""
    ones = torch.ones(adapter.num_matrices, adapter.r)
    tokens = torch.zeros(adapter.num_matrices, dtype=torch.int64)
    return ExpertsInit(torch.ones(adapter.num_matrices), ones, ones, tokens, 0.0, 0.0)


def fill_experts(
    name: str, adapter: LoraSBExperts, directions: ExpertDirections | None, settings: InitSettings
) -> Basis:
    """Compute and fill the factors of all experts, and return their part of the basis. Collective.

    Args:
        name: of the projection; with the seed it determines the random numbers.
        directions: on rank 0; None elsewhere.
    """
    if directions is None:
        return fill_factors(name, adapter, None)
    generator = generator_of(settings.seed, f"{name}.factors")
    experts = [
        compute_factors(Directions(*of_expert), adapter.r, settings, generator)
        for of_expert in zip(*directions, strict=True)
    ]
    stacked = {key: torch.stack([factors[key] for factors in experts]) for key in experts[0]}
    return fill_factors(name, adapter, stacked)


def _owned(number: int, group: Group) -> range:
    return row_range(number, dist.get_rank(group), dist.get_world_size(group))


def _all_experts(local: torch.Tensor, number: int, group: Group) -> torch.Tensor:
    """Return the values of so many experts, on every rank. Collective.

    Args:
        local: (experts here, …).
    """
    dtype = torch.float32 if local.is_floating_point() else torch.int64
    whole = torch.zeros(number, *local.shape[1:], dtype=dtype, device=local.device)
    owned = _owned(number, group)
    whole[owned.start : owned.stop] = local.to(dtype)
    dist.all_reduce(whole, group=group)
    return whole


def _gather(
    adapter: LoraSBExperts, svd: BatchedSVD, number: int, group: Group
) -> ExpertDirections | None:
    """Gather the SVDs of so many experts on rank 0; return None elsewhere. Collective."""
    parts = []
    for local in (svd.U, svd.S, svd.Vh):
        whole = gather_rows(local.flatten(1), number, group)
        parts.append(None if whole is None else whole.view(-1, *local.shape[1:]))
    U, S, Vh = parts
    if U is None or S is None or Vh is None:
        return None
    return _not_transposed(adapter, U, S, Vh)


def _not_transposed(
    adapter: LoraSBExperts, U: torch.Tensor, S: torch.Tensor, Vh: torch.Tensor
) -> ExpertDirections:
    """Return the SVDs of M, from those of M as gradients are kept: perhaps of Mᵀ."""
    if is_transposed(adapter.out_features, adapter.in_features):
        return ExpertDirections(Vh.mT, S, U.mT)  # Mᵀ ~ U S Vh, so M ~ Vhᵀ S Uᵀ
    return ExpertDirections(U, S, Vh)


@full_precision()
def _describe(
    adapter: LoraSBExperts,
    svd: BatchedSVD,
    slopes: torch.Tensor,
    tokens: torch.Tensor,
    group: Group,
) -> ExpertsInit:
    """Return the report of as many experts as ``tokens`` has. Collective."""
    identity = torch.eye(adapter.r, device=svd.U.device)

    def error(dtype: torch.dtype) -> float:
        U, Vh = (factor.to(dtype).float() for factor in (svd.U, svd.Vh))
        worst = torch.zeros((), device=identity.device)
        for gram in (U.mT @ U, Vh @ Vh.mT):
            if len(gram):
                worst = torch.maximum(worst, (gram - identity).abs().max())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
        return worst.item()

    return ExpertsInit(
        captured_energy=_all_experts(svd.captured_energy, len(tokens), group).cpu(),
        spectrum=_all_experts(svd.S, len(tokens), group).cpu(),
        slopes=_all_experts(slopes, len(tokens), group).cpu(),
        tokens=tokens.cpu(),
        orthonormality_error=error(torch.float32),
        stored_orthonormality_error=error(adapter.lora_A.dtype),
    )
