"""Where DeepSpeed keeps the fp32 masters of what is trained: flat, each rank its part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lorasb_ds.distributed.matrix_optimizer import Part


def flat_masters(engine: Any) -> list[torch.Tensor]:
    """This rank's flat parts of the fp32 masters: what the engine's torch optimizer steps on."""
    return list(getattr(engine.optimizer, _layout(engine).masters))


def parts_of_masters(engine: Any) -> list[tuple[torch.Tensor, list[Part]]]:
    """Of every flat master which parts of which parameters lie in it. Not collective."""
    layout = _layout(engine)
    parts = map(layout.parts, getattr(engine.optimizer, layout.groups))
    return list(zip(flat_masters(engine), parts, strict=True))


def _sharded_parts(parameters: Iterable[Any]) -> list[Part]:
    """Stage 3: of every parameter as many entries as on other ranks, the last one's padded."""
    parts, offset = [], 0
    for parameter in parameters:
        length = parameter.ds_tensor.ds_numel
        start = min(length * dist.get_rank(), parameter.ds_numel)
        here = min(length, parameter.ds_numel - start)
        parts.append(Part(parameter, tuple(parameter.ds_shape), start, offset, here))
        offset += length
    return parts


def _mapped_parts(parameters: Iterable[Any]) -> list[Part]:
    """Stages 1 and 2: one parameter after the other, cut where a rank's share ends."""
    parts = []
    for parameter in parameters:
        start, offset, length = 0, 0, 0
        if parameter._hp_mapping is not None:
            start = parameter._hp_mapping.lp_fragment_address.start
            offset = parameter._hp_mapping.hp_fragment_address.start
            length = parameter._hp_mapping.hp_fragment_address.numel
        parts.append(Part(parameter, tuple(parameter.shape), start, offset, length))
    return parts


class _Layout(NamedTuple):
    masters: str  # attributes of DeepSpeed's optimizer
    groups: str  # of parameters, one for each master
    parts: Callable[[Iterable[Any]], list[Part]]


def _layout(engine: Any) -> _Layout:
    return next(layout for layout in _LAYOUTS if hasattr(engine.optimizer, layout.masters))


_LAYOUTS = (
    _Layout("fp32_partitioned_groups_flat", "fp16_groups", _sharded_parts),  # stage 3
    _Layout("single_partition_of_fp32_groups", "bit16_groups", _mapped_parts),  # stages 1 and 2
    # Stage 1 with bf16 and several micro-batches.
    _Layout("fp32_groups_flat_partition", "bf16_groups", _mapped_parts),
)
