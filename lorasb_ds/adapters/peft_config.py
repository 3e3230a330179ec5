"""PEFT's adapter_config.json: check for a plain LoRA, read its scaling, find what PEFT misreads.

Torch-free, except for ``peft_warning`` and ``misread_by_peft``, which import PEFT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

    Raises:
        ConfigError: if alpha_pattern holds regular expressions, or alpha is not a number.
    """
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(set(p) & set("\\^$*+?()[]{}|") for p in patterns):
        raise ConfigError(
            f"{folder}: alpha_pattern in {ADAPTER_CONFIG} must name layers; regular expressions "
            "are not supported."
        )
    named = [p for p in patterns if layer == p or layer.endswith(f".{p}")]
    alpha = patterns[named[0]] if named else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise ConfigError(f"{folder}: lora_alpha {alpha!r} in {ADAPTER_CONFIG} is not a number.")
    return float(alpha / max(1, r) ** (0.5 if config.get("use_rslora") else 1))


def misread_by_peft(model_type: str | None, layers: Iterable[str]) -> list[str]:
    """Return the layers whose factors PEFT would drop when it loads a plain LoRA of these layers.

    Since transformers 5, experts are 3-D parameters. To load adapters made before, PEFT takes
    targets of certain names for those parameters in some model families, including dense and
    shared layers of the same names, however target_modules spells them.

    Args:
        model_type: of the base's config.json; None: any of these families.
        layers: names of the adapter's layers.
    """
    named = list(layers)
    try:
        from peft.utils import transformers_weight_conversion as peft
    except ImportError:  # an earlier PEFT, or transformers 4, which has no such experts
        return []
    # Private names of PEFT, which a test checks: without them this finds nothing.
    families: Mapping[str, str] = getattr(peft, "_MODEL_TO_CONVERSION_PATTERN", {})
    mappings: Mapping[str, Mapping[str, str]] = getattr(peft, "_MOE_TARGET_MODULE_MAPPING", {})
    if model_type is not None:
        mappings = {"": mappings.get(families.get(model_type, ""), {})}
    # A target that maps to its own weight (a router called "gate") is read correctly.
    taken = {
        old
        for mapping in mappings.values()
        for old, new in mapping.items()
        if new != f"{old}.weight"
    }
    return [name for name in named if name.rpartition(".")[2] in taken]


def peft_warning(model_type: str | None, layers: Iterable[str], base: str | None) -> str | None:
    """Return a warning if PEFT would misread a plain LoRA of these layers, else None.

    Args:
        model_type: of the base's config.json; None if that is not available.
        layers: names of the adapter's layers.
        base: the base's name in the adapter.
    """
    named = list(layers)
    if not (misread := misread_by_peft(model_type, named)):
        return None
    some = ", ".join(misread[:3])
    count = f"{len(misread)} of {len(named)} layers, such as {some}"
    if model_type is None:
        return (
            f"PEFT may not read {count}: it takes their names for those of experts if the base is "
            f"a mixture of experts such as DeepSeek-V3, and the config.json of "
            f"{base or 'the base'}, which would say so, is not available. With such a base use "
            "`lorasb merge` instead of PEFT."
        )
    return (
        f"PEFT will not read {count}: in a {model_type} it takes their names for those of experts, "
        "and drops them or rejects the adapter. Use `lorasb merge` instead of PEFT."
    )
