"""Every family of mixtures of experts in transformers, tiny: coverage, and its adapter in PEFT."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import ROOT, machine, measure, print_table, run_as_rank, write_json
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
ENOUGH, SAME = 0.99, 1e-4


def make(family: str) -> Any:
    """Return a random fp32 model of two blocks; None if it has no experts."""
    from transformers import AutoModelForCausalLM

    from tests.moe_families import tiny_config

    config = tiny_config(family, **demo_tokens())
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
    if not any(".experts." in name or "_moe." in name for name in names):
        return None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # so that every layer matters
            parameter.data.normal_(std=0.1)
    return model


def expert_weights(model: nn.Module) -> dict[str, int]:
    """Return the weights that hold all experts of a block, with their sizes."""
    return {
        f"{name}.{key}": parameter.numel()
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv1d)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def linear_weights(model: Any) -> dict[str, int]:
    """Return the weights of all linear layers but the head and routers, with their sizes."""
    head = model.get_output_embeddings()
    of_experts = expert_weights(model)
    experts = {p.shape[0] for name, p in model.named_parameters() if name in of_experts}
    routers = [f"{n}." for n, module in model.named_modules() if "Router" in type(module).__name__]
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not name.startswith(tuple(routers))
        and not (module.out_features in experts and ("gate" in name or "router" in name))
    }


def family_case(settings: dict[str, Any], out: str) -> None:
    """Train a family, count what is adapted and packed, and load the adapter into PEFT."""
    from launcher.workers.quiet import quiet_libraries

    quiet_libraries()
    result: dict[str, Any] = {"trouble": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        for step in (_write, _train, _pack):
            try:
                result |= step(settings["family"], folder)
            except BaseException as error:  # the table shows what fails, too
                lines = str(error).strip().splitlines() or [""]
                result["trouble"][step.__name__.strip("_")] = f"{type(error).__name__}: {lines[0]}"
            if "linear" not in result:
                break
    Path(out).write_text(json.dumps(result))


def _write(family: str, folder: Path) -> dict[str, Any]:
    model = make(family)
    if model is None:
        return {}
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    experts, linear = (sum(of(model).values()) for of in (expert_weights, linear_weights))
    return {"experts": experts, "linear": linear}


def _train(family: str, folder: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.data.batch import collate
    from lorasb_ds.distributed import zero
    from lorasb_ds.models.loss import token_loss_sum
    from lorasb_ds.system.signals import StopRequest
    from lorasb_ds.training.prepare import prepare
    from lorasb_ds.training.trainer import run_training

    out = folder.parent / "run"
    run = prepare(load_run_config(RUN | {"model": str(folder), "output_dir": str(out)}), 1)
    zero.init_process_group()
    assert run_training(run, StopRequest()) == "finished"
    adapted = sum(o * i for o, i in run.adapter.targets.values())
    adapted += sum(n * o * i for n, o, i in run.adapter.experts.values())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, out / "adapter")
    batch = collate(run.data.held_out.examples, run.base.tokenizer.pad_token_id)
    with torch.no_grad():
        loss = token_loss_sum(model, batch) / batch.num_label_tokens
    return {
        "adapted": adapted,
        "base_loss": losses[0],
        "run_loss": losses[-1],
        "peft_loss": loss.item(),
        "peft_warning": run.adapter.peft_warning,
    }


def _pack(family: str, folder: Path) -> dict[str, Any]:
    from lorasb_ds.config.resolve import load_run_config
    from lorasb_ds.evaluation.model import prepare_model, start_model
    from lorasb_ds.models.experts import ExpertsLinear
    from lorasb_ds.models.quantization import PackedLinear

    config = load_run_config({"model": str(folder), "load_in_4bit": True})
    model = start_model(prepare_model(config, None))
    packed = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            packed += module.out_features * module.in_features
        elif isinstance(module, ExpertsLinear) and module.kind is not None:
            packed += module.num_experts * module.out_features * module.in_features
    with torch.no_grad():
        logits = model(torch.arange(3, 19)[None], use_cache=False).logits
    assert logits.isfinite().all(), "logits are not finite"
    return {"packed": packed}


@click.command("families")
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/families.json", show_default=True)
@click.option("--only", multiple=True, help="A model type; may be repeated. The others stay.")
@click.option("--quick", is_flag=True, help="Two families: whether it runs.")
def main(out: Path, only: tuple[str, ...], quick: bool) -> None:
    """All families with experts, tiny: shares with an adapter and in 4 bits, and PEFT's loss."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    all_of_them = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _may_have_experts(name)]
    chosen = only or (("qwen3_moe", "llama4_text") if quick else sorted(all_of_them))
    found: dict[str, Any] = {}
    if only and out.is_file():
        found = json.loads(out.read_text())["families"]
    for family in chosen:
        try:
            result = measure(family_case, {"family": family})
        except SystemExit as error:  # it was killed
            result = {"trouble": {"process": str(error)}}
        if "linear" not in result and not result["trouble"]:
            continue
        found[family] = result
        click.echo(f"{family}: {' | '.join(_cells(result))}", err=True)
    found = dict(sorted(found.items()))
    rows = {family: _cells(of) for family, of in found.items()}
    columns = ("adapter", "in 4 bits", "loss before", "after", "in PEFT", "trouble")
    print_table("family (share of the linear weights)", columns, rows)
    whole = [
        family
        for family, of in found.items()
        if not of["trouble"]
        and min(of["adapted"], of["packed"]) >= ENOUGH * (of["linear"] + of["experts"])
        and abs(of["peft_loss"] - of["run_loss"]) <= SAME * of["run_loss"]
    ]
    print(
        f"\n{len(whole)} of {len(found)}: at least {ENOUGH:.0%} with an adapter and in 4 bits, "
        f"PEFT's loss equal to {SAME:g}"
    )
    write_json(out, {"machine": machine(), "run": RUN, "families": found, "whole": whole})


def _may_have_experts(family: str) -> bool:
    from transformers import AutoConfig

    try:
        fields = AutoConfig.for_model(family).to_dict()
    except Exception:  # a configuration without defaults
        return False
    return any("expert" in name for name in fields)


def _cells(of: dict[str, Any]) -> list[str]:
    total = of.get("linear", 0) + of.get("experts", 0)
    shares = [f"{of[key] / total:.1%}" if key in of else "" for key in ("adapted", "packed")]
    losses = [
        f"{of[key]:.4f}" if key in of else "" for key in ("base_loss", "run_loss", "peft_loss")
    ]
    trouble = [f"{step}: {error}" for step, error in of["trouble"].items()]
    if of.get("peft_warning"):
        trouble.append("warned: PEFT does not read it")
    return [*shares, *losses, "; ".join(trouble).replace("|", "/")[:200]]


if __name__ == "__main__":
    run_as_rank(family_case)
