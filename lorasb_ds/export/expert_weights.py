"""Where the files of a base have the matrix of one expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.core_model_loading import Transpose

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.models.weight_map import WeightSource


@dataclass(frozen=True)
class WeightPart:
    """Rows of an expert's W (out, in) that a stored tensor has.

    Attributes:
        key: name of the stored tensor.
        matrix: which of the matrices of that tensor; 0 of one that has no others.
        rows: of W.
        transposed: whether they are stored as columns.
    """

    key: str
    matrix: int
    rows: range
    transposed: bool


def expert_parts(
    projection: str,
    shape: tuple[int, int, int],
    source: WeightSource,
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    name: str,
) -> list[list[WeightPart]]:
    """Return the stored parts of every expert of a projection.

    Args:
        projection: name of its parameter in transformers' model.
        shape: (experts, out, in).
        source: of that parameter.
        name: of the model, for messages.
    Raises:
        ConfigError: if transformers makes the parameter in another way than by stacking experts'
            matrices, one below the other.
    """
    num_experts, out_features, in_features = shape
    module = model.get_submodule(projection.rpartition(".")[0])
    if source.converter is None or _is_transposition(source):
        (key,) = source.keys
        rows, turned = range(out_features), False
        if source.converter is not None:
            (operation,) = source.converter.operations
            as_it_is = stored[key].shape == source.targets[projection]
            turned = not (operation.check_dims and as_it_is)
        transposed = bool(module.is_transposed) != turned
        return [[WeightPart(key, number, rows, transposed)] for number in range(num_experts)]
    if by_expert := source.by_expert(num_experts):
        first = by_expert[0]
        numbers = {key: i for i, key in enumerate(first.keys)}

        def read(key: str) -> torch.Tensor:
            return torch.full(stored[key].shape, float(numbers[key]))

        (found,) = first.convert(model, read).values()
        W = found[0].T if module.is_transposed else found[0]
        spans = [torch.nonzero(W[:, 0] == i).flatten() for i in range(len(numbers))]
        ranges = [range(int(span[0]), int(span[0]) + len(span)) for span in spans if len(span)]
        as_stored = len(ranges) == len(numbers) and all(
            bool((W[rows.start : rows.stop] == i).all())
            and stored[key].shape == (len(rows), in_features)
            for (key, i), rows in zip(numbers.items(), ranges, strict=True)
        )
        if as_stored:
            return [
                [
                    WeightPart(key, 0, rows, False)
                    for key, rows in zip(of_expert.keys, ranges, strict=True)
                ]
                for of_expert in by_expert
            ]
    raise ConfigError(
        f"--model {name}: transformers builds {projection} from {', '.join(source.keys[:3])} in a "
        "way that cannot be merged here. Merge the adapter by PEFT's merge_and_unload."
    )


def _is_transposition(source: WeightSource) -> bool:
    """Return whether one tensor of all experts is turned, and nothing else."""
    operations = source.converter.operations
    return len(source.keys) == len(operations) == 1 and isinstance(operations[0], Transpose)
