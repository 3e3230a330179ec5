"""What ``alignment.jsonl`` says over time: a line, and a picture. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]  # of step, layer, and numbers; nan where there is none

PANELS = {
    "gradient_cosine": "gradient that the adapter can follow,\n‖P(G)‖ / ‖G‖",
    "sign_cosine": "the same of its sign,\n‖P(sign G)‖ / ‖sign G‖",
    "update_cosine": "step made and full AdamW's,\ncosine of ΔW and -sign(G)",
}
TICKS = 8  # that name steps, at most


def mean_alignment(rows: Rows, field: str) -> dict[int, float]:
    """Step -> the mean over layers that have a number; nan where none has."""
    found: dict[int, list[float]] = {}
    for row in rows:
        values = found.setdefault(row["step"], [])
        if math.isfinite(row[field]):
            values.append(row[field])
    return {step: sum(v) / len(v) if v else math.nan for step, v in found.items()}


def describe_alignment(rows: Rows) -> str:
    """The last step in one line, beside the first."""
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
    """A PNG of heat maps, layers by steps. Layers of one kind are together, from the first block
    to the last.

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
    """From 0 up; a cosine that may be negative has 0 in the middle."""
    import numpy as np

    most = float(np.nanmax(np.abs(grid), initial=1e-3))
    if field == "update_cosine":
        return {"cmap": "RdBu", "vmin": -most, "vmax": most}
    return {"cmap": "viridis", "vmin": 0.0, "vmax": most}
