"""Pictures of losses over steps. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasb_ds.history import evaluations, training_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]


def draw_loss_curve(path: Path, rows: Rows) -> None:
    """A PNG of one run: training loss and its running mean, held-out losses, learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _draw_training(losses, rows, "C0", "training loss, running mean")
    base = [row for row in evaluations(rows) if row["stage"] == "base"]
    if base:
        steps = [row["step"] for row in base]
        losses.plot(steps, [row["eval_loss"] for row in base], "kx", label="held-out, base")
    _draw_held_out(losses, rows, "C1", "held-out")
    train = training_rows(rows)
    rates.plot([row["step"] for row in train], [row["lr"] for row in train], "C2", lw=1)
    losses.set(ylabel="cross-entropy per label token")
    rates.set(xlabel="optimizer step", ylabel="lr")
    _finish(losses, rates)
    figure.savefig(path, dpi=120)


def draw_comparison(path: Path, runs: Mapping[str, Rows]) -> None:
    """A PNG of several runs, by their names: running means of training losses; held-out losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    training, held_out = figure.subplots(1, 2, sharey=True)
    for i, (name, rows) in enumerate(runs.items()):
        color = f"C{i % 10}"
        _draw_training(training, rows, color, name)
        _draw_held_out(held_out, rows, color, name)
    training.set(title="training", xlabel="optimizer step", ylabel="cross-entropy per label token")
    held_out.set(title="held out", xlabel="optimizer step")
    _finish(training, held_out)
    figure.savefig(path, dpi=120)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Of each value and up to ``window - 1`` before it; those that are not finite are passed over.

    nan where there is no finite one among them.
    """
    import numpy as np

    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    means = np.full(len(sums), np.nan)
    return [float(mean) for mean in np.divide(sums, counts, out=means, where=counts > 0)]


def _draw_training(axes: Axes, rows: Rows, color: str, label: str) -> None:
    train = training_rows(rows)
    if not train:
        return
    steps, losses = [row["step"] for row in train], [row["loss"] for row in train]
    mean = running_mean(losses, max(5, len(losses) // 20))
    axes.plot(steps, losses, ".-", color=color, lw=0.6, ms=4, alpha=0.4)
    axes.plot(steps, mean, color=color, lw=2, label=label)


def _draw_held_out(axes: Axes, rows: Rows, color: str, label: str) -> None:
    """From the init on. The base has no adapter: it is no point of this curve."""
    curve = [row for row in evaluations(rows) if row["stage"] != "base"]
    if curve:
        steps = [row["step"] for row in curve]
        axes.plot(steps, [row["eval_loss"] for row in curve], "o--", color=color, ms=4, label=label)


def _finish(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
