"""Find the stored tensors of a base that an adapter changes, and check that the two match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorasb_ds.errors import ConfigError
from lorasb_ds.export.expert_weights import WeightPart, expert_parts
from lorasb_ds.export.merge_file import FileJob
from lorasb_ds.export.merge_update import FLOATS, Update
from lorasb_ds.export.stored_adapter import StoredAdapter
from lorasb_ds.models.base import Base
from lorasb_ds.models.checkpoint_files import StoredTensor
from lorasb_ds.models.linear_layers import layer_shape, linear_layers
from lorasb_ds.models.weight_map import WeightSource

QUANTIZATION = "quantization_config"


def plan_merge(
    adapter: StoredAdapter, base: Base, partial: Path, load_in_4bit: bool
) -> tuple[list[FileJob], dict[str, Any] | None]:
    """Plan a merge.

    Args:
        partial: the folder that is written into.
    Returns:
        A job for every file of the base; and the fields to set in config.json (None: to leave out),
        None if none.
    Raises:
        ConfigError: if the adapter does not match the base.
    """
    name, model, stored, sources = base.name, base.model, base.stored, _sources(base)
    updates: dict[str, list[Update | None]] = {}
    parts = parts_of_experts(adapter, base)
    for layer, factors in adapter.layers.items():
        if factors.offset is not None or factors.kept:
            what = "an offset" if factors.offset is not None else "updates in earlier bases"
            raise ConfigError(
                f"{adapter.path}: the adapter of {layer} has {what}. "
                + (
                    "Let the run end, and merge its folder."
                    if adapter.head
                    else "Fold it in by `lorasb export` first, and merge what that writes."
                )
            )
        A, B = adapter.stored[factors.A], adapter.stored[factors.B]
        R = adapter.stored[factors.R] if factors.R is not None else None
        if factors.expert is None:
            key = _changed(model, layer, adapter.shapes[layer], sources, stored, name)
            transposed = isinstance(model.get_submodule(layer), Conv1D)
            updates[key] = [Update(A, B, R, factors.scale, transposed)]
            continue
        for part in parts[layer]:
            matrices = stored[part.key].shape[0] if len(stored[part.key].shape) == 3 else 1
            of_key = updates.setdefault(part.key, [None] * matrices)
            of_key[part.matrix] = Update(
                A, B, R, factors.scale, part.transposed, factors.expert, part.rows
            )
    quantized: set[str] = set()
    # What is decoded is no longer quantized; what is quantized, is so in another way.
    config: dict[str, Any] | None = None if base.encoding is None else {QUANTIZATION: None}
    if load_in_4bit:
        layers = _layers_in_4bit(model, name)
        quantized = {_stored_weight(layer, sources, stored, name) for layer in layers}
        config = {QUANTIZATION: _quantization_config(base.whole_model, layers)}
    head, replaced = _head(adapter, base)
    if head:
        config = (config or {}) | _classifier_fields(base)
    jobs: list[FileJob] = []
    for file in sorted({tensor.file for tensor in stored.values()}):
        mine = {k: t for k, t in stored.items() if t.file == file and k not in replaced}
        jobs.append(
            FileJob(
                file,
                partial / file.relative_to(base.folder),
                mine,
                {key: updates[key] for key in sorted(updates.keys() & mine)},
                frozenset(quantized & mine.keys()),
                {} if jobs else head,
            )
        )
    return jobs, config


def base_of(adapter: StoredAdapter, model: str, trust_remote_code: bool) -> Base:
    """Return the base that an adapter is merged into: a classifier, if the adapter has a head.

    Raises:
        ConfigError: if the run that would say what the head's classes are is not there.
    """
    if not adapter.head:
        return Base(model, trust_remote_code)
    if adapter.classes is None:
        raise ConfigError(
            f"{adapter.path} is a classifier's, and what its classes are is in run.json of its "
            "run. Name the run's folder."
        )
    return Base(model, trust_remote_code, classifies=True, classes=adapter.classes)


def _head(adapter: StoredAdapter, base: Base) -> tuple[dict[str, StoredTensor], set[str]]:
    """Return a classifier's trained head, and the stored tensors of the base that it replaces."""
    head = {name: adapter.stored[key] for name, key in adapter.head.items()}
    shapes = {name: tuple(base.model.get_parameter(name).shape) for name in base.head}
    if {name: tuple(tensor.shape) for name, tensor in head.items()} != shapes:
        raise ConfigError(
            f"{adapter.path} has another head than --model {base.name} would have. Give the base "
            "that it was trained on."
        )
    prefix = base.model.base_model_prefix
    return head, {key for key in base.stored if key in head or f"{prefix}.{key}" in head}


def _classifier_fields(base: Base) -> dict[str, Any]:
    """Return what config.json says of a classifier."""
    config = base.model.config
    return {
        "architectures": [type(base.model).__name__],
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
        "pad_token_id": config.get_text_config().pad_token_id,
    }


