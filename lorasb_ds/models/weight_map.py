"""Map from the tensors of a checkpoint to the parameters of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import StoredTensor

# Tensors that bitsandbytes stores beside a quantized weight, in 4 bits and in 8.
STATE_4BIT = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(nf4|fp4))$"
)
STATE_8BIT = re.compile(r"\.(SCB|weight_format)$")


@dataclass
class WeightSource:
    """The stored tensors that make one parameter (or buffer), or several that are stored as one.

    Attributes:
        targets: names in the model -> shapes.
        keys: names in the checkpoint.
        beside: for a quantized weight, bitsandbytes' names of the tensors beside its codes (absmax,
            SCB, …) -> names in the checkpoint.
        converter: transformers' own, for weights that it fuses, splits or permutes.
        patterns: the converter's, one for each key.
        copies: names in the checkpoint of parameters that the model ties to this one; their values
            must be equal.
    """

    targets: dict[str, torch.Size]
    keys: tuple[str, ...]
    beside: dict[str, str] = field(default_factory=dict)
    converter: Any = None
    patterns: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()

    def convert(self, model: nn.Module, read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
        """Return target -> tensor, by transformers' own operations."""
        transform, first = deepcopy(self.converter), next(iter(self.targets))
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            transform.add_tensor(first, key, pattern, partial(read, key))
        found = transform.convert(first, model=_Shapes(model, self.targets), config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in found.items()}

    def by_expert(self, num_experts: int) -> list[WeightSource] | None:
        """Return the sources of single experts, each of which converts to (1, rows, columns).

        None: the checkpoint does not store every expert's matrices by themselves.
        """
        if self.converter is None:
            return None
        groups: dict[str, list[str]] = {}
        for key, pattern in zip(self.keys, self.patterns, strict=True):
            groups.setdefault(pattern, []).append(key)
        if any(len(keys) != num_experts for keys in groups.values()):
            return None
        patterns = tuple(groups)
        targets = {name: torch.Size([1, *shape[1:]]) for name, shape in self.targets.items()}
        return [
            replace(self, targets=targets, keys=keys, patterns=patterns)
            for keys in zip(*groups.values(), strict=True)
        ]


