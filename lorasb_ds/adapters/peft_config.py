"""PEFT's adapter_config.json: whether it describes a plain LoRA, its scaling, and what PEFT takes
its layers for. Torch-free, but for ``peft_warning``, which looks into PEFT itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import ADAPTER_CONFIG
from lorasb_ds.errors import ConfigError

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
            f"{ADAPTER_CONFIG} makes something else than a plain LoRA. Merge such an adapter by "
            "PEFT."
        )


def scale_of(folder: Path, config: Mapping[str, Any], layer: str, r: int) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA), of a layer."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(set(p) & set("\\^$*+?()[]{}|") for p in patterns):
        raise ConfigError(
            f"{folder}: alpha_pattern in {ADAPTER_CONFIG} must name layers; patterns are not read."
        )
    named = [p for p in patterns if layer == p or layer.endswith(f".{p}")]
    alpha = patterns[named[0]] if named else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e9:
        raise ConfigError(f"{folder}: lora_alpha {alpha!r} in {ADAPTER_CONFIG} is no number.")
    return float(alpha / max(1, r) ** (0.5 if config.get("use_rslora") else 1))


def misread_by_peft(model_type: str | None, layers: Iterable[str]) -> list[str]:
    """The layers whose factors PEFT would leave out when it loads a plain LoRA of them.

    Since transformers 5, experts are 3-D parameters. That adapters made before still load, PEFT
    takes targets by certain names for those parameters in some families of models, and with them
    the dense and shared layers of the same names, however target_modules spells them.

    Args:
        model_type: of the base's config.json; None: what any family of them would come to.
    """
    named = list(layers)
    try:
        from peft.utils import transformers_weight_conversion as peft
    except ImportError:  # an earlier PEFT, or transformers 4, which has no such experts
        return []
    # Private names, which the tests hold on to: without them nothing is known of this PEFT.
    families: Mapping[str, str] = getattr(peft, "_MODEL_TO_CONVERSION_PATTERN", {})
    mappings: Mapping[str, Mapping[str, str]] = getattr(peft, "_MOE_TARGET_MODULE_MAPPING", {})
    if model_type is not None:
        mappings = {"": mappings.get(families.get(model_type, ""), {})}
    # What is taken for its own weight (a router called "gate") is read all the same.
    taken = {
        old
        for mapping in mappings.values()
        for old, new in mapping.items()
        if new != f"{old}.weight"
    }
    return [name for name in named if name.rpartition(".")[2] in taken]


def peft_warning(model_type: str | None, layers: Iterable[str], base: str | None) -> str | None:
    """What a user must know before PEFT loads a plain LoRA of these layers; None if nothing.

    Args:
        model_type: of the base's config.json; None if that is not at hand.
        base: as the adapter names it.
    """
    named = list(layers)
    if not (misread := misread_by_peft(model_type, named)):
        return None
    some = ", ".join(misread[:3])
    count = f"{len(misread)} of {len(named)} layers, such as {some}"
    if model_type is None:
        return (
            f"PEFT may not read {count}: it takes their names for those of experts if the base is "
            f"a mixture of experts such as DeepSeek-V3, and config.json of {base or 'the base'} is "
            "not here to tell. Of such a base use the adapter by `lorasb merge`, not by PEFT."
        )
    return (
        f"PEFT will not read {count}: in a {model_type} it takes their names for those of experts, "
        "and leaves them out or refuses the adapter. Use it by `lorasb merge`, not by PEFT."
    )
