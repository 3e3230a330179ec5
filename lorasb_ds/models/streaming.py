"""Load a checkpoint's tensors into a model, one at a time.

Ranks take turns: each reads (and quantizes) its part of the checkpoint and broadcasts it, so that
every tensor is read once, however many ranks there are. A received tensor becomes a ZeRO-3 shard,
or is kept whole, before the next one comes. No file is memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lorasb_ds.distributed import accelerator
from lorasb_ds.distributed.collectives import Group, all_reduce, broadcast, rank_and_size
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.models.experts import ExpertsLinear
from lorasb_ds.models.quantization import ROW_MULTIPLE, PackedLinear
from lorasb_ds.models.tensor_reader import TensorReader
from lorasb_ds.models.weight_map import WeightSource
from lorasb_ds.system.host_memory import release_freed_memory


def stream_weights(
    model: Any,
    sources: Sequence[WeightSource],
    stored: Mapping[str, StoredTensor],
    shard: Callable[[nn.Parameter], None] | None,
    group: Group = None,
) -> None:
    """Fill every parameter and stored buffer of a model. Collective.

    Beside its share, a rank holds the tensor that it reads or quantizes, one that it receives, and
    a few rows.

    Args:
        model: with parameters on the meta device, in the dtypes wanted; with ``PackedLinear``
            layers where weights are quantized.
        sources: of ``map_weights``.
        stored: the checkpoint's tensors.
        shard: partitions a parameter, whose whole value every rank has, over the ranks; None: it is
            kept whole.
    Raises:
        ConfigError: on every rank alike, if one of them cannot read its part. (A rank without
            memory for what it receives fails alone; the launcher ends the others.)
    Communication: one broadcast of every tensor; one all-reduce of an integer for every
        ``world_size`` tensors.
    """
    rank, world_size = rank_and_size(group)
    # Largest first: the ranks' turns are about equally long, and memory is still free.
    sources = sorted(sources, key=lambda s: -sum(stored[k].end - stored[k].begin for k in s.keys))
    with closing(TensorReader(stored)) as reader:
        for first in range(0, len(sources), world_size):
            wave = sources[first : first + world_size]
            mine = wave[rank] if rank < len(wave) else None
            values, problem = _try_to_read(model, mine, reader)
            _raise_together(problem, group)
            for owner, source in enumerate(wave):
                for name in source.targets:
                    place = parameter_name(model, name)
                    if owner == rank:
                        value = values.pop(name)
                    else:
                        value = torch.empty_like(_get(model, place), device=accelerator.device())
                    placed = put(model, place, broadcast(value, owner, group))
                    del value
                    if shard is not None and isinstance(placed, nn.Parameter):
                        shard(placed)
            release_freed_memory()


def _try_to_read(
    model: Any, source: WeightSource | None, reader: TensorReader
) -> tuple[dict[str, torch.Tensor], str | None]:
    """Return what ``_read`` does, {} without a source; and what went wrong, None if nothing."""
    if source is None:
        return {}, None
    try:
        return _read(model, source, reader), None
    except (ValueError, KeyError, RuntimeError) as error:
        problem, key = str(error), source.keys[0]
        if key not in problem:
            problem = f"{key} in {reader.stored[key].file.name}: {problem}"
        return {}, problem


def _read(model: Any, source: WeightSource, reader: TensorReader) -> dict[str, torch.Tensor]:
    """Return target -> value, as the model holds it."""
    target, key = next(iter(source.targets)), source.keys[0]
    if (experts := experts_layer(model, target)) is not None:
        return {target: _read_experts(model, source, experts, reader)}
    if source.converter is not None:
        dtype = _get(model, target).dtype
        found = source.convert(model, lambda key: reader.read(key, dtype))
        return {name: _settled(model, name, tensor) for name, tensor in found.items()}
    layer = _packed_layer(model, target)
    for copy in source.copies:
        if not _equal(reader, key, copy):
            raise ValueError(
                f"{copy} differs from {key}, but config.json ties them. If both are meant, set "
                "tie_word_embeddings to false there"
            )
    if layer is None:
        return {target: reader.read(key, _get(model, target).dtype)}
    if source.beside:
        beside = {name: reader.read(key) for name, key in source.beside.items()}
        return {target: layer.pack_stored(reader.read(key), beside)}
    if layer.stored_transposed:
        return {target: _settled(model, target, reader.read(key, layer.dtype).T.contiguous())}
    return {target: layer.quantize(reader.rows(key, layer.dtype, ROW_MULTIPLE))}


def _read_experts(
    model: Any, source: WeightSource, layer: ExpertsLinear, reader: TensorReader
) -> torch.Tensor:
    """Return the value of an experts' projection, read one expert at a time where that is possible.

    It is where the checkpoint stores the experts' matrices by themselves, or as the model has them.
    """
    weight, dtype = layer.empty_weight(accelerator.device()), layer.dtype

    def convert(part: WeightSource) -> torch.Tensor:
        (found,) = part.convert(model, lambda key: reader.read(key, dtype)).values()
        return found

    by_expert = source.by_expert(layer.num_experts)
    whole = None if source.converter is None or by_expert else convert(source)
    for expert in range(layer.num_experts):
        if by_expert:
            W = convert(by_expert[expert])[0]
        elif whole is not None:
            W = whole[expert]
        else:
            W = reader.expert(source.keys[0], expert, dtype)
        layer.set_expert(weight, expert, W.T if layer.stored_transposed else W)
    return weight


def _equal(reader: TensorReader, key: str, other: str) -> bool:
    if reader.stored[key].shape != reader.stored[other].shape:
        return False
    pairs = zip(reader.rows(key, None), reader.rows(other, None), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _settled(model: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Cast or quantize a whole tensor to the form in which the model holds it."""
    layer = _packed_layer(model, name)
    if layer is None:
        return tensor.to(_get(model, name).dtype).contiguous()
    return layer.quantize_whole(tensor)


def experts_layer(model: nn.Module, name: str) -> ExpertsLinear | None:
    """Return the layer that ``split_experts`` has made of a parameter of transformers' model."""
    module, _, leaf = name.rpartition(".")
    layer = getattr(model.get_submodule(module), leaf)
    return layer if isinstance(layer, ExpertsLinear) else None


def parameter_name(model: nn.Module, name: str) -> str:
    """Return the name of a parameter of transformers' model after ``split_experts``."""
    return name if experts_layer(model, name) is None else f"{name}.weight"


def _packed_layer(model: nn.Module, name: str) -> PackedLinear | None:
    module, _, leaf = name.rpartition(".")
    layer = model.get_submodule(module)
    return layer if isinstance(layer, PackedLinear) and leaf == "weight" else None


def _get(model: nn.Module, name: str) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf)


def put(model: nn.Module, name: str, value: torch.Tensor) -> torch.Tensor:
    """Set a parameter or buffer of any shape by name; a plain tensor becomes a frozen parameter."""
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if leaf in module._buffers:
        module._buffers[leaf] = value
        return value
    if not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    module._parameters[leaf] = value
    return value


def _raise_together(problem: str | None, group: Group) -> None:
    """Raise ConfigError on every rank if one has a problem. Collective."""
    failed = torch.tensor(int(problem is not None), device=accelerator.device())
    if not all_reduce(failed, group).item():
        return
    problems = [problem]
    if (world_size := rank_and_size(group)[1]) > 1:
        problems = [None] * world_size
        dist.all_gather_object(problems, problem, group=group)
    raise ConfigError(f"The base cannot be loaded: {next(filter(None, problems))}")
