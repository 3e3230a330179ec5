"""Names that other trainers have for options of ours: taken, with a line that says so."""

from __future__ import annotations

import functools

import click

# transformers', PEFT's, TRL's, axolotl's and LLaMA-Factory's name -> ours.
ALIASES = {
    "base-model": "model",
    "model-name-or-path": "model",
    "dataset": "data",
    "train-file": "data",
    "validation-file": "eval-data",
    "deepspeed": "ds-config",
    "learning-rate": "lr",
    "lr-scheduler-type": "lr-scheduler",
    "num-epochs": "epochs",
    "num-train-epochs": "epochs",
    "per-device-train-batch-size": "micro-batch-size",
    "lora-r": "r",
    "lora-rank": "r",
    "lora-target": "target-modules",
    "lora-target-modules": "target-modules",
    "cutoff-len": "max-length",
    "max-seq-length": "max-length",
    "model-max-length": "max-length",
    "sequence-len": "max-length",
    "sample-packing": "packing",
    "optim": "optimizer",
    "overwrite-output-dir": "overwrite",
    "resume-from-checkpoint": "resume",
    "save-steps": "save-every",
    "save-total-limit": "keep-last",
    "eval-steps": "eval-every",
    "preprocessing-num-workers": "dataset-num-proc",
}


def our_name(name: str) -> str:
    """Return our name of an option, with hyphens: DeepSpeed's, for one, have underscores.

    It normalizes what click finds on the command line.
    """
    name = name.replace("_", "-")
    if name not in ALIASES:
        return name
    _say(name)
    return ALIASES[name]


@functools.cache
def _say(name: str) -> None:
    click.echo(f"lorasb: --{name} is --{ALIASES[name]} here", err=True)
