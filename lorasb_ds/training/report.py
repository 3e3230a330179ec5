"""The report of a finished run: report.md, and a picture of its init."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasb_ds.config.adapter_options import UNIFORM
from lorasb_ds.config.methods import METHODS
from lorasb_ds.config.run_layout import INIT_PICTURE, LOSS_PICTURE
from lorasb_ds.init.init_report import InitReport, LayerInit
from lorasb_ds.models.linear_layers import Shapes
from lorasb_ds.runs.history import (
    PERPLEXITY,
    evaluations,
    perplexity,
    scores_of,
    summarize,
    training_rows,
)
from lorasb_ds.system.files import write_text
from lorasb_ds.system.units import GIB

STAGES = {
    "base": "base",
    "init": "after the init",
    "step": "in training",
    "rebase": "after re-basing",
    "trained": "trained",
}


def draw_init(path: Path, init: InitReport) -> None:
    """Draw every layer's singular values, and the energy that its r directions capture, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    spectra, energies = figure.subplots(1, 2)
    kinds: dict[str, list[LayerInit]] = {}
    for name, layer in init.layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(layer)
    for i, (kind, layers) in enumerate(kinds.items()):
        color = f"C{i % 10}"
        for j, layer in enumerate(layers):
            ranks = range(1, len(layer.spectrum) + 1)
            label = kind if j == 0 else None
            spectra.loglog(ranks, layer.spectrum, color=color, alpha=0.4, lw=0.7, label=label)
        share = [layer.captured_energy for layer in layers]
        energies.plot(range(len(layers)), share, "o-", color=color, ms=3, lw=0.8, label=kind)
    of = "" if init.loss is None else " of the gradient"
    spectra.set(xlabel="i", ylabel="i-th singular value", title=f"{init.update}{of}")
    energies.set(xlabel="layer", ylabel="captured energy", ylim=(0, 1.02))
    energies.legend(fontsize="small")
    for axes in (spectra, energies):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_report(
    path: Path,
    run: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    init: InitReport,
    targets: Shapes,
    num_frozen_in_experts: int,
    rebasings: Mapping[int, Mapping[str, Any]],
) -> None:
    """Write ``report.md``: the init, the training, and the size of the adapter.

    Args:
        run: content of ``run.json``.
        rows: all rows of ``metrics.jsonl``.
        init: report of the init.
        targets: layers with an adapter -> (out, in).
        num_frozen_in_experts: elements of MoE experts without an adapter.
        rebasings: step -> content of the ``init.json`` that --rebase-every has made after it.
    """
    r, method = run["config"]["r"], run["config"]["method"]
    head = run.get("head_parameters", 0)
    num_trained = run["trainable_parameters"] - head
    what = f"{method}, r = {r}" if method in METHODS else method
    num_lora = sum(r * (out + in_) for out, in_ in targets.values())
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
        lines.append(f"| LoRA, r = {r}, same layers | {num_lora:,} ({times}) |")
    if head:
        lines.append(f"| and the classification head | {head:,} |")
    lines.append("")
    if run["config"]["rank_allocation"] != UNIFORM:
        lines += _ranks_section(init)
    if run.get("notes"):
        lines += ["## Notes", "", *(f"- {note}" for note in run["notes"]), ""]
    if run.get("peft_warning"):
        lines += [f"**Not for PEFT**: {run['peft_warning']}", ""]
    lines += _init_section(init, run["config"]["init_from"], num_frozen_in_experts)
    lines += _rebasing_section(rebasings)
    lines += _training_section(rows)
    lines += _held_out_section(rows)
    lines += _memory_section(run["memory"])
    if init.layers:
        lines += _layers_section(init)
    if init.experts:
        lines += _experts_section(init)
    write_text(path, "\n".join(lines) + "\n")


def _ranks_section(init: InitReport) -> list[str]:
    """Return a table of the ranks by kind of layer: what follows the last dot of its name."""
    kinds: dict[str, list[int]] = {}
    for name, layer in init.layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(len(layer.spectrum))
    lines = ["| rank by energy | min | mean | max |", "|---|---:|---:|---:|"]
    for kind, ranks in kinds.items():
        lines.append(f"| {kind} | {min(ranks)} | {statistics.mean(ranks):.1f} | {max(ranks)} |")
    return [*lines, ""]


def _init_rows(config: Mapping[str, Any]) -> str:
    return f"; init on {' + '.join(config['init_data'])}" if config["init_data"] else ""


