"""Adapters of experts in PEFT's files: LoRA on 3-D parameters, by ``target_parameters``.

Since transformers 5, a block's experts are 3-D parameters of one module: ``gate_up_proj`` (or
``up_proj``) and ``down_proj``. PEFT's ``ParamWrapper`` (peft/tuners/lora/layer.py) adapts one
parameter, and holds a LoRA of all its experts in two matrices:

    lora_A (num_experts * r, in)    the rows of one expert follow those of the one before
    lora_B (out, r * num_experts)   the columns of direction 1 of all experts come first

Whether the parameter is (num_experts, out, in) or (num_experts, in, out), ``in`` and ``out`` are
those of y = W x, if the module says by ``is_transposed`` which of them it is. The experts of
Llama 4 do not say it: PEFT then takes ``in`` for ``out``, and is given ``ExpertPair.swapped``.

Several parameters of a module have nested wrappers. The parameter that the module registered first
has the innermost one: gate_up_proj is under ``experts.base_layer``, down_proj under ``experts``. A
parameter that is the only one with an adapter is under ``experts``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lorasb_ds.adapters.peft_config import PREFIX, rank_of, scale_of
from lorasb_ds.adapters.peft_targets import MOVED_NAMES, TargetFields
from lorasb_ds.config.run_layout import ADAPTER_CONFIG
from lorasb_ds.errors import ConfigError

INNER = ".base_layer"
# In the order in which all modules of transformers 5.23 register them, which a test checks.
REGISTERED = ("gate_up_proj", "up_proj", "down_proj")


class ExpertPair(NamedTuple):
    """``ΔW[e] = B[e] @ A[e]`` (out, in) of the experts of one parameter."""

    A: torch.Tensor  # (num_experts, r, in)
    B: torch.Tensor  # (num_experts, out, r)

    def swapped(self) -> ExpertPair:
        """Return the pair of the transposed updates."""
        return ExpertPair(self.B.mT, self.A.mT)


@dataclass(frozen=True)
class StoredExperts:
    """Where a folder has the LoRA of an expert parameter.

    Attributes:
        layer: before ``.lora_A.weight`` and ``.lora_B.weight``, without PEFT's prefix.
        r: of one expert.
        scale: multiplies ``B A``.
    """

    layer: str
    num_experts: int
    r: int
    scale: float

    def pair(self, A: torch.Tensor, B: torch.Tensor) -> ExpertPair:
        """Return the factors of each expert, as views of the stored matrices; without ``scale``."""
        by_expert = B.view(len(B), self.r, self.num_experts).permute(2, 0, 1)
        return ExpertPair(A.view(self.num_experts, self.r, -1), by_expert)


def expert_tensors(pairs: Mapping[str, ExpertPair]) -> dict[str, torch.Tensor]:
    """Return LoRAs of experts as tensors with PEFT's names.

    Args:
        pairs: name of the parameter (``model.layers.0.mlp.experts.down_proj``) -> its factors.
    Raises:
        ConfigError: if a module has several parameters whose order is not known.
    """
    tensors = {}
    for module, parameters in _by_module(pairs).items():
        ordered = _in_order(module, [parameter.rpartition(".")[2] for parameter in parameters])
        for i, leaf in enumerate(ordered):
            A, B = pairs[f"{module}.{leaf}"]
            layer = f"{PREFIX}{module}{INNER * (len(ordered) - 1 - i)}"
            tensors[f"{layer}.lora_A.weight"] = A.flatten(0, 1).contiguous()
            tensors[f"{layer}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1).contiguous()
    return tensors


def expert_fields(
    r: int,
    fields: TargetFields,
    ranks: Mapping[str, int],
    experts: Collection[str],
) -> TargetFields:
    """Return the fields of adapter_config.json of an adapter that has LoRAs of experts, too.

    Args:
        r: the rank of the other layers, and of adapter_config.json.
        fields: of the other layers, as from ``target_fields``.
        ranks: name of the parameter -> rank of each of its experts' LoRAs.
        experts: names of all expert parameters of the model.
    Returns:
        ``fields``, with ``target_parameters`` and, if other ranks than r occur, ``rank_pattern``,
        which is to be written as alpha_pattern too, so that scaling is 1.
    """
    parameters = [*fields.get("target_parameters", ()), *_short_names(ranks, experts)]
    found = TargetFields(
        target_modules=fields["target_modules"], target_parameters=sorted(parameters)
    )
    # PEFT says, wrongly, that it ignores patterns that match no module. So each matches a module,
    # too, whose rank the first pattern has given: of several patterns the first one counts.
    modules = fields["target_modules"][-1:]
    patterns: dict[str, int] = {}
    for rank in sorted({*ranks.values()} - {r}):
        patterns |= dict.fromkeys(modules, r)
        named = _short_names({name for name in ranks if ranks[name] == rank}, experts)
        patterns["|".join([*named, *modules])] = rank
    if patterns:
        found["rank_pattern"] = patterns
    return found


def find_experts(
    folder: Path, config: Mapping[str, Any], rows: Mapping[str, int]
) -> dict[str, StoredExperts]:
    """Return the expert parameters whose LoRAs a PEFT folder holds.

    Args:
        folder: for messages.
        config: the content of adapter_config.json, which ``check_plain`` accepts.
        rows: layer, without PEFT's prefix -> length of its lora_A.
    Returns:
        By the parameters' names. Layers that are in none of them are plain linear layers.
    Raises:
        ConfigError: if the tensors and the configuration do not match.
    """
    parameters = config.get("target_parameters")
    if not parameters:
        return {}
    modules, found = _by_depth(rows), {}
    for target in parameters:
        if not any(_selects(target, module) for module in modules):
            raise ConfigError(
                f"{folder}: target_parameters in {ADAPTER_CONFIG} name {target!r}, of which there "
                "is no LoRA in the file. Fetch it again."
            )
    for module, layers in modules.items():
        targets = [target for target in parameters if _selects(target, module)]
        if layers == [module] and _is_plain(folder, config, module, targets, rows[module]):
            continue
        leaves = {target.rpartition(".")[2] for target in targets}
        if len(leaves) != len(layers):
            raise ConfigError(
                f"{folder}: {module} has {len(layers)} LoRAs, and target_parameters in "
                f"{ADAPTER_CONFIG} name {len(leaves)} of its parameters. Fetch it again."
            )
        for layer, leaf in zip(layers, _in_order(module, leaves), strict=True):
            parameter = f"{module}.{leaf}"
            found[parameter] = _stored(folder, config, parameter, layer, rows[layer])
    return found


def _stored(
    folder: Path, config: Mapping[str, Any], parameter: str, layer: str, rows: int
) -> StoredExperts:
    r = rank_of(folder, config, parameter)
    if rows % r:
        raise ConfigError(
            f"{folder}: lora_A of {layer} has {rows} rows, which is no multiple of the rank {r} "
            f"that {ADAPTER_CONFIG} gives to it. Fetch it again."
        )
    return StoredExperts(layer, rows // r, r, scale_of(folder, config, parameter, r))


def _is_plain(
    folder: Path, config: Mapping[str, Any], module: str, targets: Sequence[str], rows: int
) -> bool:
    """Return whether a module's only LoRA is that of a linear layer."""
    if not any("." in target for target in targets):
        # A name alone selects every module that has such a parameter, which is not known here.
        return not targets or rows == rank_of(folder, config, module)
    is_weight = all(target.endswith(".weight") for target in targets)
    return is_weight and module.rpartition(".")[2] in MOVED_NAMES


