"""What a report says of the init: its picture, and sections of report.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasb_ds.config.run_layout import INIT_PICTURE
from lorasb_ds.init.init_report import InitReport, LayerInit
from lorasb_ds.system.units import GIB


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


def init_section(init: InitReport, taken: str | None, num_frozen: int) -> list[str]:
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


def ranks_section(init: InitReport) -> list[str]:
    """Return a table of the ranks by kind of layer: what follows the last dot of its name."""
    kinds: dict[str, list[int]] = {}
    for name, layer in init.layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(len(layer.spectrum))
    lines = ["| rank by energy | min | mean | max |", "|---|---:|---:|---:|"]
    for kind, ranks in kinds.items():
        lines.append(f"| {kind} | {min(ranks)} | {statistics.mean(ranks):.1f} | {max(ranks)} |")
    return [*lines, ""]


def rebasing_section(rebasings: Mapping[int, Mapping[str, Any]]) -> list[str]:
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


def layers_section(init: InitReport) -> list[str]:
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


def experts_section(init: InitReport) -> list[str]:
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
