"""The file of ``--method peft:FILE.json``: PEFT's configuration, and what of it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from lorasb_ds.config.adapter_options import ALL_LINEAR
from lorasb_ds.errors import ConfigError

# Types that name layers of their own where target_modules is not given.
OWN_TARGETS = ("IA3", "LN_TUNING")
REFUSED_TYPES = {
    "ADALORA": "it moves ranks between layers by its own bookkeeping of every gradient, and adds a "
    "term to the loss",
    "ADAMSS": "it clusters the rows of all weights before it makes its layers, and freezes some by "
    "their gradients",
    "FROD": "it decomposes the weights of all layers together, which no process holds at once",
    "POLY": "its layers want to know the task of every row",
    "SHADOW": "it is a second model beside the base, and no layers in it",
    "SHIRA": "it chooses entries of the weights before they are there",
    "TRAINABLE_TOKENS": "it trains rows of the embedding, and no layers",
    "XLORA": "it mixes adapters that have been trained before",
}
# Fields of PEFT's configurations that are left alone by default.
REFUSED_FIELDS = {
    "modules_to_save": "whole modules would be trained",
    "trainable_token_indices": "rows of the embedding would be trained",
    "target_parameters": "parameters would be trained that lie in no layer of their own",
    "layer_replication": "it makes another base",
    "megatron_config": "the base is no Megatron model",
    "arrow_config": "it mixes adapters that have been trained before",
    "alora_invocation_tokens": "its layers want to know where in a row they begin",
    "monteclora_config": "it adds a term to the loss",
    "kasa_config": "it changes the base's weights, and adds a term to the loss",
    "eva_config": "its init looks at activations",
    "corda_config": "its init looks at activations",
    "loftq_config": "its init changes the base's weights",
    "lora_ga_config": "its init changes the base's weights; --method lora-ga does not",
    "runtime_config": "it is no part of an adapter",
}
# Inits of LoRA's that neither change the base nor want to see data.
LORA_INITS = (True, False, "gaussian", "orthogonal")


def peft_config(path: str, content: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration, of what a file holds.

    Args:
        path: the file, for messages.
    Raises:
        ConfigError: what is wrong with it, or cannot be trained here.
    """
    name = str(content["peft_type"]).upper()
    kinds = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in kinds:
        known = ", ".join(sorted(kinds))
        raise ConfigError(
            f"--method {path}: peft_type {content['peft_type']!r} is not known to the installed "
            f"PEFT, which has {known}. Give one of them."
        )
    fields = {field.name for field in dataclasses.fields(kinds[name])}
    if unknown := sorted(content.keys() - fields):
        raise ConfigError(
            f"--method {path}: {', '.join(unknown)} is no field of PEFT's {name}. It has "
            f"{', '.join(sorted(fields))}."
        )
    values = {key: value for key, value in content.items() if key != "peft_type"}
    values |= {"task_type": "CAUSAL_LM", "inference_mode": False}
    if "target_modules" in fields and name not in OWN_TARGETS:
        values["target_modules"] = values.get("target_modules") or ALL_LINEAR
    problems = [refusal(path, f"peft_type {name}", REFUSED_TYPES.get(name))]
    for field, why in REFUSED_FIELDS.items():
        problems.append(refusal(path, field, why if content.get(field) else None))
    if content.get("bias", "none") != "none":
        problems.append(refusal(path, "bias", "biases of the base would be trained"))
    if name == "LORA" and content.get("init_lora_weights", True) not in LORA_INITS:
        why = "it changes the base's weights or looks at data; --method pissa and lora-ga do not"
        problems.append(refusal(path, f"init_lora_weights {values['init_lora_weights']!r}", why))
    if found := [problem for problem in problems if problem]:
        raise ConfigError(*found)
    try:
        made: PeftConfig = kinds[name](**values)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"--method {path}: PEFT does not take it: {error}") from error
    if (
        made.is_prompt_learning
        or made.is_adaption_prompt
        or made.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING
    ):
        why = "it puts tokens or states before the input, and no layers into the model"
        raise ConfigError(refusal(path, f"peft_type {name}", why))
    return made


def refusal(path: str, what: str, why: str | None) -> str:
    """A problem's text; "" where there is no reason against it."""
    if why is None:
        return ""
    return f"--method {path}: {what} cannot be trained here: {why}. Leave it out, or train by PEFT."
