"""The report of a finished run: report.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasb_ds.config.adapter_options import UNIFORM
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_layout import LOSS_PICTURE
from lorasb_ds.init.init_report import InitReport
from lorasb_ds.models.linear_layers import Shapes
from lorasb_ds.runs.history import (
    PERPLEXITY,
    evaluations,
    perplexity,
    saved_evaluation,
    scores_of,
    summarize,
    training_rows,
)
from lorasb_ds.system.files import write_text
from lorasb_ds.system.units import GIB
from lorasb_ds.training.report_init import (
    experts_section,
    init_section,
    layers_section,
    ranks_section,
    rebasing_section,
)

STAGES = {
    "base": "base",
    "init": "after the init",
    "step": "in training",
    "rebase": "after re-basing",
    "trained": "trained",
}


def write_report(
    path: Path,
    run: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    init: InitReport,
    targets: Shapes,
    num_in_expert_pairs: int,
    num_frozen_in_experts: int,
    rebasings: Mapping[int, Mapping[str, Any]],
) -> None:
    """Write ``report.md``: the init, the training, and the size of the adapter.

    Args:
        run: content of ``run.json``.
        rows: all rows of ``metrics.jsonl``.
        init: report of the init.
        targets: layers with an adapter -> (out, in).
        num_in_expert_pairs: elements of A and B of all MoE experts with an adapter.
        num_frozen_in_experts: elements of MoE experts without an adapter.
        rebasings: step -> content of the ``init.json`` that --rebase-every has made after it.
    """
    r, method = run["config"]["r"], run["config"]["method"]
    head = run.get("head_parameters", 0)
    num_trained = run["trainable_parameters"] - head
    what = f"{method}, r = {r}" if method in METHODS else method
    num_lora = sum(r * (out + in_) for out, in_ in targets.values()) + num_in_expert_pairs
    lines = [
        f"# {what}: {run['config']['model']} on {' + '.join(run['config']['data'])}",
        "",
        f"{run['world_size']} process(es) on {run['accelerator']}; {len(targets)} layers with an "
        f"adapter{_init_rows(run['config'])}.",
        "",
        "| | trainable parameters |",
        "|---|---:|",
        f"| {what} | {num_trained:,} |",
    ]
    if method in METHODS:
        times = f"{num_lora / num_trained:.1f} times more"
        layers = "same layers and experts" if num_in_expert_pairs else "same layers"
        lines.append(f"| LoRA, r = {r}, {layers} | {num_lora:,} ({times}) |")
    if head:
        lines.append(f"| and the classification head | {head:,} |")
    lines.append("")
    if run["config"]["rank_allocation"] != UNIFORM:
        lines += ranks_section(init)
    if run.get("notes"):
        lines += ["## Notes", "", *(f"- {note}" for note in run["notes"]), ""]
    if run.get("peft_warning"):
        lines += [f"**Not for PEFT**: {run['peft_warning']}", ""]
    lines += init_section(init, run["config"]["init_from"], num_frozen_in_experts)
    lines += rebasing_section(rebasings)
    lines += _training_section(rows)
    lines += _held_out_section(run, rows)
    lines += _memory_section(run["memory"])
    if init.layers:
        lines += layers_section(init)
    if init.experts:
        lines += experts_section(init)
    write_text(path, "\n".join(lines) + "\n")


def _init_rows(config: Mapping[str, Any]) -> str:
    return f"; init on {' + '.join(config['init_data'])}" if config["init_data"] else ""


def _training_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not training_rows(rows):
        return []
    found = summarize(rows)
    lines = [
        "## Training",
        "",
        f"![loss]({LOSS_PICTURE})",
        "",
        "| | |",
        "|---|---:|",
        f"| steps | {found.steps:,} |",
        f"| time | {found.seconds:.0f} s |",
        f"| tokens seen | {found.tokens:,}, {found.tokens_per_s:.0f} a second |",
        f"| loss: first step / mean of the last tenth | {found.first_loss:.4f} / "
        f"{found.final_loss:.4f} |",
    ]
    if not math.isnan(found.padding_share):
        lines.append(f"| padding | {found.padding_share:.1%} of all positions |")
    lines.append(f"| skipped steps, loss or gradient not finite | {found.skipped} |")
    return [*lines, ""]


def _held_out_section(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    held_out = evaluations(rows)
    if not held_out:
        return []
    lines = ["## Held-out rows", "", *held_out_table(held_out)]
    if "saved" in run:
        saved = saved_evaluation(run, rows)
        loss = f": {saved['eval_loss']:.4f}" if "eval_loss" in saved else ""
        lines += ["", f"The adapter is that of step {saved['step']}{loss}."]
        best = run["best"]
        if best["step"] not in (None, saved["step"]):
            lines[-1] += f" The best: {best['eval_loss']:.4f}, at step {best['step']}."
    return [*lines, ""]


def held_out_table(evaluated: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of evaluations on held-out rows."""
    names = list(scores_of(evaluated[0])) or [PERPLEXITY]
    lines = [f"| | step | loss | {' | '.join(names)} |", "|---|---:|---:|" + "---:|" * len(names)]
    return lines + [
        f"| {STAGES[row['stage']]} | {row['step']} | {row['eval_loss']:.4f} | {_beside(row)} |"
        for row in evaluated
    ]


def _beside(row: Mapping[str, Any]) -> str:
    """Return the cells beside a held-out loss: its scores, or its perplexity."""
    scores = scores_of(row)
    if not scores:
        return f"{perplexity(row['eval_loss']):.4g}"
    return " | ".join(f"{value:.4f}" for value in scores.values())


def _memory_section(memory: Mapping[str, Any]) -> list[str]:
    """List the phases that were measured; an init that was loaded was not."""
    phases = memory["predicted"]["phases"]
    return [
        "## Memory of rank 0",
        "",
        "| GiB | predicted | measured |",
        "|---|---:|---:|",
        *(
            f"| {phase} | {phases[phase] / GIB:.2f} | {peak / GIB:.2f} |"
            for phase, peak in memory["measured"].items()
        ),
        "",
        "Peaks: of the device's tensors; on a CPU of the process, above its start.",
        "",
    ]
