"""PEFT's adapter_config.json: check for a plain LoRA, read its ranks and scaling. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import ADAPTER_CONFIG
from lorasb_ds.errors import ConfigError

PREFIX = "base_model.model."  # before layers' names
# Fields that do not change the update of given factors. Any other field that is set makes another
# update than s B A, and is rejected.
HARMLESS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "runtime_config",
    "eva_config",
    "loftq_config",
    "qalora_group_size",
    "velora_config",
}
# Inits that do not change the base; PiSSA, OLoRA, CorDA and LoRA-GA do.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "bias": ("none",),
}
# Fields by which PEFT selects fewer layers than target_modules names.
NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Reject an adapter that is not ``W0 + s B A``.

    Args:
        folder: of the adapter, for messages.
        config: the content of adapter_config.json.
    Raises:
        ConfigError: naming the fields that make it another adapter than a plain LoRA.
    """
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA is supported. Merge "
            "such an adapter with PEFT."
        )
    known = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    parameters = config.get("target_parameters")
    if isinstance(parameters, list) and all(isinstance(name, str) for name in parameters):
        known.add("target_parameters")
    if config.get("task_type") == "SEQ_CLS":  # whose head is trained whole
        known.add("modules_to_save")
    unset: tuple[Any, ...] = (None, False, [], {})
    other = [
        name
        for name, value in config.items()
        if name not in HARMLESS and name not in known and value not in ALLOWED.get(name, unset)
    ]
    if other:
        raise ConfigError(
            f"{folder}: {', '.join(f'{name} = {config[name]!r}'[:80] for name in other)} in "
            f"{ADAPTER_CONFIG} makes it another adapter than a plain LoRA. Merge it with PEFT."
        )


def scale_of(folder: Path, config: Mapping[str, Any], layer: str, r: int) -> float:
    """Return a layer's scaling: alpha / r, or alpha / sqrt(r) (rsLoRA).

    Args:
        layer: name of a layer, or of a parameter with a LoRA of its own.
    Raises:
        ConfigError: if alpha_pattern holds regular expressions, or alpha is not a number.
    """
    alpha = _of_layer(folder, config, "alpha_pattern", layer, config.get("lora_alpha", 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise ConfigError(f"{folder}: lora_alpha {alpha!r} in {ADAPTER_CONFIG} is not a number.")
    return float(alpha / max(1, r) ** (0.5 if config.get("use_rslora") else 1))


def rank_of(folder: Path, config: Mapping[str, Any], layer: str) -> int:
    """Return the rank that adapter_config.json gives to a layer.

    Raises:
        ConfigError: if rank_pattern holds regular expressions, or the rank is no positive integer.
    """
    r = _of_layer(folder, config, "rank_pattern", layer, config.get("r", 8))
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"{folder}: r = {r!r} in {ADAPTER_CONFIG} is no positive integer.")
    return r


def _of_layer(folder: Path, config: Mapping[str, Any], field: str, layer: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a layer.

    PEFT's patterns are regular expressions. Names and alternatives of names are read, also with
    the prefix that PEFT gives to those of experts.
    """
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict) or any(map(_is_expression, patterns)):
        raise ConfigError(
            f"{folder}: {field} in {ADAPTER_CONFIG} must name layers; regular expressions are not "
            "supported."
        )
    for pattern, value in patterns.items():
        if any(layer == name or layer.endswith(f".{name}") for name in _alternatives(pattern)):
            return value
    return default


def _alternatives(pattern: str) -> list[str]:
    return [name.removeprefix(r".*\.") for name in pattern.split("|")]


def _is_expression(pattern: str) -> bool:
    return any(set(name) & set("\\^$*+?()[]{}") for name in _alternatives(pattern))