class _Shapes:
    """A model for conversions, some of which look at shapes: those before layers are replaced."""

    def __init__(self, model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> torch.Tensor:
        if shape := self._shapes.get(name):
            return torch.empty(shape, device="meta")
        return self._model.get_parameter(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def map_weights(
    model: Any,
    stored: Mapping[str, StoredTensor],
    name: str,
    new: Collection[str] = (),
    optional: Collection[str] = (),
) -> list[WeightSource]:
    """Find the stored tensors that make every parameter and stored buffer of a model.

    Names are matched by transformers' renamings and fusions (of MoE experts into 3-D parameters,
    for example). Tensors that the model does not use are left out.

    Args:
        model: as transformers makes it, before any layer is replaced; may be on the meta device.
        stored: the checkpoint's tensors.
        name: the model's name, for messages.
        new: parameters that are not taken from the files, whatever these have.
        optional: parameters that the files may lack.
    Returns:
        One source for each parameter or fusion, except parameters that are tied to others.
    Raises:
        ConfigError: naming tensor and file, if one is missing, has another shape, or is quantized
            in an unknown way.
    """
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    beside = _beside_codes(stored)
    sources: dict[str, WeightSource] = {}
    for key in sorted(stored, key=dot_natural_key):
        if STATE_4BIT.search(key) or STATE_8BIT.search(key):
            continue
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = key, None
        if target not in state or target in new:
            continue
        if pattern is None:
            sources[target] = WeightSource(
                {target: state[target].shape}, (key,), beside.get(key, {})
            )
            continue
        if key in beside:
            raise ConfigError(
                f"--model {name}: {key} is quantized by itself, but transformers fuses it into "
                f"{target}. Give the base that it was made from."
            )
        source = sources.setdefault(target, WeightSource({target: torch.Size()}, ()))
        source.converter = by_pattern[pattern]
        source.keys += (key,)
        source.patterns += (pattern,)

    tied = {t: s for t, s in model.all_tied_weights_keys.items() if t in state}
    for target, twin in tied.items():
        found = sources.pop(target, None)
        if found is not None and twin in sources:
            sources[twin].copies += found.keys
        elif found is not None:  # stored under the other name
            sources[twin] = WeightSource({twin: state[twin].shape}, found.keys, found.beside)
    result = list(sources.values())
    for source in result:
        _check_shapes(model, source, state, stored, name)
    _check_complete(model, result, set(state) - {*tied, *new, *optional}, stored, name)
    return result


def unused_tensors(
    model: Any, sources: Sequence[WeightSource], stored: Mapping[str, StoredTensor]
) -> list[str]:
    """Return the stored tensors that the model does not use, except those known to be unused."""
    used = {key for s in sources for key in (*s.keys, *s.copies, *s.beside.values())}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    return [
        key for key in stored if key not in used and not any(re.search(p, key) for p in ignored)
    ]


def _beside_codes(stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, str]]:
    """Return quantized weight -> the tensors beside it, as ``WeightSource.beside``."""
    result: dict[str, dict[str, str]] = {}
    for key in stored:
        if match := STATE_4BIT.search(key):
            result.setdefault(key[: match.start()], {})[match[0][1:]] = key
        elif match := STATE_8BIT.search(key):
            result.setdefault(f"{key[: match.start()]}.weight", {})[match[1]] = key
    return result


def _check_shapes(
    model: Any,
    source: WeightSource,
    state: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
    name: str,
) -> None:
    """Check a source's shapes against the model's, and set the targets of a fusion."""
    files = ", ".join(sorted({stored[key].file.name for key in source.keys}))
    if source.converter is not None:
        try:
            found = source.convert(model, lambda key: torch.empty(stored[key].shape, device="meta"))
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise ConfigError(
                f"--model {name}: {source.keys[0]} and {len(source.keys) - 1} more in {files} "
                f"cannot be put together: {str(error).splitlines()[0]}"
            ) from error
        source.targets = {target: tensor.shape for target, tensor in found.items()}
    elif source.beside:
        _check_beside(source, files, name)
    else:
        source.targets = {next(iter(source.targets)): torch.Size(stored[source.keys[0]].shape)}
    for target, shape in source.targets.items():
        expected = state[target].shape if target in state else None
        if shape != expected:
            raise ConfigError(
                f"--model {name}: {source.keys[0]} in {files} makes {target} of shape "
                f"{tuple(shape)}, but the model of config.json has "
                f"{'none' if expected is None else tuple(expected)}. The files do not belong "
                "together; fetch them again."
            )


def _check_beside(source: WeightSource, files: str, name: str) -> None:
    """Refuse a quantized weight with tensors missing beside it; its codes may have any shape."""
    beside = set(source.beside)
    needed = {"SCB"}
    if not beside & {"SCB", "weight_format"}:
        state = {n for n in beside if n.startswith("quant_state.")}
        needed = {"absmax", "quant_map", *(state or {"quant_state.bitsandbytes__nf4"})}
        if beside & {"nested_absmax", "nested_quant_map"}:
            needed |= {"nested_absmax", "nested_quant_map"}
    if lost := sorted(needed - beside):
        raise ConfigError(
            f"--model {name}: {source.keys[0]} in {files} is quantized, but {', '.join(lost)} "
            "is missing beside it. Fetch the files again."
        )


def _check_complete(
    model: Any, sources: list[WeightSource], wanted: set[str], stored: Mapping[str, Any], name: str
) -> None:
    found = {target for source in sources for target in source.targets}
    parameters = {parameter for parameter, _ in model.named_parameters()}
    # Buffers that the model's own code makes need not be stored where it says so.
    ignored = [re.compile(p) for p in (model._keys_to_ignore_on_load_missing or [])]
    missing = sorted(
        target
        for target in wanted - found
        if target in parameters or not any(pattern.search(target) for pattern in ignored)
    )
    if missing:
        raise ConfigError(
            f"--model {name}: the files lack {len(missing)} weights of the model, such as "
            f"{', '.join(missing[:3])}. Is it a whole {type(model).__name__} checkpoint? (They "
            f"hold {len(stored)} tensors.)"
        )
