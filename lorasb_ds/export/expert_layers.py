"""Adapters of experts on disk, each expert of a projection as a layer of its own.

A projection's factors are stored together. Reading, truncating, adding and merging adapters go
through them an expert at a time, by names such as ``model.layers.0.mlp.experts.5.gate_up_proj``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from lorasb_ds.adapters.low_rank import LoraPair, padded
from lorasb_ds.adapters.peft_experts import ExpertPair, StoredExperts
from lorasb_ds.models.checkpoint_files import StoredTensor

if TYPE_CHECKING:  # a merge's processes import this module, without transformers
    from lorasb_ds.models.experts import ExpertShapes

FACTORS = ("lora_A", "lora_B", "lora_R")


@dataclass(frozen=True)
class Expert:
    """Which expert of which projection a layer is.

    Attributes:
        projection: name of the projection's parameter in transformers' model.
        count: the number of its experts.
        interleaved: B holds all experts' columns, those of one expert ``count`` apart: PEFT's form.
    """

    projection: str
    number: int
    count: int
    interleaved: bool = False

    @property
    def name(self) -> str:
        module, _, leaf = self.projection.rpartition(".")
        return f"{module}.{self.number}.{leaf}"

    def sides_in(self, experts: ExpertShapes) -> tuple[int, int] | None:
        """Return (out, in) of the expert in a base; None if the base has no such projection."""
        count, *sides = experts.get(self.projection, (0, 0, 0))
        return (sides[0], sides[1]) if count == self.count else None

    def columns(self, B: torch.Tensor) -> torch.Tensor:
        """Return this expert's columns of a B as it is stored."""
        return B[:, self.number :: self.count] if self.interleaved else B


def matrix_of(tensor: StoredTensor, number: int, count: int) -> StoredTensor:
    """Return one of the matrices that are stored one after the other in a tensor.

    Args:
        tensor: (count, rows, columns) or (count * rows, columns).
    """
    size = (tensor.end - tensor.begin) // count
    *_, rows, columns = tensor.shape
    rows = rows if len(tensor.shape) == 3 else rows // count
    begin = tensor.begin + number * size
    return replace(tensor, shape=(rows, columns), begin=begin, end=begin + size)


def split_basis(
    stored: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, Expert]]:
    """Return the tensors of a basis or checkpoint with experts' factors by expert.

    Returns:
        The tensors, factors of three dimensions replaced by those of each expert; and layer -> its
        expert.
    """
    found: dict[str, StoredTensor] = {}
    experts: dict[str, Expert] = {}
    for key, tensor in stored.items():
        projection, _, factor = key.rpartition(".")
        if factor not in FACTORS or len(tensor.shape) != 3:
            found[key] = tensor
            continue
        for number in range(tensor.shape[0]):
            expert = Expert(projection, number, tensor.shape[0])
            experts[expert.name] = expert
            found[f"{expert.name}.{factor}"] = matrix_of(tensor, number, expert.count)
    return found, experts


def split_peft(
    projection: str, experts: StoredExperts, A: StoredTensor
) -> dict[Expert, StoredTensor]:
    """Return the experts of a projection in PEFT's form, and A of each."""
    count = experts.num_experts
    return {
        Expert(projection, number, count, interleaved=True): matrix_of(A, number, count)
        for number in range(count)
    }


def join(pairs: Mapping[str, LoraPair], experts: Mapping[str, Expert]) -> dict[str, ExpertPair]:
    """Return projection -> the factors of all its experts, from those of layers.

    Experts of a lower rank than others of their projection are padded, those without factors are 0.

    Args:
        experts: layer -> its expert, of those layers that are experts.
    """
    projections: dict[str, dict[int, LoraPair]] = {}
    for layer, expert in experts.items():
        if layer in pairs:
            projections.setdefault(expert.projection, {})[expert.number] = pairs[layer]
    counts = {expert.projection: expert.count for expert in experts.values()}
    return {
        name: _stacked([found.get(number) for number in range(counts[name])])
        for name, found in projections.items()
    }


def _stacked(pairs: Collection[LoraPair | None]) -> ExpertPair:
    like = next(pair for pair in pairs if pair is not None)
    r = max(len(pair.A) for pair in pairs if pair is not None)
    zero = LoraPair(torch.zeros_like(like.A[:0]), torch.zeros_like(like.B[:, :0]))
    whole = [padded(pair or zero, r) for pair in pairs]
    return ExpertPair(torch.stack([A for A, _ in whole]), torch.stack([B for _, B in whole]))
