"""The base's frozen weights: from its files to where the run wants them, quantized or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.activation_offload import offload_activations
from lorasb_ds.models.base import Base
from lorasb_ds.models.checkpoint_files import StoredTensor, first_line
from lorasb_ds.models.classification import new_parameter
from lorasb_ds.models.experts import split_experts
from lorasb_ds.models.linear_layers import layer_shape, linear_layers
from lorasb_ds.models.quantization import Kind, PackedLinear, PackedLinear4bit, PackedLinear8bit
from lorasb_ds.models.streaming import put, stream_weights
from lorasb_ds.models.tensor_reader import TensorReader
from lorasb_ds.models.weight_map import WeightSource

DEFAULT_RANGE = 0.02  # standard deviation of new weights, if config.json has no initializer_range
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_base(base: Base, config: RunConfig, ds_config: dict[str, Any]) -> Any:
    """Load the frozen base: plain, 8-bit or 4-bit; whole, or in ZeRO-3 shards. Collective.

    Each rank reads a part of the checkpoint and broadcasts it; see ``streaming`` for what is in
    memory meanwhile. transformers' own ways read the whole model into the memory of rank 0 (ZeRO-3)
    or of every rank (quantized).

    Args:
        base: its files.
        config: dtype, quantization and activation checkpointing.
        ds_config: decides whether parameters are sharded.
    Raises:
        ConfigError: on every rank alike, if the files are not those of the model.
    """
    model = base.empty_model(DTYPES[config.dtype])
    kind: Kind | None = "4bit" if config.load_in_4bit else "8bit" if config.load_in_8bit else None
    shard = zero.sharder(ds_config)
    _fill(model, base, kind, shard)
    _fill_head(model, base.new_parameters, config.seed_of_init, shard)
    if config.gradient_checkpointing:
        # The reentrant kind needs inputs that require grad, which a frozen embedding's do not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers lets them require grad with either kind: a backward pass of the first block's
        # inputs for nothing, for which ZeRO-3 would gather the embedding.
        model.disable_input_require_grads()
    if config.activation_offload:
        offload_activations(model)
    model.requires_grad_(False)
    return model


def _fill(
    model: Any, base: Base, kind: Kind | None, shard: Callable[[nn.Parameter], None] | None
) -> None:
    """Fill all weights of an empty model from its files. Collective."""
    stored, sources = base.stored, base.sources
    dtype = model.get_input_embeddings().weight.dtype
    as_stored = any(source.beside for source in sources)  # experts are stored unquantized then
    split_experts(model, dtype, None if as_stored else kind)
    if as_stored:
        _pack_as_stored(model, sources, stored, dtype)
    elif kind is not None:
        for layer in linear_layers(model):
            _pack_layer(model, layer, kind, dtype)
    stream_weights(model, sources, stored, shard)
    for parameter, twin in model.all_tied_weights_keys.items():
        put(model, parameter, model.get_parameter(twin))
    for buffer, value in list(model.named_buffers(remove_duplicate=False)):
        put(model, buffer, value.to(accelerator.device()))


def _fill_head(
    model: Any, names: Sequence[str], seed: int, shard: Callable[[nn.Parameter], None] | None
) -> None:
    """Fill the parameters of a classification head that the files do not have.

    By the seed of the init, whose gradient depends on them.
    """
    std = getattr(model.config.get_text_config(), "initializer_range", None) or DEFAULT_RANGE
    for name in names:
        empty = model.get_parameter(name)
        value = new_parameter(name, empty.shape, empty.dtype, std, seed)
        placed = put(model, name, value.to(accelerator.device()))
        if shard is not None and isinstance(placed, nn.Parameter):
            shard(placed)


def _pack_as_stored(
    model: nn.Module,
    sources: Sequence[WeightSource],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> None:
    """Put packed layers in the place of those that bitsandbytes has quantized, and of no others."""
    for source in sources:
        if not source.beside:
            continue
        (target,) = source.targets
        name = target.removesuffix(".weight")
        state = next((k for n, k in source.beside.items() if n.startswith("quant_state")), None)
        if state is None:
            _pack_layer(model, name, "8bit", dtype)
            _check_sides(model, name, stored[source.keys[0]].shape, source.keys[0])
            continue
        try:
            with closing(TensorReader(stored)) as reader:
                described = json.loads(bytes(reader.read(state).cpu().numpy()))
            shape = described["shape"]
            _pack_layer(
                model,
                name,
                "4bit",
                dtype,
                quant_type=described["quant_type"],
                blocksize=described["blocksize"],
                nested="nested_blocksize" in described,
                stored_dtype=getattr(torch, described["dtype"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"The base cannot be loaded: {state} in {stored[state].file.name} does not say "
                f"how its weight is quantized: {first_line(error)} Fetch the file again."
            ) from error
        _check_sides(model, name, shape, state)


def _pack_layer(
    model: nn.Module, name: str, kind: Kind, dtype: torch.dtype, **options: Any
) -> None:
    """Put an empty packed layer in the place of a linear one (``nn.Linear``, ``Conv1D``).

    Args:
        options: keyword arguments of ``PackedLinear4bit``.
    """
    layer: Any = model.get_submodule(name)
    out_features, in_features = layer_shape(layer)
    packed: PackedLinear
    if kind == "4bit":
        packed = PackedLinear4bit(in_features, out_features, layer.bias, dtype, **options)
    else:
        packed = PackedLinear8bit(in_features, out_features, layer.bias, dtype)
    packed.stored_transposed = isinstance(layer, Conv1D)
    model.set_submodule(name, packed)


def _check_sides(model: nn.Module, name: str, shape: Sequence[int], key: str) -> None:
    sides = layer_shape(model.get_submodule(name))
    if tuple(shape) != sides:
        raise ConfigError(
            f"The base cannot be loaded: {key} is of a weight of shape {tuple(shape)}, but the "
            f"model of config.json has {sides}. Fetch the files again."
        )
