"""Pictures of a sweep: losses over steps, learning rates and parameters. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.sweeps.grid import label, short
from launcher.sweeps.table import MethodResult
from lorasb_ds.config.run_layout import METRICS
from lorasb_ds.runs.history import read_rows
from lorasb_ds.runs.plots import draw_comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PICTURES = ("loss-over-steps.png", "loss-over-lr.png", "loss-over-parameters.png")
MARKERS = "osD^vP*X"


def draw_sweep(
    folder: Path, runs: Path, rows: Sequence[MethodResult], base_loss: float
) -> list[Path]:
    """Draw the three pictures; none as long as no run is finished.

    Args:
        folder: where they are written.
        runs: folder of the runs' folders.
        base_loss: held-out loss of the base; nan where it is not known.
    Returns:
        Paths of the pictures.
    """
    known = [row for row in rows if row.best_lr is not None]
    if not known:
        return []
    paths = [folder / name for name in PICTURES]
    chosen = {
        f"{_name(row, known)}, lr {short(row.best_lr or 0)}": read_rows(
            runs / row.results[0].trial.name / METRICS
        )
        for row in known
    }
    draw_comparison(paths[0], chosen)
    _draw_over_lr(paths[1], known, base_loss)
    _draw_over_parameters(paths[2], known, base_loss)
    return paths


def _draw_over_lr(path: Path, rows: Sequence[MethodResult], base_loss: float) -> None:
    figure, axes = _new("learning rate")
    for row in rows:
        most = max(rate.seeds for rate in row.rates.values())
        # Means over fewer seeds cannot be compared with it.
        lrs = sorted(lr for lr, rate in row.rates.items() if rate.seeds == most)
        color, marker = _style(row, rows)
        losses = [row.rates[lr].loss for lr in lrs]
        axes.plot(lrs, losses, label=_name(row, rows), color=color, marker=marker)
    _save(path, figure, axes, base_loss)


def _draw_over_parameters(path: Path, rows: Sequence[MethodResult], base_loss: float) -> None:
    figure, axes = _new("trainable parameters")
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method and row.trainable]
        own.sort(key=lambda row: row.trainable or 0)
        if not own:
            continue
        sizes = [float(row.trainable or 0) for row in own]
        spreads = [row.spread if math.isfinite(row.spread) else 0.0 for row in own]
        means = [row.loss for row in own]
        color, _ = _style(own[0], rows)
        axes.errorbar(
            sizes, means, spreads, capsize=3, marker="o", color=color, label=label(method)
        )
        for row, size, mean in zip(own, sizes, means, strict=True):
            text = "" if row.r is None else f"r = {row.r}"
            axes.annotate(text, (size, mean), (5, 5), textcoords="offset points", fontsize=7)
    _save(path, figure, axes, base_loss)


def _new(xlabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel=xlabel, ylabel="held-out loss")
    return figure, axes


def _save(path: Path, figure: Figure, axes: Axes, base_loss: float) -> None:
    """Save a figure, with a line for the base's loss where some are worse: these are cut off."""
    import numpy as np

    sizes, losses = np.concatenate([np.asarray(line.get_xydata()) for line in axes.lines]).T
    low = float(losses.min())
    if losses.max() > base_loss > low:
        axes.axhline(base_loss, color="k", lw=0.8, ls=":", label="base")
        axes.set_ylim(top=base_loss + 0.1 * (base_loss - low))
    axes.set_xlim(float(sizes.min()) / 1.5, float(sizes.max()) * 1.5)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _name(row: MethodResult, rows: Sequence[MethodResult]) -> str:
    """Return a method's name, with r where there are several."""
    several = len({other.r for other in rows}) > 1
    has_rank = several and row.r is not None
    return f"{label(row.method)}, r = {row.r}" if has_rank else label(row.method)


def _style(row: MethodResult, rows: Sequence[MethodResult]) -> tuple[str, str]:
    """Choose a colour for each method, and a marker for each r."""
    methods = sorted({other.method for other in rows})
    ranks = sorted({other.r or 0 for other in rows})
    color, marker = methods.index(row.method) % 10, ranks.index(row.r or 0) % len(MARKERS)
    return f"C{color}", MARKERS[marker]