def weights_of(
    adapter: StoredAdapter, model: str, trust_remote_code: bool = False
) -> dict[str, StoredTensor]:
    """Map the adapter's linear layers to their weights in the base's files.

    Raises like ``plan_merge``.
    """
    base = Base(model, trust_remote_code)
    sources = _sources(base)
    return {
        layer: base.stored[_changed(base.model, layer, shape, sources, base.stored, model)]
        for layer, shape in adapter.shapes.items()
        if layer not in adapter.experts
    }


def parts_of_experts(adapter: StoredAdapter, base: Base) -> dict[str, list[WeightPart]]:
    """Return expert's layer -> the stored parts of its weight. Raises like ``plan_merge``."""
    sources = _sources(base) if adapter.experts else {}
    found: dict[str, list[WeightPart]] = {}
    of_projection: dict[str, list[list[WeightPart]]] = {}
    for layer, expert in adapter.experts.items():
        projection, shape = expert.projection, adapter.shapes[layer]
        if projection not in of_projection:
            known = base.experts.get(projection)
            if known != (expert.count, *shape):
                raise ConfigError(
                    f"The adapter's {projection} is (experts, out, in) = {(expert.count, *shape)}; "
                    f"that of --model {base.name} is {known or 'not there'}. Give the base that it "
                    "was trained on."
                )
            of_projection[projection] = expert_parts(
                projection, known, sources[projection], base.model, base.stored, base.name
            )
        found[layer] = of_projection[projection][expert.number]
    return found


def _sources(base: Base) -> dict[str, WeightSource]:
    """Map the base's parameters -> their sources. Raises ConfigError for a quantized base."""
    if base.quantization is not None:
        raise _quantized_base(base.name, "its config.json says so")
    return {target: source for source in base.sources for target in source.targets}


def _changed(
    model: Any,
    layer: str,
    shape: tuple[int, int],
    sources: Mapping[str, WeightSource],
    stored: Mapping[str, StoredTensor],
    name: str,
) -> str:
    """Return the stored name of the weight that an adapter's layer changes."""
    _check_layer(model, layer, shape, name)
    return _stored_weight(layer, sources, stored, name)


def _check_layer(model: Any, layer: str, shape: tuple[int, int], name: str) -> None:
    try:
        module = model.get_submodule(layer)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D):
        what = "has no such layer" if module is None else f"has a {type(module).__name__} there"
        raise ConfigError(
            f"The adapter has factors for {layer}, but --model {name} {what}. Give the base that "
            "it was trained on."
        )
    if layer_shape(module) != shape:
        raise ConfigError(
            f"The adapter's {layer} is (out, in) = {shape}, but that of --model {name} is "
            f"{layer_shape(module)}. Give the base that it was trained on."
        )
    weight = module.weight
    twins = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if len(twins) > 1:
        raise ConfigError(
            f"The adapter has factors for {layer}, whose weight --model {name} ties to another "
            f"one ({', '.join(twins)}): both would change. Untie them (tie_word_embeddings) in a "
            "copy of the base first."
        )


def _stored_weight(
    layer: str,
    sources: Mapping[str, WeightSource],
    stored: Mapping[str, StoredTensor],
    name: str,
) -> str:
    """Return the stored name of a layer's weight, which must be one tensor of floats."""
    source = sources.get(f"{layer}.weight")
    if source is None or source.converter is not None:
        keys = "another weight" if source is None else ", ".join(source.keys[:3])
        raise ConfigError(
            f"--model {name}: transformers builds {layer}.weight from {keys}, and no stored tensor "
            "is that weight alone. Merge the adapter by PEFT's merge_and_unload."
        )
    (key,) = source.keys
    if source.beside:
        raise _quantized_base(name, f"{key} is")
    if stored[key].dtype not in FLOATS:
        raise ConfigError(
            f"--model {name}: {key} is stored as {stored[key].dtype}; {', '.join(FLOATS)} can be "
            "merged. Give the base that it was made from."
        )
    return key


def _quantized_base(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"--model {name} is quantized ({why}); an adapter must be added to the weights before "
        "rounding. Give the base that it was made from by --model."
    )


def _layers_in_4bit(model: Any, name: str) -> list[str]:
    """Return all linear layers but the head and those that the model keeps in fp32."""
    layers = linear_layers(model)
    if transposed := [n for n in layers if isinstance(model.get_submodule(n), Conv1D)]:
        raise ConfigError(
            f"--load-in-4bit: {transposed[0]} of --model {name} is a Conv1D, which is stored as "
            "(in, out). Merge without it; `--load-in-4bit` of train quantizes while it loads."
        )
    layers = {n: s for n, s in layers.items() if model.get_submodule(n).weight.dtype.itemsize == 2}
    if odd := [n for n, (rows, columns) in layers.items() if rows * columns % 2]:
        raise ConfigError(
            f"--load-in-4bit: {odd[0]} of --model {name} is {layers[odd[0]]}, an odd number of "
            "elements, and a byte holds two. Merge without it."
        )
    return list(layers)


def _quantization_config(model: Any, layers: Sequence[str]) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    others = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=sorted(others - {*layers}) or None,
    ).to_dict()
