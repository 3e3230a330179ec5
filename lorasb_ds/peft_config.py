"""PEFT's adapter_config.json: whether it describes a plain LoRA, and its scaling. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.config import ConfigError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of layers' names
# What a LoRA's update does not depend on, once its factors are there. Whatever else is set in an
# adapter_config.json makes another update than s B A, and is refused.
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
# Inits that leave the base as it is; PiSSA, OLoRA, CorDA and LoRA-GA do not.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "bias": ("none",),
}
# With these PEFT takes fewer layers than target_modules names.
NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is not ``W0 + s B A``."""
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA is known here. Merge "
            "such an adapter by PEFT."
        )
    known = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
    unset: tuple[Any, ...] = (None, False, [], {})
    other = [
        name
        for name, value in config.items()
        if name not in HARMLESS and name not in known and value not in ALLOWED.get(name, unset)
    ]
    if other:
        raise ConfigError(
            f"{folder}: {', '.join(f'{name} = {config[name]!r}'[:80] for name in other)} in "
            f"{CONFIG_FILE} makes something else than a plain LoRA. Merge such an adapter by PEFT."
        )


def scale_of(folder: Path, config: Mapping[str, Any], layer: str, r: int) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA), of a layer."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(set(p) & set("\\^$*+?()[]{}|") for p in patterns):
        raise ConfigError(
            f"{folder}: alpha_pattern in {CONFIG_FILE} must name layers; patterns are not read."
        )
    named = [p for p in patterns if layer == p or layer.endswith(f".{p}")]
    alpha = patterns[named[0]] if named else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise ConfigError(f"{folder}: lora_alpha {alpha!r} in {CONFIG_FILE} is no number.")
    return float(alpha / max(1, r) ** (0.5 if config.get("use_rslora") else 1))
