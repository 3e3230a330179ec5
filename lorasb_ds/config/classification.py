"""Which options do not work where rows are classified. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_config import RunConfig
from lorasb_ds.errors import option_name


def classification_problems(config: RunConfig, asked: Mapping[str, Any]) -> list[str]:
    """Return the problems of a run's options with --task-type sequence-classification.

    Args:
        asked: fields that were given on the command line.
    """
    if not config.classifies:
        return []
    refused = {
        "--packing": config.packing and "a packed row would have one class",
        "--generate-samples": config.generate_samples and "a classifier writes no answers",
        f"--method {config.method}": config.method not in METHODS
        and "PEFT's methods are for causal language models here",
        "--optimizer muon": config.optimizer == "muon" and "the head has biases, not only matrices",
    }
    refused |= {
        option_name(field): "rows are not rendered as conversations"
        for field in ("chat_template", "loss_on")
        if field in asked
    }
    return [
        f"{option} does not work with --task-type sequence-classification: {why}. Leave it out."
        for option, why in refused.items()
        if why
    ]
