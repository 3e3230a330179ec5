"""Load a checkpoint's tensors into a model, one at a time.

Ranks take turns: each reads (and quantizes) its part of the checkpoint and broadcasts it, so that
every tensor is read once, however many ranks there are. A received tensor becomes a ZeRO-3 shard,
or is kept whole, before the next one comes. No file is memory-mapped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lorasb_ds.models.stored_formats import EncodedTensor
from lorasb_ds.models.weight_map import WeightSource
from lorasb_ds.system.host_memory import release_freed_memory

STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Elements that are read (and quantized) at a time. On a CPU bitsandbytes takes 14 bytes for each,
# and is fastest at this size.
CHUNK = 1 << 20


class TensorReader:
    """Reader of a checkpoint's tensors by ``pread``, a few rows at a time, to this rank's device.

    safetensors itself either maps the file, which counts as this process's memory and stays, or
    reads a whole tensor for every slice.

    All methods raise ValueError, naming tensor and file, if a tensor cannot be read, has an unknown
    dtype, or has a value that is not finite.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self._descriptors: dict[os.PathLike[str], int] = {}

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read a whole tensor in ``dtype``; None: as it is stored, with values not checked."""
        shape = self.stored[key].shape
        return self._joined(key, dtype, 0, _num_rows(shape)).view(shape)

    def expert(self, key: str, index: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one matrix (rows, columns) of a 3-D tensor, as ``read`` does, and no other."""
        count, height, _ = self.stored[key].shape
        assert 0 <= index < count
        return self._joined(key, dtype, index * height, (index + 1) * height)

    def rows(
        self, key: str, dtype: torch.dtype | None, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield chunks (rows, last dimension) of a tensor in order.

        Every chunk but the last has a multiple of ``multiple`` rows. A chunk's memory is
        overwritten by the next one.
        """
        return self._rows(key, dtype, 0, _num_rows(self.stored[key].shape), multiple)

    def _joined(self, key: str, dtype: torch.dtype | None, first: int, last: int) -> torch.Tensor:
        """Return some rows as one tensor (rows, last dimension)."""
        tensor = self.stored[key]
        kind = _dtype(key, tensor) if dtype is None else dtype
        size = (last - first, _width(tensor.shape))
        result, start = torch.empty(size, dtype=kind, device=accelerator.device()), 0
        for chunk in self._rows(key, dtype, first, last):
            if len(chunk) == len(result):
                return chunk  # none comes after it that would overwrite it
            result[start : start + len(chunk)] = chunk
            start += len(chunk)
        return result

    def _rows(
        self, key: str, dtype: torch.dtype | None, first: int, last: int, multiple: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield rows ``first`` to ``last`` of a tensor, as ``rows`` does."""
        tensor = self.stored[key]
        stored_dtype = _dtype(key, tensor)
        if dtype is not None and dtype.is_floating_point != stored_dtype.is_floating_point:
            raise ValueError(
                f"{key} in {tensor.file.name} is stored as {tensor.dtype}, but the model has "
                f"{dtype}"
            )
        if isinstance(tensor, EncodedTensor):
            chunks = self._decoded_rows(tensor, dtype or stored_dtype, first, last, multiple)
        else:
            chunks = self._plain_rows(key, dtype or stored_dtype, first, last, multiple)
        for chunk in chunks:
            if dtype is not None and not _is_finite(chunk):
                raise ValueError(
                    f"{key} in {tensor.file.name} holds values that are not finite in {dtype}"
                )
            yield chunk

    def _plain_rows(
        self, key: str, dtype: torch.dtype, first: int, last: int, multiple: int
    ) -> Iterator[torch.Tensor]:
        tensor = self.stored[key]
        width = _width(tensor.shape)
        row_bytes = (tensor.end - tensor.begin) // max(1, _num_rows(tensor.shape))
        step = _rows_at_a_time(width, multiple)
        buffer = accelerator.pinned_bytes(min(step, last - first) * row_bytes)
        for start in range(first, last, step):
            count = min(step, last - start)
            part = buffer[: count * row_bytes]
            self._fill(part, key, tensor, start * row_bytes)
            chunk = part.view(_dtype(key, tensor)).view(count, width)
            yield chunk.to(accelerator.device(), dtype)

    def _decoded_rows(
        self, tensor: EncodedTensor, dtype: torch.dtype, first: int, last: int, multiple: int
    ) -> Iterator[torch.Tensor]:
        def read(name: str, part: StoredTensor, begin: int, size: int) -> torch.Tensor:
            buffer = accelerator.pinned_bytes(size)
            self._fill(buffer, name, part, begin)
            return buffer

        assert not tensor.decoder.transposed or tensor.shape[-2] % multiple == 0
        step = _rows_at_a_time(tensor.decoder.sides[1], multiple)
        return tensor.decoder.chunks(read, first, last, step, dtype, accelerator.device())

    def _fill(self, buffer: torch.Tensor, key: str, tensor: StoredTensor, begin: int) -> None:
        """Read bytes of a tensor, from ``begin`` of its own on."""
        path, offset = tensor.file, tensor.begin + begin
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        try:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            while view:
                count = os.preadv(self._descriptors[path], [view], offset)
                if count == 0:
                    raise OSError("the file ends before it")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise ValueError(f"{key} in {path.name} cannot be read: {error}") from error


def _dtype(key: str, tensor: StoredTensor) -> torch.dtype:
    if tensor.dtype not in STORED_DTYPES:
        raise ValueError(
            f"{key} in {tensor.file.name} is stored as {tensor.dtype}; only "
            f"{', '.join(STORED_DTYPES)} are known"
        )
    return STORED_DTYPES[tensor.dtype]


def _num_rows(shape: Sequence[int]) -> int:
    return math.prod(shape[:-1])


def _width(shape: Sequence[int]) -> int:
    return shape[-1] if shape else 1


def _rows_at_a_time(width: int, multiple: int) -> int:
    return max(1, CHUNK // max(1, width) // multiple) * multiple


def _is_finite(values: torch.Tensor) -> bool:
    if not values.is_floating_point() or not values.numel():
        return True
    # The bounds are NaN if any value is; no boolean tensor is made.
    return all(math.isfinite(bound.item()) for bound in values.aminmax())


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
                    if owner == rank:
                        value = values.pop(name)
                    else:
                        parameter = _get(model, parameter_name(model, name))
                        value = torch.empty_like(parameter, device=accelerator.device())
                    placed = put(model, parameter_name(model, name), broadcast(value, owner, group))
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

    one_by_one = source.stores_experts(layer.num_experts)
    whole = None if source.converter is None or one_by_one else convert(source)
    for expert in range(layer.num_experts):
        if one_by_one:
            W = convert(source.of_expert(expert))[0]
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
    return layer.quantize(tensor.split(_rows_at_a_time(layer.in_features, ROW_MULTIPLE)))


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
