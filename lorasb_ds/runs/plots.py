"""Draw losses over steps, and alignment over steps and layers. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasb_ds.runs.history import evaluations, training_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl or alignment.jsonl
PANELS = {
    "gradient_cosine": "gradient that the adapter can follow,\n‖P(G)‖ / ‖G‖",
    "sign_cosine": "the same of its sign,\n‖P(sign G)‖ / ‖sign G‖",
    "update_cosine": "step made and full AdamW's,\ncosine of ΔW and -sign(G)",
}
TICKS = 8  # labels on the axis of steps, at most


def draw_loss_curve(path: Path, rows: Rows) -> None:
    """Draw one run as a PNG: training loss and running mean, held-out losses, learning rate."""
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
    """Draw several runs as a PNG: running means of their training losses, and held-out losses.

    Args:
        runs: name -> rows.
    """
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
    """Average each value with up to ``window - 1`` values before it.

    Values that are not finite are skipped; the mean is nan if none is finite.
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
    """Draw held-out losses from the init on; the base has no adapter and is not on this curve."""
    curve = [row for row in evaluations(rows) if row["stage"] != "base"]
    if curve:
        steps = [row["step"] for row in curve]
        axes.plot(steps, [row["eval_loss"] for row in curve], "o--", color=color, ms=4, label=label)


def _finish(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")


def mean_alignment(rows: Rows, field: str) -> dict[int, float]:
    """Map step -> the mean over layers with a finite value; nan if there are none."""
    found: dict[int, list[float]] = {}
    for row in rows:
        values = found.setdefault(row["step"], [])
        if math.isfinite(row[field]):
            values.append(row[field])
    return {step: sum(v) / len(v) if v else math.nan for step, v in found.items()}


def describe_alignment(rows: Rows) -> str:
    """Describe the last step, compared with the first, in one line."""
    held = mean_alignment(rows, "gradient_cosine")
    first, last = min(held), max(held)
    text = f"step {last}: the adapter holds {held[last]:.0%} of the gradient"
    if first < last:
        text += f" (step {first}: {held[first]:.0%})"
    agreement = mean_alignment(rows, "update_cosine")[last]
    if math.isfinite(agreement):
        step = "step's" if last else "init's"
        text += f", the {step} cosine with -sign(G) is {agreement:.2f}"
    return text


def draw_alignment(path: Path, rows: Rows) -> None:
    """Draw heat maps of layers by steps as a PNG.

    Layers of one kind are together, from the first block to the last.

    Args:
        rows: at least one.
    """
    import numpy as np
    from matplotlib.figure import Figure

    steps = {step: i for i, step in enumerate(sorted({row["step"] for row in rows}))}
    kinds: dict[str, list[str]] = {}
    for layer in dict.fromkeys(row["layer"] for row in rows):
        kinds.setdefault(layer.rpartition(".")[2], []).append(layer)  # q_proj, down_proj, …
    layers = {layer: i for i, layer in enumerate(chain(*kinds.values()))}
    ends = list(accumulate(map(len, kinds.values())))
    figure = Figure(figsize=(13, 3 + 0.02 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (field, title) in zip(axes, PANELS.items(), strict=True):
        grid = np.full((len(layers), len(steps)), np.nan)
        for row in rows:
            grid[layers[row["layer"]], steps[row["step"]]] = row[field]
        image = axis.imshow(grid, aspect="auto", interpolation="nearest", **_colors(field, grid))
        figure.colorbar(image, ax=axis)
        axis.set(title=title, xlabel="optimizer step")
        shown = list(steps)[:: -(-len(steps) // TICKS)]
        axis.set_xticks([steps[step] for step in shown], list(map(str, shown)))
        for end in ends[:-1]:
            axis.axhline(end - 0.5, color="white", lw=1)
    middles = [end - (len(same) + 1) / 2 for end, same in zip(ends, kinds.values(), strict=True)]
    axes[0].set_yticks(middles, list(kinds))
    figure.savefig(path, dpi=120)


def _colors(field: str, grid: Any) -> dict[str, Any]:
    """Choose a color scale from 0 upwards; for a signed cosine, with 0 in the middle."""
    import numpy as np

    most = float(np.nanmax(np.abs(grid), initial=1e-3))
    if field == "update_cosine":
        return {"cmap": "RdBu", "vmin": -most, "vmax": most}
    return {"cmap": "viridis", "vmin": 0.0, "vmax": most}
