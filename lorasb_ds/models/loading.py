"""The base: its configuration, its shapes, and its frozen weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D

from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.distributed import accelerator, zero
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import StoredTensor, first_line, model_folder, stored_tensors
from lorasb_ds.models.linear_layers import layer_shape, linear_layers
from lorasb_ds.models.quantization import Kind, PackedLinear, PackedLinear4bit, PackedLinear8bit
from lorasb_ds.models.streaming import TensorReader, put, stream_weights
from lorasb_ds.models.weight_map import Source, map_weights

# What transformers raises for a config.json that makes no sense.
BROKEN_CONFIG = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a causal language model.

    Raises:
        ConfigError: if there is none, no network to get it, or it is another kind of model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    folder = model_folder(model, trust_remote_code)
    try:
        # Without an answer transformers would ask on the console.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (*BROKEN_CONFIG, OSError, StrictDataclassError) as error:
        remedy = "It must be a model that transformers knows."
        if "trust_remote_code" in str(error):
            remedy = (
                "If you trust that code, give --trust-remote-code; --config and --resume do not "
                "take it over from an earlier run."
            )
        raise ConfigError(
            f"--model {model} cannot be read: {first_line(error)} {remedy}"
        ) from error
    stored_quantization(config, model)
    architectures = config.architectures or []
    causal = all(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (own_code and trust_remote_code)
    if not (known and causal):
        raise ConfigError(
            f"--model {model} is a {', '.join(architectures) or type(config).__name__}, not a "
            "causal language model (…ForCausalLM). Only those can be trained so far."
        )
    return config


def stored_quantization(hf_config: Any, model: str) -> Kind | None:
    """How the base's files are quantized; None if they are not.

    Raises:
        ConfigError: if it was not by bitsandbytes.
    """
    found = getattr(hf_config, "quantization_config", None)
    if not found:
        return None
    if not isinstance(found, dict):
        found = found.to_dict() if hasattr(found, "to_dict") else {"quant_method": found}
    if found.get("load_in_4bit"):
        return "4bit"
    if found.get("load_in_8bit"):
        return "8bit"
    raise ConfigError(
        f"--model {model} is quantized by {found.get('quant_method')}; of quantized bases only "
        "those of bitsandbytes can be trained. Give the base it was made from; --load-in-4bit "
        "quantizes it."
    )


def base_config(config: RunConfig) -> tuple[Any, RunConfig, Kind | None]:
    """What the options and the files say of a base together.

    Returns:
        The transformers configuration; the options; and how the files are quantized, None if not.
    Raises:
        ConfigError: as ``load_config``, and where the options ask for another quantization.
    """
    hf_config = load_config(config.model, config.trust_remote_code)
    if config.attn_implementation is not None:
        hf_config._attn_implementation = config.attn_implementation
    stored = stored_quantization(hf_config, config.model)
    return hf_config, _with_stored_quantization(config, stored), stored


def _with_stored_quantization(config: RunConfig, stored: Kind | None) -> RunConfig:
    """A base that is quantized in its files is taken as it is."""
    if stored is None:
        return config
    asked = {"load_in_4bit": config.load_in_4bit, "load_in_8bit": config.load_in_8bit}
    if any(given for name, given in asked.items() if name != f"load_in_{stored}"):
        raise ConfigError(
            f"--model {config.model} is quantized already, to {stored[0]} bits. Leave out "
            "--load-in-4bit and --load-in-8bit, or give the base it was made from."
        )
    return config.model_copy(update={f"load_in_{stored}": True})


def empty_model(hf_config: Any, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """The model without its weights: parameters on the meta device, buffers real.

    Args:
        dtype: of all floating parameters but those that the model keeps in fp32.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except BROKEN_CONFIG as error:
        raise ConfigError(
            f"transformers cannot make the model of {hf_config.name_or_path}: "
            f"{type(error).__name__}: {first_line(error)} Look at its config.json."
        ) from error
    model.tie_weights()  # the context above has given tied parameters one object each
    if fp32 := list(model._get_dtype_plan(dtype)):
        pattern, *_ = build_glob_alternation(fp32)
        for name, value in model.state_dict().items():
            if pattern.search(name):
                put(model, name, value.float())
    return model


def load_base(config: RunConfig, hf_config: Any, ds_config: dict[str, Any]) -> Any:
    """The frozen base where the run wants it: plain, 8-bit or 4-bit; whole, or in ZeRO-3 shards.

    Collective. Each rank reads a part of the checkpoint, which the others get from it; see
    ``streaming`` for what is in memory meanwhile. transformers' own ways read the whole model into
    the memory of rank 0 (ZeRO-3) or of every rank (quantized).

    Raises:
        ConfigError: on every rank alike, if the files are not those of the model.
    """
    model = empty_model(hf_config, DTYPES[config.dtype], config.trust_remote_code)
    kind: Kind | None = "4bit" if config.load_in_4bit else "8bit" if config.load_in_8bit else None
    _fill(model, config.model, kind, zero.sharder(ds_config))
    if config.gradient_checkpointing:
        # The reentrant kind needs inputs that require grad, which a frozen embedding's do not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers lets them require grad with either kind: a backward pass of the first block's
        # inputs for nothing, for which ZeRO-3 would gather the embedding.
        model.disable_input_require_grads()
    model.requires_grad_(False)
    return model


def _fill(
    model: Any, name: str, kind: Kind | None, shard: Callable[[nn.Parameter], None] | None
) -> None:
    """All weights of an empty model, from its files. Collective."""
    stored = stored_tensors(name)
    sources = map_weights(model, stored, name)
    dtype = model.get_input_embeddings().weight.dtype
    if any(source.beside for source in sources):
        _pack_as_stored(model, sources, stored, dtype)
    elif kind is not None:
        for layer in linear_layers(model):
            _pack_layer(model, layer, kind, dtype)
    stream_weights(model, sources, stored, shard)
    for parameter, twin in model.all_tied_weights_keys.items():
        put(model, parameter, model.get_parameter(twin))
    for buffer, value in list(model.named_buffers(remove_duplicate=False)):
        put(model, buffer, value.to(accelerator.device()))


def _pack_as_stored(
    model: nn.Module,
    sources: Sequence[Source],
    stored: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> None:
    """Packed layers for the weights that bitsandbytes has quantized, and for no others."""
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
        options: of ``PackedLinear4bit``.
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
            f"The base cannot be loaded: {key} is of a weight of shape {tuple(shape)}, where the "
            f"model of config.json has {sides}. Fetch the files again."
        )
