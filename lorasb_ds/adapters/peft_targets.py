"""How PEFT finds the layers of an adapter: the fields that name them, and what it misreads.

Answered by PEFT's and transformers' own tables, which are imported when a function is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NotRequired, TypedDict

# Linear layers that PEFT may move from target_modules to target_parameters: all that its table has.
MOVED_NAMES = ("down_proj", "gate", "gate_proj", "up_proj", "w1", "w2", "w3")

# Layers that PEFT refuses to give a LoRA in these families, whose kernels may read their weights.
REFUSED_NAMES = ("out_proj", "conv1d")
REFUSED_IN = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


class TargetFields(TypedDict):
    """The fields of adapter_config.json by which PEFT finds layers and parameters."""

    target_modules: list[str]
    target_parameters: NotRequired[list[str]]
    rank_pattern: NotRequired[dict[str, int]]


def misread_by_peft(model_type: str | None, layers: Iterable[str]) -> list[str]:
    """Return the layers that PEFT would take for experts if ``target_modules`` named them.

    Since transformers 5, experts are 3-D parameters. To load adapters made before, PEFT takes
    targets of certain names for those parameters in some model families, including dense and
    shared layers of the same names, however target_modules spells them.

    Args:
        model_type: of the base's config.json; None: any of these families.
        layers: names of layers, or the ends of such names.
    """
    named = list(layers)
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        if model_type is not None and not get_checkpoint_conversion_mapping(model_type):
            return []  # most families: PEFT takes seconds to import
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


def target_fields(
    model_type: str | None, modules: Iterable[str], parameters: Iterable[str] = ()
) -> TargetFields:
    """Return the fields by which PEFT finds the layers of a plain LoRA.

    Layers that PEFT would take for experts are named by their weights, in ``target_parameters``,
    which it leaves as they are. The tensors of the adapter are the same.

    Args:
        model_type: of the base's config.json; None if that is not available: nothing moves.
        modules: names of layers, or the ends of such names.
        parameters: what is in ``target_parameters`` already.
    """
    named = list(modules)
    moved = [] if model_type is None else misread_by_peft(model_type, named)
    fields = TargetFields(target_modules=[name for name in named if name not in moved])
    if weights := sorted({*parameters, *(f"{name}.weight" for name in moved)}):
        fields["target_parameters"] = weights
    return fields


def renamed_by_peft(model_type: str, layers: Iterable[str]) -> list[str]:
    """Return the layers whose LoRA PEFT drops because it gives other names to the tensors.

    PEFT renames an adapter's tensors by the rules with which transformers reads checkpoints. In a
    few families a rule also takes names of the model's own layers for those of a checkpoint.

    Args:
        model_type: of the base's config.json.
        layers: names of the adapter's layers.
    """
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4, which has no such rules
        return []
    rules = get_checkpoint_conversion_mapping(model_type) or []
    rules = [rule for rule in rules if isinstance(rule, WeightRenaming)]

    def keeps_name(key: str) -> bool:
        # PEFT takes back what only cuts a prefix off.
        return key.endswith(rename_source_key(key, rules, [])[0])

    return [name for name in layers if not keeps_name(f"{name}.lora_A.weight")]


def refused_by_peft(model_type: str | None, layers: Iterable[str]) -> list[str]:
    """Return the layers for which PEFT refuses to load a LoRA."""
    if model_type not in REFUSED_IN:
        return []
    return [name for name in layers if name.rpartition(".")[2] in REFUSED_NAMES]


def peft_warning(model_type: str | None, layers: Iterable[str], base: str | None) -> str | None:
    """Return a warning if PEFT would misread a plain LoRA, or might, else None.

    Args:
        model_type: of the base's config.json; None if that is not available.
        layers: names of the adapter's layers.
        base: the base's name in the adapter.
    """
    named = list(layers)
    if refused := refused_by_peft(model_type, named):
        return (
            f"PEFT will not load this adapter: in a {model_type} it refuses layers such as "
            f"{refused[0]}. Leave them out of --target-modules, or use `lorasb merge`."
        )
    if model_type is None:
        misread = misread_by_peft(None, named)
    else:
        misread = renamed_by_peft(model_type, named)
    if not misread:
        return None
    count = f"{len(misread)} of {len(named)} layers, such as {', '.join(misread[:3])}"
    if model_type is None:
        return (
            f"PEFT may not read {count}: it takes their names for those of experts if the base is "
            f"a mixture of experts such as DeepSeek-V3, and the config.json of "
            f"{base or 'the base'}, which would say so, is not available. With such a base, export "
            "where that file is, or use `lorasb merge` instead of PEFT."
        )
    return (
        f"PEFT will not read {count}: in a {model_type} it gives other names to their tensors, and "
        "drops them. Use `lorasb merge` instead of PEFT."
    )
