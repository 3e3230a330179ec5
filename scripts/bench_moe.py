"""Experts of Qwen3-30B-A3B's widths: memory, steps and the init, in bf16 and 4 bits."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from bench_common import (
    ROOT,
    interleaved_medians,
    machine,
    measure,
    print_table,
    run_as_rank,
    write_json,
)
from bench_model import read_once, write_qwen3_moe
from bench_wide import wide

GB = 1e9
BLOCKS, BLOCKS_OF_ALL = 2, 48
EXPERT_R = 8
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": BLOCKS,
    "tie_word_embeddings": True,
}
QUICK = SHAPE | {"hidden_size": 128, "moe_intermediate_size": 64, "num_local_experts": 8}
QUICK |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
QUICK |= {"num_experts_per_tok": 2}
# Few tokens, as the weights are what takes memory here. One of the three rows is held back.
RUN = {
    "data": "reasoning-gym:word_sequence_reversal?min_words=3&max_words=5&size=3&seed=3",
    "init_samples": 3,
    "init_lr": 1e-4,
    "max_length": 128,
    "micro_batch_size": 1,
    "max_steps": 1,
    "r": 64,
    "expert_r": EXPERT_R,
    "gradient_checkpointing": True,
    "ds_config": str(ROOT / "ds_configs/zero3.json"),
}
BUDGET_GIB = 1
IN_GROUPS = f"4-bit, 1, init in {BUDGET_GIB} GiB"
FROZEN, OURS, PEFT = "frozen experts", "lorasb", "PEFT, target_parameters"


def block(settings: dict[str, Any], out: str) -> None:
    """Seconds and peak memory of the experts of one block, forward and backward to the inputs."""
    from bench_memory import watched

    torch.distributed.init_process_group("gloo", world_size=1, rank=0)
    way = settings["way"]
    run, parameters = _block(settings, way)
    run()
    _, found = watched(run)
    seconds = interleaved_medians({way: run}, settings["repeats"])[way]
    result = {"seconds": seconds, "peak_bytes": found["anon_peak_bytes"], "trained": parameters}
    Path(out).write_text(json.dumps(result))


def _block(settings: dict[str, Any], way: str) -> tuple[Any, int]:
    """Return a pass over the experts of one block, and the number of trained elements."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from lorasb_ds.adapters.experts import LoraSBExperts
    from lorasb_ds.models.experts import split_experts

    config = Qwen3MoeConfig(**settings["shape"])
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    dtype = getattr(torch, settings["dtype"])

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.experts = Qwen3MoeExperts(config)

    holder: Any = Holder()
    weights = {n: p.shape for n, p in holder.experts.named_parameters()}
    if way != PEFT:
        split_experts(holder, dtype, None)
    for name, shape in weights.items():
        W = torch.empty(shape, dtype=dtype).normal_(std=0.02)
        if way == PEFT:
            setattr(holder.experts, name, torch.nn.Parameter(W, requires_grad=False))
        else:
            layer = getattr(holder.experts, name)
            layer.weight = torch.nn.Parameter(W, requires_grad=False)
            if way == OURS:
                adapter = LoraSBExperts(layer, EXPERT_R, dtype)
                for factor in (adapter.lora_A, adapter.lora_B, adapter.lora_R):
                    factor.data.normal_(std=0.02)
                setattr(holder.experts, name, adapter)
    if way == PEFT:
        targets = [f"experts.{name}" for name in weights]
        lora = LoraConfig(r=EXPERT_R, target_modules=[], target_parameters=targets)
        holder = get_peft_model(holder, lora).base_model.model
        for name, parameter in holder.named_parameters():
            if "lora_" in name:  # as the base: PEFT makes them fp32
                parameter.data = parameter.data.to(dtype)
    tokens, k = settings["tokens"], config.num_experts_per_tok
    x = torch.randn(tokens, config.hidden_size, dtype=dtype)
    scores = torch.rand(tokens, config.num_local_experts)
    top_k = scores.topk(k).indices
    top_weights = torch.full((tokens, k), 1 / k, dtype=dtype)
    grad = torch.randn_like(x)

    def run() -> None:
        inputs = x.clone().requires_grad_()
        holder.experts(inputs, top_k, top_weights).backward(grad)

    return run, sum(p.numel() for p in holder.parameters() if p.requires_grad)


@click.command("moe")
@click.option("--repeats", default=3, show_default=True, help="Of a block's pass.")
@click.option("--only", type=click.Choice(["runs", "blocks"]))
@click.option("--out", type=Path, default=ROOT / "docs/benchmarks/moe.json", show_default=True)
@click.option("--quick", is_flag=True, help="Narrow experts: whether it runs.")
def main(repeats: int, only: str | None, out: Path, quick: bool) -> None:
    """Experts of Qwen3-30B-A3B's widths: runs in bf16 and 4 bits, a block against PEFT's."""
    shape = QUICK if quick else SHAPE
    found: dict[str, Any] = {"machine": machine(), "shape": shape, "config": RUN}
    if only != "blocks":
        found["runs"] = _runs(shape, quick)
    if only != "runs":
        found["blocks"] = _blocks(shape, 1 if quick else repeats, 32 if quick else 256)
    write_json(out, found)


