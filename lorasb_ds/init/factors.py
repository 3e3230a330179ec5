"""From a layer's matrix, or none, to the adapter's factors, in place and as the basis of a run."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.config.methods import METHODS, Layer, Method
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import zero
from lorasb_ds.distributed.collectives import Group, gather_rows, row_range
from lorasb_ds.init.gradients import is_transposed
from lorasb_ds.init.sharded_svd import TruncatedSVD

if TYPE_CHECKING:
    from lorasb_ds.config.methods import Factors


# On rank 0: "<layer>.lora_A" and every other factor, as the run starts from it.
Basis = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a run's factors are made.

    Attributes:
        update: a key of ``UPDATES``: what is decomposed of a gradient.
        scaling, gamma: as ``methods.Layer`` has them.
        seed: of random numbers, and of the completion of bases that a matrix does not fill.
    """

    method: Method
    update: str
    scaling: float = 1.0
    gamma: float = 1.0
    seed: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Recipe:
        """Of a run with one of ``METHODS``."""
        method = METHODS[config.method]
        fixed = {"sign": "sign", "gradient": "raw"}
        return cls(
            method=method,
            update=fixed.get(method.matrix, config.update_rule),
            scaling=method.scale(config.r, config.lora_alpha),
            gamma=config.gamma or method.gamma,
            seed=config.seed_of_init,
        )


def weight_rows(adapter: AdapterLinear, group: Group = None) -> torch.Tensor:
    """This rank's rows of W0 along its longer side, or of its transpose; fp32. Collective.

    One layer is gathered at a time, and dequantized where it has to be.
    """
    with zero.gathered(adapter.base_layer.parameters()):
        W = adapter.base_weight(torch.float32)
        if is_transposed(adapter.out_features, adapter.in_features):
            W = W.T
        rows = row_range(len(W), dist.get_rank(group), dist.get_world_size(group))
        return W[rows.start : rows.stop].clone()


class Directions(NamedTuple):
    """Of a layer's matrix, in its own orientation; fp32, on rank 0."""

    U: torch.Tensor  # (out, k)
    S: torch.Tensor  # (k,)
    Vh: torch.Tensor  # (k, in)


def whole_directions(adapter: AdapterLinear, svd: TruncatedSVD, group: Group) -> Directions | None:
    """One layer's whole SVD on rank 0, None elsewhere. Collective."""
    U = gather_rows(svd.U_local, max(adapter.out_features, adapter.in_features), group)
    if U is None:
        return None
    if is_transposed(adapter.out_features, adapter.in_features):
        return Directions(svd.Vh.T, svd.S, U.T)  # Mᵀ ~ U S Vh, so M ~ Vhᵀ S Uᵀ
    return Directions(U, svd.S, svd.Vh)


def own_directions(name: str, adapter: AdapterLinear, recipe: Recipe) -> Directions | None:
    """Orthonormal ones of a layer's seed with S = 1, or none at all; on rank 0."""
    if zero.rank() != 0:
        return None
    if recipe.method.matrix == "none":
        return Directions(
            torch.zeros(adapter.out_features, 0),
            torch.zeros(0),
            torch.zeros(0, adapter.in_features),
        )
    generator = _generator(recipe.seed, name)
    U, V = (
        torch.linalg.qr(torch.randn(side, adapter.r, generator=generator))[0]
        for side in (adapter.out_features, adapter.in_features)
    )
    return Directions(U, torch.ones(adapter.r), V.T)


def fill_layer(
    name: str, adapter: AdapterLinear, directions: Directions | None, recipe: Recipe
) -> Basis:
    """Put one layer's factors in place; its part of the basis. Collective.

    Args:
        directions: rank 0's.
    """
    if directions is None:
        return fill_factors(name, adapter, None)
    generator = _generator(recipe.seed, f"{name}.factors")
    device = directions.S.device
    factors = recipe.method.factors(
        Layer(
            *directions,
            r=adapter.r,
            scaling=recipe.scaling,
            gamma=recipe.gamma,
            normal=lambda *shape: torch.randn(shape, generator=generator).to(device),
            uniform=lambda *shape: 2 * torch.rand(shape, generator=generator).to(device) - 1,
        )
    )
    if recipe.method.offset:
        # As the model computes with them, so that the update is 0 to the last bit.
        dtype = adapter.lora_A.dtype
        factors = {key: value.to(dtype).float() for key, value in factors.items()}
        factors |= {"offset_A": factors["lora_A"], "offset_B": factors["lora_B"]}
    return fill_factors(name, adapter, factors)


def fill_factors(name: str, adapter: AdapterLinear, factors: Factors | None) -> Basis:
    """Put rank 0's factors of one layer in place; its part of the basis. Collective.

    Frozen ones are stored as the adapter has them, trained ones in fp32, as their masters are.
    """
    basis: Basis = {}
    for key in adapter.frozen:
        value = None if factors is None else factors[key]
        zero.fill(adapter.factor(key), value)
        if value is not None:
            basis[f"{name}.{key}"] = value.to("cpu", adapter.factor(key).dtype).contiguous()
    for key in adapter.trained:
        value = None if factors is None else factors[key].float()
        zero.fill_trainable_from(adapter.factor(key), value)
        if value is not None:
            # A copy: an offset is the same tensor, and a file holds no two names of one.
            basis[f"{name}.{key}"] = value.to("cpu", copy=True).contiguous()
    return basis


def _generator(seed: int, name: str) -> torch.Generator:
    """Of one purpose of a run: global generators are left alone."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