def _by_module(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Return module -> its parameters among those given."""
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return modules


def _by_depth(layers: Iterable[str]) -> dict[str, list[str]]:
    """Return module -> its wrappers' layers, the innermost first."""
    modules: dict[str, list[str]] = {}
    for layer in sorted(layers, key=len, reverse=True):
        module = layer
        while module.endswith(INNER):
            module = module.removesuffix(INNER)
        modules.setdefault(module, []).append(layer)
    return modules


def _selects(target: str, module: str) -> bool:
    """Return whether an entry of target_parameters may select a parameter of a module."""
    parameter = f"{module}.{target.rpartition('.')[2]}"
    return parameter == target or parameter.endswith(f".{target}")


def _in_order(module: str, leaves: Collection[str]) -> list[str]:
    """Return names of parameters in the order in which a module registers them."""
    if len(leaves) > 1 and not set(leaves) <= set(REGISTERED):
        raise ConfigError(
            f"PEFT nests LoRAs in the order of a module's parameters, which is not known for "
            f"{', '.join(sorted(leaves))} of {module}; it is for {', '.join(REGISTERED)}. Merge "
            "such an adapter."
        )
    return sorted(leaves, key=lambda leaf: REGISTERED.index(leaf) if leaf in REGISTERED else 0)


def _short_names(names: Iterable[str], among: Collection[str]) -> list[str]:
    """Return the ends of names after the block's number, or whole names if others have that end.

    Args:
        among: all names.
    """
    others = {_after_number(name) for name in set(among) - set(names)}
    short = {name: _after_number(name) for name in names}
    return sorted({name if end in others else end for name, end in short.items()})


def _after_number(name: str) -> str:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)