def _runs(shape: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Load, init and a step of two blocks, in bf16 and 4 bits, on one and two processes.

    The last run is a 4-bit one on one process, whose init may take ``BUDGET_GIB``.
    """
    config = RUN | ({"r": 8} if quick else {})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_qwen3_moe(folder, shape)
        for ranks in (1, 2):
            for form in ("bf16", "4-bit"):
                read_once(folder)
                options = config | {"model": str(folder), "load_in_4bit": form == "4-bit"}
                found[f"{form}, {ranks}"] = measure(wide, options, ranks)
                print(f"{form}, {ranks}: {found[f'{form}, {ranks}']}", file=sys.stderr, flush=True)
        budget = {"init_memory_gib": BUDGET_GIB / (1000 if quick else 1), "load_in_4bit": True}
        found[IN_GROUPS] = measure(wide, config | budget | {"model": str(folder)})
        print(f"{IN_GROUPS}: {found[IN_GROUPS]}", file=sys.stderr, flush=True)
    columns = [f"{form}, {ranks} process(es)" for ranks in (1, 2) for form in ("bf16", "4-bit")]
    columns.append(IN_GROUPS)
    rows = {"groups of the init": [str(int(run["groups"])) for run in found.values()] + ["", ""]}
    for part in ("held", "load_peak", "init_peak", "step_peak"):
        cells = [f"{run[f'{part}_bytes'] / GB:.2f}" for run in found.values()]
        ratios = [
            found[f"4-bit, {ranks}"][f"{part}_bytes"] / found[f"bf16, {ranks}"][f"{part}_bytes"]
            for ranks in (1, 2)
        ]
        rows[f"{part.replace('_', ' ')}, GB"] = [*cells, *(f"{ratio:.2f}" for ratio in ratios)]
        if part == "held":
            continue
        predicted = part.replace("peak", "predicted")
        rows[f"{part.replace('_', ' ')}, planned of measured"] = [
            *(f"{run[f'{predicted}_bytes'] / run[f'{part}_bytes']:.2f}" for run in found.values()),
            *("", ""),
        ]
    print_table(f"{BLOCKS} blocks", [*columns, "4-bit of bf16, 1", "4-bit of bf16, 2"], rows)
    seconds = {
        f"{part}, s": [f"{found[key][f'{part}_s']:.1f}" for key in found]
        for part in ("load", "init", "gradients", "communication", "SVD", "eta", "step")
    }
    per_block = [
        (run["gradients_s"] + run["communication_s"] + run["SVD_s"]) / BLOCKS
        for run in found.values()
    ]
    seconds["init of a block, s"] = [f"{each:.1f}" for each in per_block]
    seconds[f"init of {BLOCKS_OF_ALL} blocks, min"] = [
        f"{BLOCKS_OF_ALL * each / 60:.1f}" for each in per_block
    ]
    print_table(f"{BLOCKS} blocks", columns, seconds)
    return found


def _blocks(shape: dict[str, Any], repeats: int, tokens: int) -> dict[str, Any]:
    """One block's experts, forward and backward, each way in a process of its own, in turn."""
    from lorasb_ds.distributed.accelerator import emulates_bf16

    ways = (FROZEN, OURS, PEFT)
    dtype = "float32" if emulates_bf16() else "bfloat16"
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            settings = {"shape": shape, "way": way, "tokens": tokens, "dtype": dtype, "repeats": 1}
            rounds[way].append(measure(block, settings))
    found = {
        way: {
            "seconds": sorted(r["seconds"] for r in of)[len(of) // 2],
            "peak_bytes": sorted(r["peak_bytes"] for r in of)[len(of) // 2],
        }
        for way, of in rounds.items()
    }
    hidden, width = shape["hidden_size"], shape["moe_intermediate_size"]
    sides = ((2 * width, hidden), (hidden, width))
    share = sum(EXPERT_R * (o + i) for o, i in sides) / sum(o * i for o, i in sides)
    frozen, ours, peft = (found[way] for way in ways)
    print_table(
        f"experts of one block in {dtype}, {tokens} tokens, r = {EXPERT_R}",
        ("seconds", "of frozen", "of PEFT", "peak, GB", "of PEFT"),
        {
            way: (
                f"{of['seconds']:.2f}",
                f"{of['seconds'] / frozen['seconds']:.3f}",
                f"{of['seconds'] / peft['seconds']:.2f}",
                f"{of['peak_bytes'] / GB:.2f}",
                f"{of['peak_bytes'] / peft['peak_bytes']:.2f}",
            )
            for way, of in found.items()
        },
    )
    overhead = ours["seconds"] / frozen["seconds"] - 1
    print(
        f"\noverhead of the branch {overhead:.1%}; of its products alone, counted {share:.1%}: "
        f"{overhead / share:.1f} times"
    )
    return {"dtype": dtype, "medians": found, "rounds": rounds, "branch_share": share}


if __name__ == "__main__":
    run_as_rank(block)
