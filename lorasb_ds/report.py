"""What a finished run tells: the loss curve and report.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasb_ds.adapter import Shapes
from lorasb_ds.files import write_text
from lorasb_ds.initialize import InitReport

GIB = 1 << 30


def draw_loss_curve(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A PNG of training and held-out loss over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curves = {
        "loss": ("-", [row for row in rows if "loss" in row]),
        "eval_loss": ("o--", [row for row in rows if row.get("stage") in ("init", "trained")]),
        "eval_loss of the base": ("x", [row for row in rows if row.get("stage") == "base"]),
    }
    for label, (style, curve) in curves.items():
        if curve:
            steps, key = [row["step"] for row in curve], label.split()[0]
            axes.plot(steps, [row[key] for row in curve], style, label=label, linewidth=1)
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per label token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_report(
    path: Path,
    *,
    init: InitReport,
    rows: Sequence[dict[str, Any]],
    targets: Shapes,
    r: int,
    run: dict[str, Any],
    world_size: int,
    device: str,
) -> None:
    """``report.md``: what the init found, how the training went, and how large the adapter is."""
    train = [row for row in rows if "loss" in row]
    evals = [row for row in rows if "eval_loss" in row]
    num_trained = len(targets) * r * r
    num_lora = sum(r * (out + in_) for out, in_ in targets.values())
    energies = [layer.captured_energy for layer in init.layers.values()]
    seconds = sum(row["step_time_s"] for row in train)
    speed = sum(row["tokens"] for row in train) / seconds if seconds else math.nan
    lines = [
        f"# LoRA-SB, r = {r}: {run['config']['model']} on {run['config']['data']}",
        "",
        f"{world_size} process(es) on {device}; {len(targets)} layers with an adapter.",
        "",
        "| | trainable parameters |",
        "|---|---:|",
        f"| LoRA-SB, r = {r} | {num_trained:,} |",
        f"| LoRA, r = {r}, same layers | {num_lora:,} ({num_lora / num_trained:.1f} times more) |",
        "",
        "## Init",
        "",
        "| | |",
        "|---|---:|",
        f"| sample | {init.num_samples} rows, {init.num_label_tokens} label tokens |",
        f"| time | {init.total_s:.1f} s (gradients {init.gradients_s:.1f}, SVD {init.svd_s:.1f}) |",
        f"| peak memory of rank 0 | {init.peak_memory_bytes / GIB:.2f} GiB |",
        f"| captured energy of sign(G): min / median / max | {min(energies):.3f} / "
        f"{statistics.median(energies):.3f} / {max(energies):.3f} |",
        f"| loss of the sample: base / after the fill (eta = {init.init_lr:g}) | "
        f"{init.loss_before:.4f} / {init.loss_after:.4f} |",
        "",
    ]
    if init.not_descending:
        names = ", ".join(init.not_descending)
        lines += [f"**No descent**, so that R starts at 0: {names}.", ""]
    lines += ["## Training", "", "![loss](loss.png)", ""]
    if train:
        lines += [
            f"{train[-1]['step']} steps, {seconds:.0f} s, {speed:.0f} tokens/s; loss "
            f"{train[0]['loss']:.4f} -> {train[-1]['loss']:.4f}.",
            "",
        ]
    if evals:
        lines += ["| held-out loss | step | eval_loss |", "|---|---:|---:|"]
        stages = {"base": "base", "init": "after the init", "trained": "trained"}
        lines += [
            f"| {stages[row['stage']]} | {row['step']} | {row['eval_loss']:.4f} |" for row in evals
        ]
        lines.append("")
    lines += [
        "## Init, layer by layer",
        "",
        "Captured energy is the share of ‖sign(G)‖² in the r directions kept; descent is "
        "⟨BRA, G⟩, the first-order change of the loss.",
        "",
        "| layer | captured energy | σ₁ | σᵣ | descent |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {layer.captured_energy:.4f} | {layer.largest_singular_value:.1f} | "
        f"{layer.smallest_singular_value:.1f} | {layer.descent:.2e} |"
        for name, layer in init.layers.items()
    ]
    write_text(path, "\n".join(lines) + "\n")
