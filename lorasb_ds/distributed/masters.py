"""The fp32 masters of trainable parameters inside a DeepSpeed engine: flat, and cut over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.matrix_optimizer import MatrixPart


def flat_masters(engine: Any) -> list[torch.Tensor]:
    """Return this rank's flat masters: the tensors that the engine's torch optimizer steps."""
    return list(getattr(engine.optimizer, _layout(engine).masters))


def squared_norm(engine: Any) -> torch.Tensor:
    """Return the squared norm of this rank's flat masters, fp64. Not collective.

    The sum over ranks is the squared norm of all trainable parameters.
    """
    norms = [flat.detach().double().square().sum() for flat in flat_masters(engine)]
    return torch.stack(norms).sum().to(accelerator.device())


def parts_of_masters(engine: Any) -> list[tuple[torch.Tensor, list[MatrixPart]]]:
    """Return each flat master with the parts of parameters that it holds. Not collective."""
    layout = _layout(engine)
    parts = map(layout.parts, getattr(engine.optimizer, layout.groups))
    return list(zip(flat_masters(engine), parts, strict=True))


def _sharded_parts(parameters: Iterable[Any]) -> list[MatrixPart]:
    """Stage 3: every parameter is cut into equal parts, the last rank's padded."""
    parts, offset = [], 0
    for parameter in parameters:
        length = parameter.ds_tensor.ds_numel
        start = min(length * dist.get_rank(), parameter.ds_numel)
        here = min(length, parameter.ds_numel - start)
        parts.append(MatrixPart(parameter, tuple(parameter.ds_shape), start, offset, here))
        offset += length
    return parts


def _mapped_parts(parameters: Iterable[Any]) -> list[MatrixPart]:
    """Stages 1 and 2: parameters are concatenated, and cut where a rank's partition ends."""
    parts = []
    for parameter in parameters:
        start, offset, length = 0, 0, 0
        if parameter._hp_mapping is not None:
            start = parameter._hp_mapping.lp_fragment_address.start
            offset = parameter._hp_mapping.hp_fragment_address.start
            length = parameter._hp_mapping.hp_fragment_address.numel
        parts.append(MatrixPart(parameter, tuple(parameter.shape), start, offset, length))
    return parts


class _Layout(NamedTuple):
    """Where one of DeepSpeed's optimizers keeps its masters."""

    masters: str  # its attribute with the flat masters
    groups: str  # its attribute with the groups of parameters, one for each master
    parts: Callable[[Iterable[Any]], list[MatrixPart]]


def _layout(engine: Any) -> _Layout:
    return next(layout for layout in _LAYOUTS if hasattr(engine.optimizer, layout.masters))


_LAYOUTS = (
    _Layout("fp32_partitioned_groups_flat", "fp16_groups", _sharded_parts),  # stage 3
    _Layout("single_partition_of_fp32_groups", "bit16_groups", _mapped_parts),  # stages 1 and 2
    # Stage 1 with bf16 and several micro-batches.
    _Layout("fp32_groups_flat_partition", "bf16_groups", _mapped_parts),
)
