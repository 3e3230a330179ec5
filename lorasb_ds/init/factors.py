"""Compute a layer's factors from the SVD of its matrix, fill them, and return them as a basis."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist

from lorasb_ds.adapters.layer import AdapterLinear
from lorasb_ds.config.methods import METHODS, FactorInputs, Method
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import zero
from lorasb_ds.distributed.collectives import Group, gather_rows, row_range
from lorasb_ds.init.gradient_shards import is_transposed
from lorasb_ds.init.sharded_svd import TruncatedSVD

if TYPE_CHECKING:
    from lorasb_ds.config.methods import Factors


# The initial factors of a run by name, such as "<layer>.lora_A"; on rank 0, empty elsewhere.
Basis = dict[str, torch.Tensor]


@dataclass(frozen=True)
class InitSettings:
    """How a run computes its factors.

    Attributes:
        update: a key of ``UPDATE_RULES``; used if the method decomposes a gradient.
        scaling, gamma: as in ``FactorInputs``.
        seed: of random factors, and of the directions that complete a basis if the matrix has a
            rank below r.
    """

    method: Method
    update: str
    scaling: float = 1.0
    gamma: float = 1.0
    seed: int = 0

    @classmethod
    def from_config(cls, config: RunConfig) -> InitSettings:
        """Return the settings of a run with one of ``METHODS``."""
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
    """Return this rank's rows of W0, or of its transpose if in > out; fp32. Collective.

    The layer's weight is gathered, and dequantized if necessary.
    """
    with zero.gathered(adapter.base_layer.parameters()):
        W = adapter.base_weight(torch.float32)
        if is_transposed(adapter.out_features, adapter.in_features):
            W = W.T
        rows = row_range(len(W), dist.get_rank(group), dist.get_world_size(group))
        return W[rows.start : rows.stop].clone()


class Directions(NamedTuple):
    """The SVD of a layer's matrix, whole and not transposed; fp32, on rank 0."""

    U: torch.Tensor  # (out, k)
    S: torch.Tensor  # (k,)
    Vh: torch.Tensor  # (k, in)


def gather_directions(adapter: AdapterLinear, svd: TruncatedSVD, group: Group) -> Directions | None:
    """Gather one layer's SVD on rank 0; return None elsewhere. Collective."""
    U = gather_rows(svd.U_local, max(adapter.out_features, adapter.in_features), group)
    if U is None:
        return None
    if is_transposed(adapter.out_features, adapter.in_features):
        return Directions(svd.Vh.T, svd.S, U.T)  # Mᵀ ~ U S Vh, so M ~ Vhᵀ S Uᵀ
    return Directions(U, svd.S, svd.Vh)


def random_directions(
    name: str, adapter: AdapterLinear, settings: InitSettings
) -> Directions | None:
    """Return random orthonormal directions with S = 1, on rank 0; None elsewhere. Not collective.

    k = r, or 0 if the method has no matrix.
    """
    if zero.rank() != 0:
        return None
    if settings.method.matrix == "none":
        return Directions(
            torch.zeros(adapter.out_features, 0),
            torch.zeros(0),
            torch.zeros(0, adapter.in_features),
        )
    U, Vh = random_bases(name, adapter, settings)
    return Directions(U, torch.ones(adapter.r), Vh)


def random_bases(
    name: str, adapter: AdapterLinear, settings: InitSettings, *batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random U (*batch, out, r) and Vh (*batch, r, in) of orthonormal directions."""
    generator = generator_of(settings.seed, name)
    U, V = (
        torch.linalg.qr(torch.randn(*batch, side, adapter.r, generator=generator)).Q
        for side in (adapter.out_features, adapter.in_features)
    )
    return U, V.mT


def fill_layer(
    name: str, adapter: AdapterLinear, directions: Directions | None, settings: InitSettings
) -> Basis:
    """Compute and fill one layer's factors, and return its part of the basis. Collective.

    Args:
        name: of the layer; with the seed it determines the random numbers.
        directions: on rank 0; None elsewhere.
    """
    if directions is None:
        return fill_factors(name, adapter, None)
    generator = generator_of(settings.seed, f"{name}.factors")
    factors = compute_factors(directions, adapter.r, settings, generator)
    if settings.method.offset:
        # Rounded as the model computes with them, so that the update is exactly 0.
        dtype = adapter.lora_A.dtype
        factors = {key: value.to(dtype).float() for key, value in factors.items()}
        factors |= {"offset_A": factors["lora_A"], "offset_B": factors["lora_B"]}
    return fill_factors(name, adapter, factors)


def compute_factors(
    directions: Directions, r: int, settings: InitSettings, generator: torch.Generator
) -> Factors:
    """Return the factors that the run's method makes of one matrix's SVD. Not collective."""
    device = directions.S.device
    return settings.method.factors(
        FactorInputs(
            *directions,
            r=r,
            scaling=settings.scaling,
            gamma=settings.gamma,
            normal=lambda *shape: torch.randn(shape, generator=generator).to(device),
            uniform=lambda *shape: 2 * torch.rand(shape, generator=generator).to(device) - 1,
        )
    )


def fill_factors(name: str, adapter: AdapterLinear, factors: Factors | None) -> Basis:
    """Fill one layer's factors from rank 0's, and return its part of the basis. Collective.

    In the basis frozen factors have the adapter's dtype, trained ones fp32, as their masters.

    Args:
        factors: whole, on rank 0; None elsewhere.
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
            # A copy: an offset is the same tensor, and safetensors stores no tensor twice.
            basis[f"{name}.{key}"] = value.to("cpu", copy=True).contiguous()
    return basis


def generator_of(seed: int, name: str) -> torch.Generator:
    """Return a generator for one purpose; torch's global generators are not used."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
