"""A picture of how much an init depends on its sample. Torch-free."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasb_ds.sensitivity import SIDES, Pair, Size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_sensitivity(path: Path, sizes: Sequence[Size], chance: Pair) -> None:
    """A PNG: overlaps of the bases and held-out losses, over the rows of a sample."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    overlap, loss = figure.subplots(1, 2)
    numbers = [size.num_rows for size in sizes]
    for i, side in enumerate(SIDES):
        between, largest = ([getattr(s, a)[i] for s in sizes] for a in ("between", "with_largest"))
        overlap.plot(numbers, between, "o-", color=f"C{i}", label=f"{side}, between seeds")
        overlap.plot(numbers, largest, "s--", color=f"C{i}", label=f"{side}, with most rows")
        overlap.axhline(chance[i], color=f"C{i}", ls=":", lw=1, label=f"{side}, by chance")
    overlap.set(ylim=(0, 1.02), ylabel="overlap of subspaces (1: the same)")
    for i, (name, label) in enumerate((("init_loss", "after the init"), ("loss", "at the end"))):
        for size in sizes:
            found = [getattr(result, name) for result in size.results]
            loss.plot([size.num_rows] * len(found), found, ".", color=f"C{i}", alpha=0.5)
        means = [statistics.fmean(getattr(r, name) for r in size.results) for size in sizes]
        loss.plot(numbers, means, "o-", color=f"C{i}", label=f"{label}, mean")
    loss.set(ylabel="held-out loss")
    for axes in (overlap, loss):
        _finish(axes, numbers)
    figure.savefig(path, dpi=120)


def _finish(axes: Axes, numbers: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("rows of the init's sample")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
