"""One family of scripts/models.py: made tiny, trained, loaded by PEFT, merged, and in 4 bits."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import ROOT, run_as_rank
from bench_model import copy_tokenizer, demo_tokens
from torch import nn

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # before it is imported

RUN = {
    "data": "reasoning-gym:word_sequence_reversal?min_words=2&max_words=4&size=40&seed=3",
    "val_set_size": 8,
    "dtype": "fp32",
    "init_samples": 9,
    "micro_batch_size": 4,
    "max_steps": 4,
    "lr": 1e-2,
    "r": 4,
    "ds_config": str(ROOT / "ds_configs/zero3.json"),
}
LARGEST = 100_000_000  # parameters: more is a family whose sizes are not known here
# What is not seen from the numbers alone.
REMARKS = {
    "youtu": "transformers sets the pad token's embedding to 0 as it loads; here it is as stored"
}


def multimodal() -> set[str]:
    """Return the model types of images and text that have a tiny configuration."""
    from tests.multimodal_families import FAMILIES

    return {*FAMILIES, "fuyu", "gemma4_unified", "got_ocr2", "mllama"}


def model_class(family: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if family in multimodal() else AutoModelForCausalLM


def make(family: str) -> Any:
    """Return a random fp32 model of two blocks.

    Raises:
        ValueError: if it would not be a tiny one.
    """
    from tests.multimodal_families import tiny_multimodal_config
    from tests.text_families import tiny_config

    tokens, kind = demo_tokens(), model_class(family)
    if family in multimodal():
        config = tiny_multimodal_config(family, tokens["vocab_size"])
    else:
        config = tiny_config(family, **tokens)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its tiny configuration has {size:,} parameters")
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so that every layer matters
            parameter.data.normal_(std=0.1)
    return model


def expert_weights(model: nn.Module) -> dict[str, int]:
    """Return the weights that hold all experts of a block, with their sizes."""
    return {
        f"{name}.{key}": parameter.numel()
        for name, module in model.named_modules()
        if "expert" in f"{name} {type(module).__name__}".lower()
        and not isinstance(module, nn.Linear | nn.Embedding)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1 and "bias" not in key
    }


def linear_weights(model: Any) -> dict[str, int]:
    """Return the weights of all linear layers but head, routers and encoders, with their sizes."""
    from transformers.pytorch_utils import Conv1D

    from lorasb_ds.models.multimodal import text_layers_prefix

    head, prefix = model.get_output_embeddings(), text_layers_prefix(model)
    of_experts = expert_weights(model)
    experts = {p.shape[0] for name, p in model.named_parameters() if name in of_experts}
    routers = [f"{n}." for n, module in model.named_modules() if "Router" in type(module).__name__]
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and name.startswith(prefix)
        and not name.startswith(tuple(routers))
        and not (module.weight.shape[0] in experts and ("gate" in name or "router" in name))
    }


@dataclass
class Trial:
    """One family, from step to step.

    Attributes:
        folder: of its model; what is made of it is beside it.
        batch: the held-out rows, once it has trained.
    """

    family: str
    folder: Path
    batch: Any = None


def family_case(settings: dict[str, Any], out: str) -> None:
    """Train a family, load its adapter into PEFT, merge it, and load the base in 4 bits."""
    from launcher.workers.quiet import quiet_libraries
    from lorasb_ds.errors import ConfigError

    quiet_libraries()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(settings["family"], Path(scratch) / "model")
        for step in (_write, _train, _merge, _pack):
            try:
                result |= step(trial)
            except ConfigError as error:
                result["refused"] = " ".join(str(error).replace(str(trial.folder), "…").split())
            except BaseException as error:  # the table shows what fails, too
                lines = str(error).strip().splitlines() or [""]
                trouble = f"{step.__name__.strip('_')}: {type(error).__name__}: {lines[0]}"
                result["trouble"] = trouble.replace(str(scratch), "…")
            if {"refused", "trouble"} & {*result}:
                break
    Path(out).write_text(json.dumps(result))


def _write(trial: Trial) -> dict[str, Any]:
    model = make(trial.family)
    model.save_pretrained(trial.folder)
    copy_tokenizer(trial.folder)
    experts, linear = (sum(of(model).values()) for of in (expert_weights, linear_weights))
    return {"experts": experts, "linear": linear}


def _train(trial: Trial) -> dict[str, Any]:
    from peft import PeftModel

    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.data.batch import collate
    from lorasb_ds.distributed import zero
    from lorasb_ds.system.signals import StopRequest
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import run_training

    out = trial.folder.parent / "run"
    given = RUN | {"model": str(trial.folder), "output_dir": str(out)}
    run = prepare(load_run_config(given), 1)
    zero.init_process_group()
    assert run_training(run, StopRequest()) == "finished"
    adapted = sum(o * i for o, i in run.adapter.targets.values())
    adapted += sum(n * o * i for n, o, i in run.adapter.experts.values())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    trial.batch = collate(run.data.held_out.examples, run.base.tokenizer.pad_token_id)
    base = model_class(trial.family).from_pretrained(trial.folder, dtype=torch.float32).eval()
    return {
        "adapted": adapted,
        "base_loss": losses[0],
        "run_loss": losses[-1],
        "peft_loss": _loss(PeftModel.from_pretrained(base, out / "adapter"), trial.batch),
        "notes": [*_notes(run), *filter(None, [REMARKS.get(trial.family)])],
    }


def _notes(run: Any) -> list[str]:
    """Return what a run says of layers and experts that are left out."""
    notes = [*run.adapter.left_out, *filter(None, [run.adapter.peft_warning])]
    if run.base.other_experts:
        notes.append("experts stay frozen: transformers does not compute them by its registry")
    return notes


def _loss(model: Any, batch: Any) -> float:
    """Return the loss of the held-out rows by the model's own head."""
    from lorasb_ds.models.loss import label_losses

    with torch.no_grad():
        return (label_losses(model.eval(), batch).sum() / batch.num_label_tokens).item()


def _merge(trial: Trial) -> dict[str, Any]:
    from lorasb_ds.export.adapter_reader import read_adapter
    from lorasb_ds.export.merge import merge_adapter

    out = trial.folder.parent / "merged"
    adapter = read_adapter(trial.folder.parent / "run/adapter")
    merge_adapter(adapter, str(trial.folder), out, say=lambda _: None)
    merged = model_class(trial.family).from_pretrained(out, dtype=torch.float32)
    return {"merged_loss": _loss(merged, trial.batch)}


def _pack(trial: Trial) -> dict[str, Any]:
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.evaluation.model import prepare_model, start_model
    from lorasb_ds.models.experts import ExpertsLinear
    from lorasb_ds.models.quantization import PackedLinear

    config = load_run_config({"model": str(trial.folder), "load_in_4bit": True})
    model = start_model(prepare_model(config, None))
    packed = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            packed += module.out_features * module.in_features
        elif isinstance(module, ExpertsLinear) and module.kind is not None:
            packed += module.num_experts * module.out_features * module.in_features
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits
    assert logits.isfinite().all(), "logits are not finite"
    return {"packed": packed}


if __name__ == "__main__":
    run_as_rank(family_case)