def _init_section(init: InitReport, taken: str | None, num_frozen: int) -> list[str]:
    energies = [layer.captured_energy for layer in init.layers.values()]
    of_gradient = []
    if init.loss is not None:
        tokens = f", {init.num_label_tokens} label tokens"
        if init.num_label_tokens == init.num_samples:  # of rows that are classified
            tokens = ""
        of_gradient = [
            f"| sample | {init.num_samples} rows{tokens}, loss {init.loss:.4f} |",
            f"| groups of layers | {init.num_groups} |",
            f"| passes over the sample | {init.passes:g}"
            f"{', and one more forward' if init.by_segments else ''} |",
            "| predicted memory of gradients and SVD | "
            f"{init.predicted_memory_bytes / GIB:.2f} GiB |",
        ]
    eta = "" if init.step.init_lr is None else f", eta = {init.step.init_lr:.3g}"
    lines = [
        "## Init",
        "",
        *([f"Loaded from {taken}: times and memory are those of that run.", ""] if taken else []),
        "| | |",
        "|---|---:|",
        f"| decomposed | {init.update} |",
        *of_gradient,
        f"| time | {init.total_s:.1f} s: gradients {init.gradients_s:.1f}, their communication "
        f"{init.communication_s:.1f}, SVD {init.svd_s:.1f}, losses {init.step.seconds:.1f} |",
        f"| measured peak of rank 0, with activations, above the base's "
        f"{init.memory_at_start_bytes / GIB:.2f} GiB | "
        f"{(init.peak_memory_bytes - init.memory_at_start_bytes) / GIB:.2f} GiB |",
    ]
    if energies:
        lines.append(
            f"| captured energy: min / median / max | {min(energies):.3f} / "
            f"{statistics.median(energies):.3f} / {max(energies):.3f} |"
        )
    lines += [
        f"| loss of {init.step.num_samples} other rows: base / filled{eta} | "
        f"{init.step.loss_before:.4f} / {init.step.loss_after:.4f} |",
        "",
    ]
    if init.step.losses:
        lines += ["| eta | " + " | ".join(init.step.losses) + " |"]
        lines += ["|---|" + "---:|" * len(init.step.losses)]
        losses = " | ".join(f"{loss:.4f}" for loss in init.step.losses.values())
        lines += [f"| loss of those rows | {losses} |", ""]
    if init.not_descending:
        names = ", ".join(init.not_descending)
        lines += [f"**No descent**, so that R starts at 0: {names}.", ""]
    if init.partly_reached:
        counts = ", ".join(f"{name} ({n})" for name, n in init.partly_reached.items())
        lines += [f"**Not called by all {init.num_batches} micro-batches**: {counts}.", ""]
    if num_frozen:
        lines += [
            f"**MoE**: {num_frozen:,} parameters of experts stay frozen without an adapter.",
            "",
        ]
    return [*lines, f"![spectra and captured energy]({INIT_PICTURE})", ""] if init.layers else lines


def _rebasing_section(rebasings: Mapping[int, Mapping[str, Any]]) -> list[str]:
    if not rebasings:
        return []
    lines = [
        "## Re-basing",
        "",
        "The gradient's sample and the rows whose loss is measured are other ones each time.",
        "",
        "| after step | eta | loss of other rows: before / after | time |",
        "|---:|---:|---:|---:|",
    ]
    for after, init in rebasings.items():
        step = init["step"]
        eta = "-" if step["init_lr"] is None else f"{step['init_lr']:.3g}"
        losses = f"{step['loss_before']:.4f} / {step['loss_after']:.4f}"
        lines.append(f"| {after} | {eta} | {losses} | {init['total_s']:.1f} s |")
    return [*lines, ""]


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


def _held_out_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    held_out = evaluations(rows)
    if not held_out:
        return []
    lines = ["## Held-out rows", "", *held_out_table(held_out)]
    found = summarize(rows)
    if not math.isnan(found.best_loss):
        lines += ["", f"The best: {found.best_loss:.4f}, at step {found.best_step}."]
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


def _layers_section(init: InitReport) -> list[str]:
    return [
        "## Init, layer by layer",
        "",
        "Captured energy is the share of the update's squared Frobenius norm in the r directions "
        "kept; slope is ⟨USVh, G⟩, the first-order fall of the loss per eta (without a gradient: "
        "nothing); orthonormality is the largest entry of |UᵀU - I| and |VᵀV - I|, in fp32 and "
        "as stored.",
        "",
        "| layer | captured energy | σ₁ | σᵣ | slope | orthonormality |",
        "|---|---:|---:|---:|---:|---:|",
        *(
            f"| {name} | {layer.captured_energy:.4f} | {layer.spectrum[0]:.4g} | "
            f"{layer.spectrum[-1]:.4g} | {'-' if init.loss is None else f'{layer.slope:.2e}'} | "
            f"{layer.orthonormality_error:.0e} / {layer.stored_orthonormality_error:.0e} |"
            for name, layer in init.layers.items()
        ),
    ]


def _experts_section(init: InitReport) -> list[str]:
    """List the projections of experts; numbers of experts are counted from 0."""
    lines = [
        "",
        "## Init of experts",
        "",
        "Every expert of a projection has its own SVD. Tokens are those of the sample that gave "
        "the expert a gradient.",
        "",
        "| projection | captured energy: min / median / max | tokens of an expert: min / median / "
        "max | experts without a token | orthonormality |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, experts in init.experts.items():
        energy, tokens = experts.captured_energy, experts.tokens
        lines.append(
            f"| {name} | {energy.min():.4f} / {energy.median():.4f} / {energy.max():.4f} | "
            f"{tokens.min()} / {tokens.median()} / {tokens.max()} | "
            f"{', '.join(map(str, experts.unreached)) or '-'} | "
            f"{experts.orthonormality_error:.0e} / {experts.stored_orthonormality_error:.0e} |"
        )
    if init.loss is not None and any(of.unreached for of in init.experts.values()):
        lines += [
            "",
            "The basis of an expert without a token is that of the mean gradient of the "
            "projection's other experts, and its R starts at 0. More --init-samples reach more "
            "experts.",
        ]
    return lines
