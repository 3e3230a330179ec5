"""The file of ``--method peft:FILE.json``: make PEFT's configuration, reject the unsupported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasb_ds.config.adapter_options import ALL_LINEAR
from lorasb_ds.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

# Types with a default of their own for target_modules.
OWN_TARGETS = ("IA3", "LN_TUNING")
REFUSED_TYPES = {
    "ADALORA": "it moves ranks between layers by statistics of every gradient, and adds a term to "
    "the loss",
    "ADAMSS": "it clusters the rows of all weights before it makes its layers, and freezes some by "
    "their gradients",
    "FROD": "it decomposes the weights of all layers together, which no process holds at once",
    "POLY": "its layers need the task of every row",
    "SHADOW": "it is a second model beside the base, not layers in it",
    "SHIRA": "it chooses entries of the weights before they are loaded",
    "TRAINABLE_TOKENS": "it trains rows of the embedding, not layers",
    "XLORA": "it mixes adapters that were trained before",
}
# Fields of PEFT's configurations that are rejected if they are set.
REFUSED_FIELDS = {
    "modules_to_save": "whole modules would be trained",
    "trainable_token_indices": "rows of the embedding would be trained",
    "target_parameters": "it trains parameters that are not a layer's weight",
    "layer_replication": "it makes another base",
    "megatron_config": "the base is not a Megatron model",
    "arrow_config": "it mixes adapters that were trained before",
    "alora_invocation_tokens": "its layers need to know where in a row they begin",
    "monteclora_config": "it adds a term to the loss",
    "kasa_config": "it changes the base's weights, and adds a term to the loss",
    "eva_config": "its init needs activations",
    "corda_config": "its init needs activations",
    "loftq_config": "its init changes the base's weights",
    "lora_ga_config": "its init changes the base's weights; --method lora-ga does not",
    "runtime_config": "it is not part of an adapter",
}
# Inits of LoRA that neither change the base nor need data.
LORA_INITS = (True, False, "gaussian", "orthogonal")


def make_peft_config(path: str, content: Mapping[str, Any]) -> PeftConfig:
    """Make PEFT's configuration from a file's content.

    Args:
        path: ``peft:FILE.json``, for messages.
        content: of the file.
    Raises:
        ConfigError: if PEFT rejects it, or it cannot be trained here; lists every reason.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    name = str(content["peft_type"]).upper()
    kinds = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds:
        known = ", ".join(sorted(kinds))
        raise ConfigError(
            f"--method {path}: the installed PEFT has no peft_type {content['peft_type']!r}. "
            f"Give one of {known}."
        )
    fields = {field.name for field in dataclasses.fields(kinds[name])}
    if unknown := sorted(content.keys() - fields):
        raise ConfigError(
            f"--method {path}: {', '.join(unknown)} is not a field of PEFT's {name}. Its fields "
            f"are {', '.join(sorted(fields))}."
        )
    values = {key: value for key, value in content.items() if key != "peft_type"}
    values |= {"task_type": "CAUSAL_LM", "inference_mode": False}
    if "target_modules" in fields and name not in OWN_TARGETS:
        values["target_modules"] = values.get("target_modules") or ALL_LINEAR
    problems = [refusal_message(path, f"peft_type {name}", REFUSED_TYPES.get(name))]
    for field, why in REFUSED_FIELDS.items():
        problems.append(refusal_message(path, field, why if content.get(field) else None))
    if content.get("bias", "none") != "none":
        problems.append(refusal_message(path, "bias", "biases of the base would be trained"))
    if name == "LORA" and content.get("init_lora_weights", True) not in LORA_INITS:
        why = "it changes the base's weights or needs data; --method pissa and lora-ga do not"
        what = f"init_lora_weights {values['init_lora_weights']!r}"
        problems.append(refusal_message(path, what, why))
    if found := [problem for problem in problems if problem]:
        raise ConfigError(*found)
    try:
        made: PeftConfig = kinds[name](**values)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"--method {path}: PEFT rejects it: {error}") from error
    if (
        made.is_prompt_learning
        or made.is_adaption_prompt
        or made.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING
    ):
        why = "it puts tokens or states before the input, not layers into the model"
        raise ConfigError(refusal_message(path, f"peft_type {name}", why))
    return made


def refusal_message(path: str, what: str, why: str | None) -> str:
    """Return the message that something cannot be trained here; "" if ``why`` is None."""
    if why is None:
        return ""
    return (
        f"--method {path}: {what} cannot be trained here: {why}. Leave it out, or train with PEFT."
    )
